"""One engine in one process, for engine.py: loads a model, then does its task as often as it is told on a pipe.

    python tests/bench/engine_peers.py '{"engine": "llama.cpp", "task": "decode", "path": "m.gguf", "tokens": 64}'

Says "ready"; for each line with a number N does the task N times and answers in one line: seconds, CPU seconds of the
process, then the token ids it made (the last time). Nothing but the engine is imported. Tasks:

    decode    greedy, from one token; `context` is the length of the cache
    prefill   `tokens` ids read at once; logits of the last position, or of each with "all"; ids: the most probable ones
    batch     `rows` greedy texts side by side, each from a token of its own; ids: those of all rows, one after another
    stories   texts after given beginnings, with drafts or without; ids: how many passes and tokens, then the tokens
    bert      `rows` rows of `tokens` ids through an encoder, `block` rows at a time
"""

from __future__ import annotations

import os
import sys
import time
import types
from collections.abc import Callable

BEGIN = 1


def text(spec: dict):
    """The ids of "prefill" (tokens,) and "bert" (rows, tokens): the same for every engine."""
    import numpy as np

    rng = np.random.default_rng(7)
    return rng.integers(3, spec["vocab"], (spec.get("rows", 1), spec["tokens"]))


def resting(run: Callable[[], list[int]], rest: Callable | None) -> Callable[[], list[int]]:
    """`run`, and what to call when a turn is over."""
    run.rest = rest
    return run


# --- llama.cpp --------------------------------------------------------------------------------------------------------


def llama_cpp(spec: dict) -> Callable[[], list[int]]:
    """Its C functions through ctypes. Options: flash (-1: its choice, 0, 1), repack, cache (keys and values)."""
    import ctypes
    import functools
    import importlib.util

    found = importlib.util.find_spec("llama_cpp")
    package = sys.modules["llama_cpp"] = types.ModuleType("llama_cpp")  # without what its __init__ imports
    package.__path__ = found.submodule_search_locations
    import llama_cpp.llama_cpp as lib
    import numpy as np

    task, tokens, rows, threads = spec["task"], spec["tokens"], spec.get("rows", 1), spec["threads"]
    if not spec.get("verbose"):
        global quiet  # the library keeps the pointer
        quiet = lib.llama_log_callback(lambda *_: None)
        lib.llama_log_set(quiet, None)
    lib.llama_backend_init()
    settings = lib.llama_model_default_params()
    settings.n_gpu_layers, settings.use_extra_bufts = 0, spec.get("repack", True)
    model = lib.llama_load_model_from_file(spec["path"].encode(), settings)
    settings = lib.llama_context_default_params()
    settings.n_ctx = rows * spec["context"]
    settings.n_batch = settings.n_ubatch = max(tokens, rows) if task != "decode" else 32
    settings.n_threads = settings.n_threads_batch = threads
    settings.n_seq_max, settings.kv_unified = rows, spec.get("unified", False)
    settings.offload_kqv = settings.op_offload = False
    settings.no_perf, settings.flash_attn_type = True, spec.get("flash", -1)
    settings.type_k = settings.type_v = {"f32": 0, "f16": 1, "q8_0": 8}[spec.get("cache", "f16")]
    context = lib.llama_new_context_with_model(model, settings)
    vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    memory = lib.llama_get_memory(context)
    pause = None
    if threads > 1:  # else it starts and ends its threads for every token

        class Pool(ctypes.Structure):  # struct ggml_threadpool_params
            _fields_ = [("cpumask", ctypes.c_bool * 512), ("n_threads", ctypes.c_int), ("prio", ctypes.c_int)]
            _fields_ += [("poll", ctypes.c_uint32), ("strict_cpu", ctypes.c_bool), ("paused", ctypes.c_bool)]

        folder = os.path.join(package.__path__[0], "lib")
        base, cpu, top = (ctypes.CDLL(os.path.join(folder, f"lib{x}.so")) for x in ("ggml-base", "ggml-cpu", "llama"))
        given = Pool()
        base.ggml_threadpool_params_init(ctypes.byref(given), threads)
        given.poll = spec.get("poll", 100)
        cpu.ggml_threadpool_new.restype = ctypes.c_void_p
        pool = ctypes.c_void_p(cpu.ggml_threadpool_new(ctypes.byref(given)))
        top.llama_attach_threadpool.argtypes = [ctypes.c_void_p] * 3
        top.llama_attach_threadpool(context, pool, None)
        pause = functools.partial(cpu.ggml_threadpool_pause, pool)  # between turns its threads would go on spinning

    batch = lib.llama_batch_init(max(tokens, rows), 0, 1)
    view = lambda pointer, *shape: np.ctypeslib.as_array(pointer, shape)  # noqa: E731
    count = tokens if task == "prefill" else rows
    ids, positions, wanted = (view(x, count) for x in (batch.token, batch.pos, batch.logits))
    view(batch.n_seq_id, count)[:] = 1
    for i in range(count):
        batch.seq_id[i][0] = i if task == "batch" else 0
    batch.n_tokens = count
    wanted[:] = 1
    places: dict[int, np.ndarray] = {}

    def logits(count: int) -> np.ndarray:
        """(count, vocab): the library's own buffer."""
        pointer = lib.llama_get_logits(context)
        place = ctypes.cast(pointer, ctypes.c_void_p).value
        if place not in places:
            places[place] = view(pointer, count, vocab)
        return places[place]

    def decode() -> list[int]:
        lib.llama_memory_clear(memory, False)
        ids[:] = np.arange(BEGIN, BEGIN + rows)
        made = np.empty((tokens, rows), np.int64)
        for position in range(tokens):
            positions[:] = position
            if lib.llama_decode(context, batch):
                raise RuntimeError("llama_decode failed")
            ids[:] = made[position] = logits(rows).argmax(axis=-1)
        return made.T.ravel().tolist()

    def prefill() -> list[int]:
        lib.llama_memory_clear(memory, False)
        ids[:], positions[:] = text(spec)[0], np.arange(tokens)
        wanted[:-1] = spec["all"]
        if lib.llama_decode(context, batch):
            raise RuntimeError("llama_decode failed")
        return logits(tokens if spec["all"] else 1).argmax(axis=-1).tolist()

    return resting(prefill if task == "prefill" else decode, pause)


