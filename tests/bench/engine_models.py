"""The models that engine.py measures, and their files for every engine: the same weights in each.

Random weights are as good as trained ones for speed. Matrices keep the size of what they multiply, and the embedding is
small beside what the blocks add, so that greedy text wanders instead of repeating a token.
"""

from __future__ import annotations

import functools
import gzip
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from tinylm.config import ModelConfig

SIZES = {
    "0.26M": {"width": 64, "hidden": 192, "layers": 5, "heads": 8, "kv_heads": 4, "vocab": 512, "context": 512},
    "6M": {"width": 256, "hidden": 768, "layers": 6, "heads": 8, "vocab": 4096, "context": 512},
    "15M": {"width": 288, "hidden": 768, "layers": 6, "heads": 6, "vocab": 32_000, "context": 256},
    "42M": {"width": 512, "hidden": 1376, "layers": 8, "heads": 8, "vocab": 32_000, "context": 1024},
    "42Mt": {"width": 512, "hidden": 1536, "layers": 8, "heads": 8, "vocab": 32_000, "context": 1024},
}
"""42Mt: rows of whole 256s, which llama.cpp's ternary types need."""
TERNARY = ("6M", "15M", "42Mt")
"""Sizes that are measured with ternary weights: there are no files of fewer than 8 bits of 0.26M."""
BERT = {"width": 768, "hidden": 3072, "heads": 12, "vocab": 8192, "context": 128}
BITS = {"int8": 8, "int4": 4, "ternary": 2, "float32": 32}
GGUF = {"q4_0": 2, "tq1_0": 36, "tq2_0": 37}  # llama.cpp's numbers of file types that its own tool makes


def config(size: str) -> ModelConfig:
    """Of one of SIZES, of "BERT-1", or of any other number of layers."""
    if size.startswith("BERT-"):
        parts = {"kind": "encoder", "norm": "layernorm", "block": "post", "mlp": "gelu", "positions": "learned"}
        return ModelConfig(**BERT, **parts, layers=int(size[5:]), embed_norm=True, bias=True, head="none")
    return ModelConfig(**SIZES[size])


