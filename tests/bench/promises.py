"""What is left after kill -9 in a save, one flipped bit, and Ctrl-C: ours beside orbax, HF Trainer and Lightning.

    python tests/bench/promises.py [--kills 10] [--flips 40] [--interrupts 10] [--only ours,orbax]
    python tests/bench/promises.py --soak 100000
    python tests/bench/promises.py --killed-saves 80

Each library is used as its documentation shows first: checkpoints at every step, the two newest kept, defaults else.
Those that are not installed are left out. A kill comes at a random moment of a process that saves all the time; what
counts is the newest checkpoint that the library itself names, and what else is left after opening it again. A flipped
bit is anywhere in the newest checkpoint. Ctrl-C comes at a random moment of a blocking loop, as in a notebook's cell;
then the same objects train on to the end. `--killed-saves` is ours alone, with a training state of 188 MB: kills spread
evenly over the time that a save takes, all in one run folder, each followed by what a user would do: open it again.
"""

import argparse
import contextlib
import gc
import importlib.util
import os
import random
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path

import numpy as np

SIZE = 500_000  # numbers in the state that is saved; with Adam's moments three times as many
LARGE = 15_625_000  # parameters of the state whose saves are killed: 188 MB with Adam's moments
STEPS = 400  # of the interrupted loop


def arrays(step):
    rng = np.random.default_rng(step)
    return {"a": rng.random(SIZE, np.float32), "b": rng.random(2 * SIZE, np.float32), "step": np.array(step)}