# --- onnxruntime ------------------------------------------------------------------------------------------------------


def onnxruntime(spec: dict) -> Callable[[], list[int]]:
    """A graph of engine_onnx.py, with its inputs, its caches and its logits bound to memory once."""
    import numpy as np
    import onnxruntime as program

    task, tokens, rows = spec["task"], spec["tokens"], spec.get("rows", 1)
    settings = program.SessionOptions()
    settings.intra_op_num_threads, settings.inter_op_num_threads = spec["threads"], 1
    session = program.InferenceSession(spec["path"], settings, providers=["CPUExecutionProvider"])
    given = {x.name: x for x in session.get_inputs()}
    if task == "bert":
        whole, block = text(spec), spec["block"]

        def encode() -> list[int]:
            made = [session.run(None, {"ids": whole[i : i + block]})[0] for i in range(0, rows, block)]
            return fingerprint(np.concatenate(made))

        return encode

    binding = session.io_binding()
    kept = []

    def bind(name: str, array: np.ndarray, output: str = "") -> np.ndarray:
        value = program.OrtValue.ortvalue_from_numpy(array)  # the same memory
        kept.append(value)
        if name:
            binding.bind_ortvalue_input(name, value)
        if output:
            binding.bind_ortvalue_output(output, value)
        return array

    length = tokens if task == "prefill" else 1
    ids = bind("ids", np.zeros((rows, length), np.int64))
    held, total = bind("held", np.zeros(rows, np.int32)), bind("total", np.zeros(1, np.int32))
    position = bind("position", np.zeros(1, np.int64)) if "position" in given else np.zeros(1)
    for name, x in given.items():
        if name.startswith("past"):
            bind(name, np.zeros((rows, *x.shape[1:]), np.float32), name.replace("past", "present"))
    shape = (rows, tokens if task == "prefill" and spec["all"] else 1, spec["vocab"])
    logits = bind("", np.zeros(shape, np.float32), "logits")
    run = session._sess.run_with_iobinding  # the same without a check of the feeds

    def decode() -> list[int]:
        ids[:, 0] = np.arange(BEGIN, BEGIN + rows)
        made = np.empty((tokens, rows), np.int64)
        for i in range(tokens):
            held[:], total[0], position[0] = i, i + 1, i
            run(binding._iobinding, None)
            ids[:, 0] = made[i] = logits[:, 0].argmax(axis=-1)
        return made.T.ravel().tolist()

    def prefill() -> list[int]:
        ids[:], held[:], total[0] = text(spec), tokens - 1, tokens
        run(binding._iobinding, None)
        return logits[0].argmax(axis=-1).tolist()

    return prefill if task == "prefill" else decode


