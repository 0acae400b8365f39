"""Training steps against PyTorch: same architecture, same batch, same optimiser, alternating in one run.

    python tests/bench/train.py [--sizes 0.3M 1M 7M 15M 15M-32k] [--dtypes float32 bfloat16] [--rounds 5] [--threads 2]

A Llama-shaped decoder (RMSNorm, rotary positions, SwiGLU, tied head), 8 x 256 tokens, AdamW, gradients clipped.
PyTorch runs eager and compiled, with its fused AdamW and attention; its better mode is the peer. Each round times a few
steps of every contestant in turn; figures are medians over rounds of tokens/s and of the ratio within a round, with its
range.
"""

import argparse
import os
import statistics
import time

SIZES = {
    "0.3M": {"width": 64, "layers": 2, "heads": 2, "vocab": 4096},
    "1M": {"width": 128, "layers": 3, "heads": 4, "vocab": 4096},
    "7M": {"width": 288, "layers": 6, "heads": 6, "vocab": 4096},
    "15M": {"width": 448, "layers": 6, "heads": 7, "vocab": 4096},
    "15M-32k": {"width": 288, "layers": 6, "heads": 6, "vocab": 32_000},
}
BATCH, TIME = 8, 256


def ours(shape: dict, dtype: str, tokens):
    """A function that does about n steps and says how many, with their last loss; and the parameter count."""
    import numpy as np

    from tinylm.config import ModelConfig, TrainConfig
    from tinylm.data import Batch
    from tinylm.model import Transformer
    from tinylm.presets import count
    from tinylm.training import train

    config = ModelConfig(**shape, context=TIME)
    batch = Batch(tokens[:, :-1].astype(np.int32), tokens[:, 1:].astype(np.int32))
    rule = TrainConfig(
        steps=10**9, batch=BATCH, optimizer="adamw", learning_rate=1e-3, schedule="constant", warmup=0, dtype=dtype,
        log_every=10**9, eval_every=0,
    )  # fmt: skip
    trainer = train(Transformer(config), lambda step: batch, rule)  # the loop itself: what a user gets
    going = trainer.every_step()

    def run(steps: int) -> tuple[int, float]:
        done, taken = len(trainer.losses), 0
        while taken < steps or len(trainer.losses) < trainer.step:  # calls hold several steps: to the end of one
            next(going)
            taken = len(trainer.losses) - done
        return taken, trainer.losses[done + steps - 1]

    return run, count(config)


def theirs(shape: dict, dtype: str, tokens, compiled: bool):
    """The same in PyTorch."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    width, heads, vocab = shape["width"], shape["heads"], shape["vocab"]
    head, hidden = width // heads, -(-8 * width // 3 // 32) * 32

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn_norm, self.mlp_norm = nn.RMSNorm(width, 1e-5), nn.RMSNorm(width, 1e-5)
            self.qkv, self.o = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
            self.gate_up, self.down = nn.Linear(width, 2 * hidden, bias=False), nn.Linear(hidden, width, bias=False)

        def forward(self, x, cos, sin):
            b, t, _ = x.shape
            q, k, v = self.qkv(self.attn_norm(x)).view(b, t, 3, heads, head).permute(2, 0, 3, 1, 4)

            def turn(y):
                a, c = y.chunk(2, -1)
                return torch.cat([a * cos - c * sin, c * cos + a * sin], -1).to(y.dtype)

            y = F.scaled_dot_product_attention(turn(q), turn(k), v, is_causal=True)
            x = x + self.o(y.transpose(1, 2).reshape(b, t, width))
            gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, -1)
            return x + self.down(F.silu(gate) * up)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(vocab, width)
            self.blocks = nn.ModuleList(Block() for _ in range(shape["layers"]))
            self.norm = nn.RMSNorm(width, 1e-5)
            angle = torch.outer(torch.arange(TIME), 10_000.0 ** (-torch.arange(head // 2) / (head // 2)))
            self.register_buffer("cos", angle.cos())
            self.register_buffer("sin", angle.sin())
            for p in self.parameters():
                if p.ndim == 2:
                    nn.init.normal_(p, std=0.02)

        def forward(self, ids, targets):
            x = self.embed(ids)
            for block in self.blocks:
                x = block(x, self.cos, self.sin)
            logits = F.linear(self.norm(x), self.embed.weight)
            return F.cross_entropy(logits.float().view(-1, vocab), targets.reshape(-1))

    torch.manual_seed(0)
    model = Model()
    groups = [
        {"params": [p for p in model.parameters() if (p.ndim >= 2) == two], "weight_decay": 0.1 * two}
        for two in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), fused=True)
    forward = torch.compile(model) if compiled else model
    ids = torch.from_numpy(tokens).long()
    cast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16")

    def run(steps: int) -> tuple[int, float]:
        for _ in range(steps):
            with cast:
                loss = forward(ids[:, :-1], ids[:, 1:])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return steps, loss.item()

    return run, sum(p.numel() for p in model.parameters())


def main() -> None:
    """Print one row per size and precision."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=[*SIZES], choices=[*SIZES])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each contestant in each round")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    import numpy as np
    import torch

    torch.set_num_threads(args.threads)
    print("| size | parameters | dtype | ours, tok/s | eager | compiled | ours over the better (range) | loss after |")
    print("|---|---|---|---|---|---|---|---|")
    for size in args.sizes:
        for dtype in args.dtypes:
            shape = SIZES[size]
            tokens = np.random.default_rng(0).integers(0, shape["vocab"], (BATCH, TIME + 1))
            made = {"ours": ours(shape, dtype, tokens)}
            made |= {name: theirs(shape, dtype, tokens, name == "compiled") for name in ("eager", "compiled")}
            assert len({count for _, count in made.values()}) == 1, {name: count for name, (_, count) in made.items()}
            steps, losses, speeds = {}, {}, {name: [] for name in made}
            for name, (run, _) in made.items():
                losses[name] = run(3)[1]  # compiles, and shows that all three learn the same
                run(20 if name == "ours" else 2)  # ours learns how many steps share a call
                begun = time.perf_counter()
                done, _ = run(2)
                steps[name] = max(2, round(args.seconds / ((time.perf_counter() - begun) / done)))
            for _ in range(args.rounds):
                for name, (run, _) in made.items():
                    begun = time.perf_counter()
                    done, _ = run(steps[name])
                    speeds[name].append(done * BATCH * TIME / (time.perf_counter() - begun))
            best = max(("eager", "compiled"), key=lambda name: statistics.median(speeds[name]))
            ratios = [a / b for a, b in zip(speeds["ours"], speeds[best], strict=True)]
            row = " | ".join(f"{statistics.median(speeds[name]):,.0f}" for name in made)
            spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            after = ", ".join(f"{loss:.3f}" for loss in losses.values())
            print(f"| {size} | {made['ours'][1]:,} | {dtype} | {row} | {spread} | {after} |", flush=True)


if __name__ == "__main__":
    main()