def training_state():
    """15.6 million float32 parameters in six matrices, and both moments of Adam."""
    rng = np.random.default_rng(0)
    kinds = [f"{part}.{n}" for part in ("params", "opt.mu", "opt.nu") for n in range(6)]
    return {name: rng.standard_normal((LARGE // 6000, 1000), np.float32) for name in kinds}


def at_step(state, step):
    """The state of a step: its number stands in every tensor, so that no two steps' tensors can be mixed unnoticed."""
    for value in state.values():
        value[0, 0] = step
    return {**state, "step": np.array(step)}


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


# --- adapters: `saving` saves for ever, `newest` is what a new process finds: step, arrays, whether it complained -----


class Ours:
    needs = "tinylm"

    def saving(self, folder, said):
        from tinylm.config import ModelConfig, TrainConfig
        from tinylm.run import Run

        model = ModelConfig(vocab=261, width=8, layers=1, heads=1)
        with Run.create(folder / "run", model=model, train=TrainConfig(steps=10**6)) as run:
            for step in range(1, 10**6):
                run.save(step, arrays(step))
                run.prune(2)
                said(step)

    def newest(self, folder):
        from tinylm.run import Run

        with Run.open(folder / "run", write=True) as run:
            step, tensors, _, notes = run.restore()
            return step, tensors, bool(notes), run.path(max(run.steps()))

    def interrupted(self, folder, disturb):
        import tinylm
        from tinylm.live import fit

        data = tinylm.Tokens.from_array(np.random.default_rng(0).integers(0, 64, 9000), vocab=64)
        config = tinylm.TrainConfig(steps=STEPS, batch=4, optimizer="adamw", save_every=0.5)
        make = lambda: tinylm.Transformer(tinylm.ModelConfig(vocab=64, context=32, width=32, layers=2, heads=2))  # noqa: E731
        whole = fit(make(), data, config, view=Silent()).run()
        trainer = tinylm.train(make(), data, config)
        with disturb():
            fit(trainer, view=Silent()).run()
        before = trainer.step
        fit(trainer, view=Silent()).run()
        return before, 0, same(whole.tensors(), trainer.tensors())


class Silent:
    def open(self, trainer):
        pass

    def draw(self, trainer, step, **extras):
        pass

    close = draw


class Orbax:
    needs = "orbax.checkpoint"

    def manager(self, folder):
        import orbax.checkpoint as ocp

        return ocp.CheckpointManager(folder / "run", options=ocp.CheckpointManagerOptions(max_to_keep=2)), ocp

    def saving(self, folder, said):
        manager, ocp = self.manager(folder)
        for step in range(1, 10**6):
            manager.save(step, args=ocp.args.StandardSave(arrays(step)))
            manager.wait_until_finished()
            said(step)

    def newest(self, folder):
        manager, ocp = self.manager(folder)
        step = manager.latest_step()
        like = {k: np.zeros_like(v) for k, v in arrays(0).items()}
        found = manager.restore(step, args=ocp.args.StandardRestore(like))
        return step, {k: np.asarray(v) for k, v in found.items()}, False, folder / "run" / str(step)

    def interrupted(self, folder, disturb):
        """Orbax has no loop: this is the one that its users write, donated buffers and the loss read at each step."""
        import jax
        import optax

        def step_of(state, key):
            x = jax.random.normal(key, (64, 64))

            def loss(w):
                return ((jax.nn.tanh(x @ w["a"]) @ w["b"] - x) ** 2).mean()

            value, grads = jax.value_and_grad(loss)(state[0])
            change, opt = optax.adam(1e-3).update(grads, state[1], state[0])
            return (optax.apply_updates(state[0], change), opt), value

        update = jax.jit(step_of, donate_argnums=0)

        def begin():
            w = {name: jax.random.normal(jax.random.key(i), (64, 64)) for i, name in enumerate("ab")}
            return w, optax.adam(1e-3).init(w)

        state, whole = begin(), begin()
        for i in range(STEPS * 5):
            whole, _ = update(whole, jax.random.key(i))
        done = 0
        try:
            with disturb():
                for i in range(STEPS * 5):
                    state, loss = update(state, jax.random.key(i))
                    float(loss)
                    done = i + 1
        except KeyboardInterrupt:
            pass
        alive = all(not leaf.is_deleted() for leaf in jax.tree.leaves(state))
        lost = 0 if alive else done
        for i in range(done, STEPS * 5) if alive else ():
            state, loss = update(state, jax.random.key(i))
        pairs = zip(*map(jax.tree.leaves, (state, whole)), strict=True) if alive else ()
        return done // 5, lost // 5, alive and all(np.array_equal(a, b) for a, b in pairs)


def torch_model(size):
    import torch

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.w = torch.nn.Parameter(torch.randn(size) * 0.1)

        def forward(self, x=None, labels=None):
            return {
                "loss": ((self.w.mean() * x.float().mean() - labels.float().mean()) ** 2)
                + 1e-4 * self.w.square().mean()
            }

    return Model()


def rows(count=256):
    import torch

    g = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(4, generator=g), "labels": torch.randn(1, generator=g)} for _ in range(count)]


class Trainer:
    needs = "transformers"

    def trainer(self, folder, steps, size=SIZE, save=1, callbacks=()):
        from transformers import Trainer, TrainingArguments

        settings = TrainingArguments(
            str(folder / "run"), max_steps=steps, save_steps=save, save_total_limit=2, report_to=[], disable_tqdm=True,
            per_device_train_batch_size=4, logging_steps=10**6, use_cpu=True, seed=0,
        )  # fmt: skip
        return Trainer(torch_model(size), settings, train_dataset=rows(), callbacks=list(callbacks))

    def saving(self, folder, said):
        from transformers import TrainerCallback

        class Saved(TrainerCallback):
            def on_save(self, args, state, control, **more):
                said(state.global_step)

        self.trainer(folder, 10**6, callbacks=[Saved()]).train()

    def newest(self, folder):
        import torch
        from safetensors.torch import load_file
        from transformers.trainer_utils import get_last_checkpoint

        path = Path(get_last_checkpoint(str(folder / "run")))
        found = {"w": load_file(path / "model.safetensors")["w"].numpy()}
        for i, moments in torch.load(path / "optimizer.pt", weights_only=True)["state"].items():
            found |= {f"{i}.{name}": np.asarray(value) for name, value in moments.items()}
        torch.load(path / "scheduler.pt", weights_only=True)
        assert (path / "trainer_state.json").stat().st_size
        return int(path.name.split("-")[1]), found, False, path

    def interrupted(self, folder, disturb):
        whole = self.trainer(folder / "whole", STEPS, 1000, save=100)
        whole.train()
        from transformers import TrainerCallback

        disturbance = disturb()

        class Begun(TrainerCallback):  # what comes before the first step takes longer than all of them
            def on_step_begin(self, args, state, control, **more):
                if state.global_step == 1 and not hasattr(disturbance, "timer"):
                    disturbance.__enter__()

        trainer = self.trainer(folder / "cut", STEPS, 1000, save=100, callbacks=[Begun()])
        with contextlib.suppress(KeyboardInterrupt):
            trainer.train()
        disturbance.__exit__()
        before = trainer.state.global_step
        found = list((folder / "cut" / "run").glob("checkpoint-*")) if before < STEPS else []
        kept = max((int(p.name.split("-")[1]) for p in found), default=0) if before < STEPS else before
        if before < STEPS:
            trainer.train(resume_from_checkpoint=bool(found))
        return before, before - kept, bool((trainer.model.w == whole.model.w).all())


class Lightning:
    needs = "lightning"

    def trainer(self, folder, steps, save=1, said=None):
        import lightning
        import torch

        class Saved(lightning.pytorch.callbacks.ModelCheckpoint):
            def _save_checkpoint(self, trainer, path):
                super()._save_checkpoint(trainer, path)
                if said:
                    said(trainer.global_step)

        class Module(lightning.LightningModule):
            def __init__(self, size):
                super().__init__()
                self.model = torch_model(size)

            def training_step(self, batch, index):
                return self.model(**batch)["loss"]

            def configure_optimizers(self):
                return torch.optim.Adam(self.parameters(), 1e-3)

        keep = Saved(folder / "run", every_n_train_steps=save, save_top_k=2, monitor="step", mode="max")
        trainer = lightning.Trainer(
            max_steps=steps, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
            callbacks=[keep], default_root_dir=folder,
        )  # fmt: skip
        return trainer, Module, torch.utils.data.DataLoader(rows(), batch_size=4)

    def saving(self, folder, said):
        trainer, module, data = self.trainer(folder, 10**6, said=said)
        trainer.fit(module(SIZE), data)

    def newest(self, folder):
        import torch

        path = max((folder / "run").glob("*.ckpt"), key=lambda p: int(p.stem.rpartition("step=")[2]))
        saved = torch.load(path, weights_only=False)
        found = {"w": saved["state_dict"]["model.w"].numpy()}
        for i, moments in saved["optimizer_states"][0]["state"].items():
            found |= {f"{i}.{name}": np.asarray(value) for name, value in moments.items()}
        return saved["global_step"], found, False, path

    def interrupted(self, folder, disturb):
        trainer, module, data = self.trainer(folder / "whole", STEPS, 100)
        whole = module(1000)
        trainer.fit(whole, data)
        trainer, module, data = self.trainer(folder / "cut", STEPS, 100)
        model = module(1000)
        try:
            with disturb():
                trainer.fit(model, data)
        except (KeyboardInterrupt, SystemExit):
            pass
        before = trainer.global_step
        found = sorted((folder / "cut" / "run").glob("*.ckpt"), key=lambda p: int(p.stem.rpartition("step=")[2]))
        if before < STEPS:
            kept = int(found[-1].stem.rpartition("step=")[2]) if found else 0
            trainer, _, data = self.trainer(folder / "cut", STEPS, 100)
            trainer.fit(model, data, ckpt_path=str(found[-1]) if found else None, weights_only=False)
        else:
            kept = before
        return before, before - kept, bool((model.model.w == whole.model.w).all())


LIBRARIES = {"ours": Ours, "orbax": Orbax, "HF Trainer": Trainer, "Lightning": Lightning}


# --- the three cases --------------------------------------------------------------------------------------------------


def child(name, case, folder, *more):
    command = [sys.executable, __file__, "--child", name, case, str(folder), *map(str, more)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def result(name, case, folder, *more):
    """What a child prints last, or how it ended."""
    process = child(name, case, folder, *more)
    try:
        out, err = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return ["error", "no end within 300 s"]
    lines = [line for line in out.splitlines() if line.startswith("result ")]
    return lines[-1].split()[1:] if lines else ["error", (err.strip().splitlines() or ["?"])[-1][:120]]


def kills(name, count):
    rng, lost, bad, litter = random.Random(1), 0, 0, 0
    for _ in range(count):
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            process, seen = child(name, "saving", folder), 0
            for line in process.stdout:
                if line.startswith("saved "):
                    seen = int(line.split()[1])
                    if seen == 4:
                        break
            time.sleep(rng.random() * 0.8)
            process.kill()
            for line in process.communicate()[0].splitlines():
                seen = int(line.split()[1]) if line.startswith("saved ") and line.endswith(".") else seen
            found = result(name, "newest", folder)
            bad += found[0] == "error" or found[1] != "True"
            lost += found[0] != "error" and int(found[0]) < seen
            names = {path.name for path in folder.rglob("*")}
            litter += any("tmp" in n or "incomplete" in n for n in names)
    return f"{bad} unreadable, {lost} lost an acknowledged step, {litter} left litter (of {count})"


def save_large(folder):
    """Saves for ever; says before and after each."""
    from tinylm.run import Run

    state = training_state()
    with Run.open(folder, write=True) as run:
        for step in range(max(run.steps(), default=0) + 1, 10**6):
            tensors = at_step(state, step)
            print("saving", step, flush=True)
            begun = time.perf_counter()
            run.save(step, tensors)
            print("saved", step, time.perf_counter() - begun, flush=True)
            run.prune(2)


def killed_saves(count):
    """SIGKILL at moments that divide a save's time evenly; after each, what is on the disk, and what opening gives."""
    from tinylm.config import ModelConfig, TrainConfig
    from tinylm.run import Run
    from tinylm.store import LEFTOVER

    def left_over():
        return [path for path in folder.rglob("*") if LEFTOVER.fullmatch(path.name)]

    state, counts = training_state(), dict.fromkeys(("unreadable", "acknowledged lost", "not cleaned"), 0)
    size, shares = sum(value.nbytes for value in state.values()), []
    came = {"before the first byte": 0, "while writing": 0, "all written": 0, "after the rename": 0}
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home) / "run"
        model = ModelConfig(vocab=261, width=8, layers=1, heads=1)
        Run.create(folder, model=model, train=TrainConfig(steps=10**6)).close()
        process = child("ours", "large", folder)
        seconds = [
            float(line.split()[2]) for line, _ in zip(process.stdout, range(12), strict=False) if "saved" in line
        ]
        process.kill()
        process.communicate()
        usual = statistics.median(seconds)
        for number in np.random.default_rng(3).permutation(count):
            process = child("ours", "large", folder)
            step = int(process.stdout.readline().split()[1])  # its first save begins now
            time.sleep(usual * (number + 0.5) / count)
            process.kill()
            acknowledged = step if "saved" in process.communicate()[0] else step - 1
            temporary = [path.stat().st_size for path in left_over() if path.suffix == ".tmp"]
            there = (folder / "checkpoints" / f"step-{step:08d}.safetensors").exists()
            early, whole = not sum(temporary), sum(temporary) > size
            came[list(came)[3 if there else 2 if whole else 0 if early else 1]] += 1
            shares += [temporary[0] / size] if temporary else []
            with Run.open(folder, write=True) as run:
                counts["not cleaned"] += bool(left_over())
                try:
                    newest, tensors, _, notes = run.restore()
                except ValueError:
                    counts["unreadable"] += 1
                    continue
                counts["unreadable"] += bool(notes) or not same(tensors, at_step(state, newest))
                counts["acknowledged lost"] += newest < acknowledged
                run.rewind(newest)
    print(f"{count} kills over a save of {usual:.2f} s ({min(seconds):.2f} to {max(seconds):.2f}), 188 MB:")
    print(
        ", ".join(f"{n} {what}" for what, n in came.items()) + f"; parts written {min(shares):.2f} to {max(shares):.2f}"
    )
    print(", ".join(f"{n} {what}" for what, n in counts.items()))


def flips(name, count):
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        process = child(name, "saving", folder)
        for line in process.stdout:
            if line.startswith("saved 3"):
                break
        process.kill()
        process.communicate()
        return " ".join(result(name, "flips", folder, count))


def flip_here(library, folder, count):
    """In one process: flip a bit of the newest checkpoint, read it, flip it back."""
    _, whole, _, root = library.newest(folder)
    files = [root] if root.is_file() else [path for path in root.rglob("*") if path.is_file()]
    sizes, rng, silent, harmless = [path.stat().st_size for path in files], random.Random(2), 0, 0
    for _ in range(count):
        (path,) = rng.choices(files, sizes)
        at = rng.randrange(path.stat().st_size)
        with flipped(path, at, 1 << rng.randrange(8)), contextlib.suppress(Exception):  # however it says so
            _, found, complained, _ = library.newest(folder)
            harmless += same(found, whole)
            silent += not complained and not same(found, whole)
    return f"{silent} of {count} give other numbers in silence, {harmless} changed nothing"


@contextlib.contextmanager
def flipped(path, at, bit):
    def flip():
        with path.open("r+b") as file:
            file.seek(at)
            (old,) = file.read(1)
            file.seek(at)
            file.write(bytes([old ^ bit]))

    flip()
    yield
    flip()


def interrupts(name, count):
    exact, lost, failed = 0, [], 0
    for number in range(count):
        with tempfile.TemporaryDirectory() as folder:
            found = result(name, "interrupted", folder, number)
        if found[0] == "error":
            failed += 1
        elif 0 < int(found[0]) < STEPS:
            exact += found[2] == "True"
            lost.append(int(found[1]))
    total = len(lost) + failed
    return f"{exact} of {total} go on bit for bit, up to {max(lost, default=0)} of {STEPS} steps lost, {failed} errors"


def disturbance(seed):
    """A context in which Ctrl-C comes at a random moment, as in a cell that blocks."""

    class Disturb:
        def __enter__(self):
            wait = 0.05 + random.Random(seed).random() * 0.3
            self.timer = threading.Timer(wait, os.kill, (os.getpid(), signal.SIGINT))
            self.timer.start()

        def __exit__(self, *_):
            self.timer.cancel()

    return Disturb


def run_child(name, case, folder, *more):
    warnings.simplefilter("ignore")
    library, folder = LIBRARIES[name](), Path(folder)
    if case == "saving":
        library.saving(folder, lambda step: print(f"saved {step} .", flush=True))
    elif case == "newest":
        step, found, _, _ = library.newest(folder)
        print("result", step, "a" not in found or same(found, arrays(step)))
    elif case == "large":
        save_large(folder)
    elif case == "flips":
        print("result", flip_here(library, folder, int(more[0])))
    else:
        print("result", *library.interrupted(folder, disturbance(int(more[0]))))


def soak(steps):
    """Memory and step time of a long run of a micro model."""
    import tinylm

    data = tinylm.Tokens.from_array(np.random.default_rng(0).integers(0, 64, 9000), vocab=64)
    model = tinylm.Transformer(tinylm.ModelConfig(vocab=64, context=32, width=32, layers=2, heads=2))
    config = tinylm.TrainConfig(steps=steps, batch=4, optimizer="adamw", log_every=100)
    with tempfile.TemporaryDirectory() as folder:
        times, cpu, memory, files, then = [], [], {}, {}, (time.perf_counter(), time.process_time())
        for step in tinylm.train(model, data, config, out=Path(folder) / "run"):
            now = time.perf_counter(), time.process_time()
            times.append((now[0] - then[0]) * 10)
            cpu.append((now[1] - then[1]) * 10)
            then = now
            if step.step % (steps // 10) == 0:
                gc.collect()
                memory[step.step] = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6
                files[step.step] = len(os.listdir("/proc/self/fd"))
        log = (Path(folder) / "run" / "run.jsonl").stat().st_size / 1e6
    tenth = len(times) // 10
    for what, spent in (("wall", times), ("CPU", cpu)):
        first, last = statistics.median(spent[1 : tenth + 1]), statistics.median(spent[-tenth:])
        print(f"{what}: {first:.2f} ms a step in the first tenth of {steps}, {last:.2f} in the last (medians)")
    print("memory, MB:", ", ".join(f"{step}: {mb:.1f}" for step, mb in memory.items()))
    print(f"open files {min(files.values())} to {max(files.values())}, log {log:.1f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--flips", type=int, default=40)
    parser.add_argument("--interrupts", type=int, default=10)
    parser.add_argument("--only", default=",".join(LIBRARIES))
    parser.add_argument("--soak", type=int)
    parser.add_argument("--killed-saves", type=int)
    parser.add_argument("--child", nargs="+")
    args = parser.parse_args()
    if args.child:
        return run_child(*args.child)
    if args.soak:
        return soak(args.soak)
    if args.killed_saves:
        return killed_saves(args.killed_saves)
    for name in args.only.split(","):
        if importlib.util.find_spec(LIBRARIES[name].needs.partition(".")[0]) is None:
            print(f"{name}: not installed")
            continue
        cases = {
            "kill -9": (kills, args.kills),
            "one bit": (flips, args.flips),
            "Ctrl-C": (interrupts, args.interrupts),
        }
        for case, (call, count) in cases.items():
            if count:
                print(f"{name:<11} {case:<12} {call(name, count)}", flush=True)


if __name__ == "__main__":
    main()