# --- JAX --------------------------------------------------------------------------------------------------------------


def jax(spec: dict) -> Callable[[], list[int]]:
    """Llama in float32, the whole greedy loop of all rows in one jit: layers unrolled, products of one input joined."""
    import jax as program
    import jax.numpy as jnp
    import numpy as np
    from safetensors.numpy import load_file

    params, c = load_file(spec["path"]), spec["config"]
    tokens, rows, layers = spec["tokens"], spec.get("rows", 1), range(c["layers"])
    heads, kv_heads, width, eps = c["heads"], c["kv_heads"], c["head_width"], c["norm_eps"]
    joined = lambda i, part, names: np.concatenate(  # noqa: E731
        [params[f"blocks.{i}.{part}.{n}.kernel"] for n in names], axis=1
    )
    weights = {name: value for name, value in params.items() if "kernel" not in name}
    for i in layers:
        weights |= {f"qkv.{i}": joined(i, "attn", "qkv"), f"o.{i}": joined(i, "attn", "o")}
        weights |= {f"up.{i}": joined(i, "mlp", ("gate", "up")), f"down.{i}": joined(i, "mlp", ("down",))}
    if spec.get("turned"):  # outputs first: a product reads whole rows
        weights = {name: x.T.copy() if name[:2] in ("qk", "o.", "up", "do") else x for name, x in weights.items()}
    times = (lambda x, w: x @ w.T) if spec.get("turned") else (lambda x, w: x @ w)
    angle = np.outer(np.arange(tokens), c["theta"] ** (-np.arange(width // 2) * 2 / width))
    weights |= {"cos": np.cos(angle).astype(np.float32), "sin": np.sin(angle).astype(np.float32)}

    def norm(x, scale):
        return x * program.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + eps) * scale

    @program.jit
    def loop(w, first):
        def turn(x, at):
            (a, b), cos, sin = jnp.split(x, 2, -1), w["cos"][at], w["sin"][at]
            return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

        def step(state, at):
            token, keys, values = state
            x, unseen = w["embed.table"][token], jnp.where(jnp.arange(tokens) <= at, 0.0, -jnp.inf)
            for i in layers:
                y = times(norm(x, w[f"blocks.{i}.attn_norm.scale"]), w[f"qkv.{i}"]).reshape(rows, -1, width)
                q, k, v = jnp.split(y, [heads, heads + kv_heads], axis=1)
                q = turn(q, at).reshape(rows, kv_heads, -1, width) * width**-0.5
                put = lambda cache, new: program.lax.dynamic_update_slice(cache, new[:, :, None], (0, 0, at, 0))  # noqa: E731
                keys = {**keys, i: put(keys[i], turn(k, at))}
                values = {**values, i: put(values[i], v)}
                scores = jnp.einsum("bkhe,bkte->bkht", q, keys[i]) + unseen
                y = jnp.einsum("bkht,bkte->bkhe", program.nn.softmax(scores), values[i])
                x = x + times(y.reshape(rows, -1), w[f"o.{i}"])
                gate, up = jnp.split(times(norm(x, w[f"blocks.{i}.mlp_norm.scale"]), w[f"up.{i}"]), 2, -1)
                x = x + times(program.nn.silu(gate) * up, w[f"down.{i}"])
            token = jnp.argmax(norm(x, w["norm.scale"]) @ w["embed.table"].T, -1).astype(jnp.int32)
            return (token, keys, values), token

        empty = lambda: {i: jnp.zeros((rows, kv_heads, tokens, width)) for i in layers}  # noqa: E731
        return program.lax.scan(step, (first, empty(), empty()), jnp.arange(tokens))[1]

    weights, first = program.device_put(weights), np.arange(BEGIN, BEGIN + rows, dtype=np.int32)
    return lambda: np.asarray(loop(weights, first)).T.ravel().tolist()


# --- PyTorch ----------------------------------------------------------------------------------------------------------


def torch(spec: dict) -> Callable[[], list[int]]:
    """BERT's encoder. Options: compiled, and the backend of int8."""
    import warnings

    import numpy as np
    import torch as program
    from safetensors.numpy import load_file
    from torch import nn
    from torch.nn import functional as F

    warnings.simplefilter("ignore")  # its quantisation is to move to another package
    program.set_num_threads(spec["threads"])
    params, c = load_file(spec["path"]), spec["config"]
    width, heads = c["width"], c["heads"]

    def linear(*names: str) -> nn.Linear:
        kernel, bias = (np.concatenate([params[f"{n}.{part}"] for n in names], -1) for part in ("kernel", "bias"))
        made = nn.Linear(*kernel.shape)
        made.weight.data, made.bias.data = program.tensor(kernel.T.copy()), program.tensor(bias)
        return made

    def norm(name: str) -> nn.LayerNorm:
        made = nn.LayerNorm(width, c["norm_eps"])
        made.weight.data, made.bias.data = (program.tensor(params[f"{name}.{x}"]) for x in ("scale", "bias"))
        return made

    class Block(nn.Module):
        def __init__(self, at: str):
            super().__init__()
            self.qkv, self.o = linear(*(f"{at}.attn.{n}" for n in "qkv")), linear(f"{at}.attn.o")
            self.up, self.down = linear(f"{at}.mlp.up"), linear(f"{at}.mlp.down")
            self.attn_norm, self.mlp_norm = norm(f"{at}.attn_norm"), norm(f"{at}.mlp_norm")

        def forward(self, x):
            rows, length, _ = x.shape
            q, k, v = self.qkv(x).view(rows, length, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(rows, length, width)
            x = self.attn_norm(x + self.o(y))
            return self.mlp_norm(x + self.down(F.gelu(self.up(x))))

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(program.tensor(params["embed.table"]))
            self.positions = nn.Parameter(program.tensor(params["embed_positions.table"]))
            self.norm = norm("embed_norm")
            self.blocks = nn.ModuleList(Block(f"blocks.{i}") for i in range(c["layers"]))

        def forward(self, ids):
            x = self.norm(F.embedding(ids, self.table) + self.positions)
            for block in self.blocks:
                x = block(x)
            return x

    model = Encoder().eval()
    if spec["weights"] == "int8":  # dynamic
        program.backends.quantized.engine = spec["backend"]
        model = program.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=program.qint8)
    elif spec["weights"] == "bfloat16":
        model = model.bfloat16()
    if spec.get("compiled"):
        import torch._inductor.config as inductor

        inductor.freezing = True
        model = program.compile(model)
    whole, block = program.from_numpy(text(spec)), spec["block"]

    @program.inference_mode()
    def encode() -> list[int]:
        made = [model(whole[i : i + block]) for i in range(0, len(whole), block)]
        return fingerprint(program.cat(made).float().numpy())

    return encode


def fingerprint(features) -> list[int]:
    """Which feature is largest in every 16th position (rows, positions, width): equal in engines that agree."""
    return features[:, ::16].argmax(axis=-1).ravel().tolist()


# --- ours -------------------------------------------------------------------------------------------------------------


def tinylm(spec: dict) -> Callable[[], list[int]]:
    """The kit's engine through its C interface, as llama.cpp. Options: screen, speculate (0: no drafts)."""
    import ctypes as c

    from tinylm import native

    task, tokens, rows = spec["task"], spec["tokens"], spec.get("rows", 1)
    model, session = c.c_void_p(), c.c_void_p()
    options = native.Options(None, 0, spec.get("screen", 1), 1)
    native.call("tlm_open", spec["path"].encode(), c.byref(options), c.byref(model))
    native.call("tlm_session_new", model, rows if task == "batch" else 1, spec["threads"], c.byref(session))
    settings, most = native.Settings(), 1 if task == "prefill" else tokens
    native.library().tlm_settings_default(c.byref(settings))
    settings.temperature, settings.most, settings.speculate = 0.0, most, spec.get("speculate", 0)
    made, counts, ends = (c.c_int32 * (rows * most))(), (c.c_int32 * rows)(), (c.c_int32 * rows)()
    start = lambda row, *ids: native.call(  # noqa: E731
        "tlm_start", session, row, (c.c_int32 * len(ids))(*ids), len(ids), c.byref(settings)
    )

    def decode() -> list[int]:
        for row in range(rows):
            start(row, BEGIN + row)
        native.call("tlm_next", session, most, 0, made, counts, ends, None)
        return made[:]

    def stories() -> list[int]:
        """Passes and tokens, then all ids."""
        told, before, after = [], native.Counts(), native.Counts()
        native.library().tlm_session_counts(session, c.byref(before))
        for number, prompt in enumerate(prompts):
            settings.stream = number
            start(0, *prompt)
            native.call("tlm_next", session, most, 0, made, counts, ends, None)
            told += made[: counts[0]]
        native.library().tlm_session_counts(session, c.byref(after))
        return [after.passes - before.passes, len(told), *told]

    if task in ("decode", "batch"):
        return decode
    import numpy as np

    if task == "stories":
        prompts, settings.temperature = np.load(spec["prompts"]).tolist(), spec["temperature"]
        if "corpus" in spec:
            ids, draft = np.load(spec["corpus"]), c.c_void_p()
            native.call("tlm_draft_learn", ids.ctypes.data, len(ids), spec["vocab"], 0, c.byref(draft))
            native.call("tlm_session_draft", session, draft)
        return stories
    whole = text(spec).astype(np.int32)
    plain, other = whole[0].tolist(), [BEGIN, *whole[0, 1:].tolist()]
    answers: list[list[int]] = []  # to the two texts in turn: it reads no beginning a second time

    def prefill() -> list[int]:
        start(0, *(other if len(answers) % 2 else plain))
        native.call("tlm_next", session, 1, 0, made, counts, ends, None)
        answers.append(made[:])
        return answers[0]

    pointer = lambda array: array.ctypes.data_as(c.POINTER(c.c_int32))  # noqa: E731
    block = spec.get("block", 1)
    lengths, what = np.full(block, tokens, np.int32), native.FEATURES if task == "bert" else native.OUTPUT
    out = np.empty((rows, tokens, spec["config"]["width"] if task == "bert" else spec["vocab"]), np.float32)

    def forward() -> list[int]:
        for i in range(0, rows, block):
            some = out[i : i + block].ctypes.data
            ids = pointer(whole[i : i + block])
            native.call("tlm_forward", session, block, pointer(lengths), ids, None, what, some, None)
        return fingerprint(out) if task == "bert" else out[0].argmax(axis=-1).tolist()

    return prefill if task == "prefill" and not spec["all"] else forward


ENGINES: dict[str, Callable[[dict], Callable[[], list[int]]]] = {
    "tinylm": tinylm,
    "llama.cpp": llama_cpp,
    "onnxruntime": onnxruntime,
    "jax": jax,
    "torch": torch,
}


def first(spec: dict) -> None:
    """Do the task once: for "start"."""
    ENGINES[spec["engine"]](spec)()


def main() -> None:
    """Serve one engine on standard input and output, until the input ends."""
    import json

    spec = json.loads(sys.argv[1])
    run = ENGINES[spec["engine"]](spec)
    made = run()  # warms up
    print("ready", flush=True)
    for line in sys.stdin:
        seconds, spent = time.perf_counter(), time.process_time()
        for _ in range(int(line)):
            made = run()
        seconds, spent = time.perf_counter() - seconds, time.process_time() - spent
        if rest := getattr(run, "rest", None):
            rest()
        print(f"{seconds:.9f}", f"{spent:.9f}", *made, flush=True)


if __name__ == "__main__":
    main()
