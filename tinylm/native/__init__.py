"""The native engine: finds and loads the library beside this file. Imports only ctypes, os and sys: start-up counts.

The interface is described in `tinylm.h`; `library()` is its ctypes face. Wheels bring the library along.
"""

from __future__ import annotations

import ctypes as c
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

VERSION = 2  # of the interface, TLM_VERSION
ERROR_BYTES = 512
OK, ARGUMENT, FILE, MEMORY, NUMBERS, CANCELLED = range(6)  # status codes
GOES_ON, END_TOKEN, MOST = range(3)  # why a text ended
FEATURES, OUTPUT = range(2)

HOW = (
    "install a wheel of tinylm (`pip install --only-binary tinylm tinylm`), or install from source where there is "
    "a C++ compiler (g++ 11, clang 14, or a later one)"
)


class NativeMissing(ImportError):
    """The native library is not there, or does not load; the message says how to get it."""


class EngineError(ValueError):
    """What the engine refuses: a damaged file, an argument out of range, a model that cannot do what is asked."""


def _named(names: str, kind: Any = c.c_int32) -> list[tuple[str, Any]]:
    return [(name, kind) for name in names.split()]


class Options(c.Structure):
    """tlm_options."""

    _fields_ = [("kernels", c.c_char_p), ("cache", c.c_int32), ("screen", c.c_int32), ("check", c.c_int32)]


class Facts(c.Structure):
    """tlm_facts: the constants of a model."""

    _fields_ = [
        *_named("kind vocab context width layers heads kv_heads head_width hidden"),
        *_named("head classes token_types known begin"),
        ("ends", c.c_int32 * 4),
        *_named("outputs cache screened tensors"),
        *_named("file_bytes weight_bytes cache_bytes", c.c_uint64),
        ("kernels", c.c_char_p),
    ]


class Tensor(c.Structure):
    """tlm_tensor."""

    _fields_ = [
        ("name", c.c_char_p),
        *_named("kind rows columns group"),
        ("data", c.c_void_p),
        ("bytes", c.c_uint64),
    ]


class Settings(c.Structure):
    """tlm_settings."""

    _fields_ = [
        ("temperature", c.c_float),
        ("top_k", c.c_int32),
        ("top_p", c.c_float),
        ("min_p", c.c_float),
        ("repetition_penalty", c.c_float),
        ("most", c.c_int32),
        ("seed", c.c_uint64),
        ("stream", c.c_uint64),
        ("speculate", c.c_int32),
    ]


class Counts(c.Structure):
    """tlm_counts."""

    _fields_ = _named("passes tokens drafted accepted asked taken screened rescored", c.c_uint64)


_void, _int, _u64 = c.c_void_p, c.c_int32, c.c_uint64
_ints = c.POINTER(c.c_int32)
SIGNATURES = {  # name -> result, arguments
    "tlm_version": (_int,),
    "tlm_open": (c.c_int, c.c_char_p, c.POINTER(Options), c.POINTER(_void), c.c_char_p),
    "tlm_close": (None, _void),
    "tlm_info": (None, _void, c.POINTER(Facts)),
    "tlm_tensor_find": (c.c_int, _void, c.c_char_p, c.POINTER(Tensor)),
    "tlm_tensor_at": (c.c_int, _void, _int, c.POINTER(Tensor)),
    "tlm_encode": (c.c_int, _void, c.c_char_p, _u64, _ints, c.POINTER(c.c_int64), c.c_char_p),
    "tlm_session_new": (c.c_int, _void, _int, _int, c.POINTER(_void), c.c_char_p),
    "tlm_session_free": (None, _void),
    "tlm_session_threads": (_int, _void),
    "tlm_session_bytes": (_u64, _void),
    "tlm_settings_default": (None, c.POINTER(Settings)),
    "tlm_start": (c.c_int, _void, _int, _ints, _int, c.POINTER(Settings), c.c_char_p),
    "tlm_next": (c.c_int, _void, _int, _int, _ints, _ints, _ints, _void, c.c_char_p),
    "tlm_stop": (c.c_int, _void, _int, c.c_char_p),
    "tlm_session_counts": (None, _void, c.POINTER(Counts)),
    "tlm_draft_learn": (c.c_int, _void, _u64, _int, _u64, c.POINTER(_void), c.c_char_p),
    "tlm_draft_read": (c.c_int, c.c_char_p, _u64, c.POINTER(_void), c.c_char_p),
    "tlm_draft_data": (None, _void, c.POINTER(_void), c.POINTER(_u64)),
    "tlm_draft_free": (None, _void),
    "tlm_session_draft": (c.c_int, _void, _void, c.c_char_p),
    "tlm_session_draft_model": (c.c_int, _void, _void, c.c_char_p),
    "tlm_forward": (c.c_int, _void, _int, _ints, _ints, _ints, _int, _void, _void, c.c_char_p),
    "tlm_score": (c.c_int, _void, _ints, c.c_int64, c.POINTER(c.c_double), _void, c.c_char_p),
    "tlm_crc32c": (c.c_uint32, c.c_char_p, _u64),
}

_loaded: c.CDLL | NativeMissing | None = None


def find() -> str | None:
    """Path of the library, or None: beside this file, or where an installer put it (an editable install's build)."""
    name = "_tinylm.pyd" if sys.platform == "win32" else "_tinylm.so"
    # Not pathlib: importing it takes as long as a token of a small model takes to make. Nor `find_spec` where looking
    # does: it imports more.
    for folder in (os.path.dirname(os.path.abspath(__file__)), *__path__):
        path = os.path.join(folder, name)
        if os.path.exists(path):
            return path
    import importlib.util

    spec = importlib.util.find_spec("tinylm.native._tinylm")
    return spec.origin if spec else None


def library() -> c.CDLL:
    """The loaded library with its functions' signatures. Raises NativeMissing."""
    global _loaded
    if _loaded is None:
        path = find()
        try:
            if path is None:
                raise NativeMissing(f"tinylm's native engine is not installed: {HOW}")
            try:
                loaded = c.CDLL(path)
                version = loaded.tlm_version() if hasattr(loaded, "tlm_version") else 1
                if version != VERSION:
                    old = f"{path} has version {version} of the interface, and this tinylm needs {VERSION}"
                    raise NativeMissing(f"tinylm's native engine is of another build: {old}; {HOW}")
                for symbol, (result, *arguments) in SIGNATURES.items():
                    function = getattr(loaded, symbol)
                    function.restype, function.argtypes = result, arguments
            except (OSError, AttributeError) as error:
                raise NativeMissing(f"tinylm's native engine does not load ({error}): {HOW}") from None
            _loaded = loaded
        except NativeMissing as error:
            _loaded = error
    if isinstance(_loaded, NativeMissing):
        raise _loaded
    return _loaded


def available() -> bool:
    """Is the native engine there?"""
    try:
        library()
    except NativeMissing:
        return False
    return True


def call(function: str, *arguments) -> None:
    """One function of the library that returns a status; the error text is added. Raises EngineError or MemoryError."""
    error = c.create_string_buffer(ERROR_BYTES)
    status = getattr(library(), function)(*arguments, error)
    if status == OK:
        return
    text = error.value.decode(errors="replace")
    if status == MEMORY:
        raise MemoryError(text)
    raise EngineError(text)