def step_bytes(c: ModelConfig, bits: str) -> int:
    """Bytes of weights that a token cannot do without, scales of rows included: the head is int8 beside fewer bits."""
    kv = c.kv_heads * c.head_width
    shapes = [(c.width, c.width), (kv, c.width), (kv, c.width), (c.width, c.width)]
    shapes += [(c.hidden, c.width), (c.hidden, c.width), (c.width, c.hidden)]
    body = sum(rows * (columns * BITS[bits] // 8 + 4) for rows, columns in shapes)
    return c.layers * body + c.vocab * (c.width * max(BITS[bits], 8) // 8 + 4)


class Files:
    """The files of one model, written when they are asked for.

    Args:
        size: see `config`. ternary: weights inside the blocks are -d, 0 or d. folder: where; what is there is used.
    """

    def __init__(self, size: str, folder: Path, ternary: bool = False):
        self.size, self.ternary, self.config = size, ternary, config(size)
        self.folder = folder / f"{size}{'-ternary' if ternary else ''}"
        self.folder.mkdir(parents=True, exist_ok=True)

    @functools.cached_property
    def params(self) -> dict[str, np.ndarray]:
        """By name, float32."""
        from tinylm.model import shapes

        rng, made = np.random.default_rng(len(self.size)), {}
        for name, abstract in sorted(shapes(self.config).items()):
            shape = abstract.shape
            if name.endswith("kernel"):
                if self.ternary:  # a power of two: exact in float16 too
                    scale = 2.0 ** np.rint(np.log2(np.sqrt(1.5 / shape[0])))
                    made[name] = scale * rng.integers(-1, 2, shape)
                else:
                    made[name] = rng.normal(size=shape) / np.sqrt(shape[0])
            elif name.endswith("table"):
                made[name] = 0.1 * rng.normal(size=shape)
            else:
                made[name] = np.ones(shape) if name.endswith("scale") else 0.1 * rng.normal(size=shape)
        return {name: value.astype(np.float32) for name, value in made.items()}

    @functools.cached_property
    def model(self):
        """As the kit's Transformer."""
        from tinylm.model import Transformer
        from tinylm.weights import assign

        made = Transformer(self.config)
        assign(made, self.params)
        return made

    def __call__(self, name: str) -> str:
        """The path of a file by its name: int8.tlm, f32.gguf, v0.bin, dynamic-last-joined.onnx and so on."""
        path = self.folder / name
        if not path.exists():
            stem, kind = name.rsplit(".", 1) if "." in name else (name, "folder")
            getattr(self, f"_{kind}")(stem, path)
        return str(path)

    def _tlm(self, stem: str, path: Path) -> None:
        from tinylm.engine.export import export

        export(self.model, path, bits=stem)

    def _folder(self, stem: str, path: Path) -> None:
        from tinylm.checkpoint import save

        save(self.model, path)

    def _safetensors(self, stem: str, path: Path) -> None:
        from safetensors.numpy import save_file

        save_file(self.params, path)

    def _bin(self, stem: str, path: Path) -> None:
        from tinylm.checkpoint import save

        save(self.model, path, version=int(stem[1:]))

    def _gguf(self, stem: str, path: Path) -> None:
        if stem not in GGUF:
            from tinylm.checkpoint import save

            save(self.model, path, dtype=stem, tokenizer=False)
            return
        code = "import ctypes, sys, llama_cpp as l; p = l.llama_model_quantize_default_params(); a = sys.argv[1:]"
        code += "; p.ftype = int(a[2]); sys.exit(l.llama_model_quantize(a[0].encode(), a[1].encode(), ctypes.byref(p)))"
        command = [sys.executable, "-c", code, self("f32.gguf"), str(path), str(GGUF[stem])]
        subprocess.run(command, check=True, capture_output=True)

    def _onnx(self, stem: str, path: Path) -> None:
        import engine_onnx as graphs

        kind, *marks = stem.split("-")
        if kind == "dynamic":
            float32 = "-".join(["float32", *(mark for mark in marks if mark != "tensor")])
            graphs.dynamic(Path(self(f"{float32}.onnx")), path, channels="tensor" not in marks)
        elif self.config.kind == "encoder":
            graphs.encoder(self.params, self.config, path, apart="apart" in marks)
        else:
            block = next((int(mark) for mark in marks if mark.isdigit()), 32)
            bits = int(kind.removeprefix("blocks")) if kind.startswith("blocks") else 32
            form = {"last": "last" in marks, "joined": "joined" in marks}
            graphs.decoder(self.params, self.config, path, bits=bits, block=block, **form)


class Published(Files):
    """The files of a model that somebody trained, with its tokenizer."""

    def __init__(self, checkpoint: Path, folder: Path):
        from tinylm.checkpoint import load
        from tinylm.weights import named

        self.model = load(checkpoint)
        self.size, self.ternary, self.config = checkpoint.parent.name, False, self.model.config
        self.params = {name: np.asarray(value) for name, value in named(self.model).items()}
        self.folder = folder / self.size
        self.folder.mkdir(parents=True, exist_ok=True)

    def tokens(self, source: Path, first: int) -> str:
        """A file of int32 ids: whole documents one after the other, or of 16 of them the `first` ids, (16, first)."""
        path = self.folder / f"{source.name}-{first}.npy"
        if not path.exists():
            documents = gzip.decompress(source.read_bytes()).decode().split("<|endoftext|>")
            documents = [text.strip() for text in documents if text.strip()]
            if first:
                documents = [text for text in documents if len(text) > 20 * first][:16]
            begin, encode = self.model.tokenizer.begin, self.model.tokenizer.encode
            ids = [np.array([begin, *encode(text)], np.int32) for text in documents]
            np.save(path, np.stack([x[:first] for x in ids]) if first else np.concatenate(ids))
        return str(path)


LLAMA2C = r"""
#define TESTING
#include PROGRAM
int main(int argc, char** argv) {
    Transformer model;
    build_transformer(&model, argv[1]);
    int tokens = atoi(argv[2]), times = 1, token, *made = malloc(tokens * sizeof(int));
    struct timespec a, b, c, d;
    for (int warm = 1; warm || scanf("%d", &times) == 1; warm = 0) {
        clock_gettime(CLOCK_MONOTONIC, &a);
        clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &c);
        while (times-- > 0) {
            token = 1;
            for (int i = 0; i < tokens; i++)
                made[i] = token = sample_argmax(forward(&model, token, i), model.config.vocab_size);
        }
        clock_gettime(CLOCK_MONOTONIC, &b);
        clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &d);
        if (argc > 3) return 0;
        if (warm) printf("ready");
        else printf("%.9f %.9f", b.tv_sec - a.tv_sec + 1e-9 * (b.tv_nsec - a.tv_nsec),
                    d.tv_sec - c.tv_sec + 1e-9 * (d.tv_nsec - c.tv_nsec));
        for (int i = 0; i < tokens && !warm; i++) printf(" %d", made[i]);
        puts("");
        fflush(stdout);
    }
}
"""
"""Around llama2.c's own functions, the loop of engine_peers.py: no text is made."""


def llama2c(program: str, flags: str, folder: Path, threads: int) -> Path:
    """`run` or `runq` of the source in LLAMA2C, compiled; with OpenMP for several threads."""
    path = folder / f"{program}{flags}{threads}"
    if not path.exists():
        source = Path(os.environ["LLAMA2C"]).resolve() / f"{program}.c"
        parallel = ["-fopenmp"] if threads > 1 else []
        command = ["gcc", flags, "-march=native", *parallel, f'-DPROGRAM="{source}"', "-x", "c", "-", "-lm", "-w"]
        subprocess.run([*command, "-o", str(path)], input=LLAMA2C, text=True, check=True)
    return path


def bandwidth(folder: Path) -> Path:
    """bandwidth.cc, compiled."""
    path = folder / "bandwidth"
    if not path.exists():
        source = Path(__file__).with_name("bandwidth.cc")
        subprocess.run(["g++", "-O3", "-march=native", "-pthread", str(source), "-o", str(path)], check=True)
    return path
