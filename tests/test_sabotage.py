"""P30: the tests are tested. One guard at a time is taken out of the kit's own source, and a named test has to fail.

A sabotage is a function, some of its text, and what to put there instead; where the text is no longer there, the guard
has changed and this table has to follow.
"""

import functools
import importlib
import inspect
import signal
import sys
import textwrap
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
import test_checkpoint
import test_data
import test_engine_file
import test_faults
import test_health
import test_live
import test_loading
import test_run
import test_show
import test_store
import test_tokenizer

from tinylm import step, training
from tinylm.engine import file as engine_file
from tinylm.live import Watch
from tinylm.store import write_file
from tinylm.tokenizer import Tokenizer


def sabotage(patch, target, *changes):
    """Replace `module:name`, wherever the kit and its tests have it, by one whose source is changed."""
    module_name, _, path = target.partition(":")
    module = importlib.import_module(f"tinylm.{module_name}")
    *owners, name = path.split(".")
    holder = functools.reduce(getattr, owners, module)
    real = vars(holder)[name]
    source = textwrap.dedent(inspect.getsource(real.fget if isinstance(real, property) else real))
    for old, new in changes:
        assert old in source, f"{target} holds no {old!r} any more: adapt this table to the guard as it is now"
        source = source.replace(old, new)
    made = {}
    exec(compile(source, f"<{target}, sabotaged>", "exec"), vars(module), made)
    patch.setattr(holder, name, made[name])
    for other in [m for n, m in sys.modules.items() if n.startswith(("tinylm", "test_")) and m is not None]:
        if vars(other).get(name) is real:
            patch.setattr(other, name, made[name])


def fresh(cached):
    """A cache of its own, where the function has one."""
    return functools.lru_cache(cached.__wrapped__) if hasattr(cached, "__wrapped__") else cached


class Make:
    """What the tests' own fixtures would give."""

    def __init__(self, tmp_path, patch):
        self.tmp_path, self.patch = tmp_path, patch

    @property
    def path(self):
        path = self.tmp_path / "a.safetensors"
        write_file(path, test_store.SAMPLE, {"step": 3, "deep": {"x": [1, 2.5, None]}})
        return path

    @property
    def run(self):
        return test_run.create(self.tmp_path / "run")

    @property
    def sound(self):
        return engine_file.write(self.tmp_path / "s.tlm", test_engine_file.CONSTANTS, test_engine_file.tensors())

    @functools.cached_property
    def digests(self):
        return reference()


@functools.cache
def reference():
    """Of an undisturbed run; made once, before anything is taken away."""
    trainer = test_health.new()
    return {0: test_health.digest(trainer)} | {step.step: test_health.digest(trainer) for step in trainer}


# --- small checks where no test of another file is small enough -------------------------------------------------------


def check_resume(make):
    test_health.check_signal(signal.SIGINT, "batch", make.digests, make.tmp_path)


def check_interrupt(make):
    old = {n: signal.signal(n, signal.default_int_handler) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        for number in old:
            test_health.check_signal(number, "caller", make.digests, make.tmp_path / str(number))
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def check_weights_handed_out(make):
    from tinylm.weights import named

    trainer, taken = test_health.new(log_every=2), []
    for _ in trainer:
        taken += [(value, np.array(value)) for value in named(trainer.model).values()]
    assert all((np.asarray(live) == copy).all() for live, copy in taken)


def check_one_program(make):
    list(test_health.new(steps=1))
    one, two = test_health.new(steps=1).update, test_health.new(steps=1, learning_rate=0.5, seed=7).update
    assert one is two


def check_same_bytes(make):
    for name, reverse in (("one", False), ("two", True)):
        write_file(make.tmp_path / name, dict(sorted(test_store.SAMPLE.items(), reverse=reverse)), {})
    assert (make.tmp_path / "one").read_bytes() == (make.tmp_path / "two").read_bytes()


def check_broken_display(make):
    trainer = SimpleNamespace(model=SimpleNamespace(tokenizer=None), outcome="done", step=1)
    broken = SimpleNamespace(open=lambda t: 1 / 0, draw=lambda t, s, **k: 1 / 0, close=lambda t, s, **k: 1 / 0)
    with Watch(trainer, broken) as watch:
        watch.look(SimpleNamespace(step=1))
    assert watch.errors == 3


def check_special_tokens(make):
    tokenizer = Tokenizer.train(["abc <|mask|>"], vocab=270)
    assert min(tokenizer.encode("a <|mask|> b")) >= 5


def known_bad(reason):
    make = next(make for why, make in test_tokenizer.KNOWN_BAD if why == reason)
    return lambda m: test_tokenizer.test_known_bad_files_are_refused_by_name(reason, make, m.patch)


def shown(start):
    payload = next(text for text in test_show.PAYLOADS if text.startswith(start))
    return lambda m: test_show.test_text_is_inert_in_every_display(payload)


# --- the table --------------------------------------------------------------------------------------------------------

# promise, what is taken away: where, what, instead of it; what must fail then
SABOTAGES = {
    "P1 the log is not cut back": (
        "run:Run.rewind", [("if len(kept) < len(lines):", "if False:")],
        lambda m: test_run.test_rewind_sets_the_future_aside(m.run),
    ),
    "P2 no fsync": (
        "store:replacing", [("os.fsync(file)", "pass")],
        lambda m: test_faults.test_a_save_is_fsync_then_rename_then_fsync_of_the_folder(m.tmp_path),
    ),
    "P2 no fsync of the folder": (
        "store:replacing", [("sync_folder(path.parent)", "pass")],
        lambda m: test_faults.test_a_save_is_fsync_then_rename_then_fsync_of_the_folder(m.tmp_path),
    ),
    "P2 written in place": (
        "store:replacing", [('leftover(path.parent, "tmp")', "path"), ("os.O_EXCL", "os.O_TRUNC")],
        lambda m: test_store.test_an_interrupt_leaves_no_litter(m.path, m.patch),
    ),
    "P3 one leaf of the state dropped": (
        "training:Trainer.adopt", [("jnp.array(tensors[name])", "jnp.array(tensors[name] * ('.nu.' not in name))")],
        check_resume,
    ),
    "P3 data one step on": (
        "training:Trainer.adopt", [('= int(tensors["step"])', '= int(tensors["step"]) + 1')], check_resume,
    ),
    "P4 no hash check": (
        "store:_read", [("if digest.hexdigest().encode() != head[SLOT]:", "if False:")],
        lambda m: test_store.test_three_thousand_damaged_files_are_all_refused(m.path),
    ),
    "P4 changed settings are believed": (
        "folder:require_unchanged", [("if seal_broken(config):", "if False:")],
        lambda m: test_loading.test_every_changed_bit_of_a_run_s_settings_is_found(m.tmp_path),
    ),
    "P4 names of checkpoints are believed": (
        "run:Run._check_step", [('if metadata.get("step") != step:', "if False:")],
        lambda m: test_run.test_a_renamed_checkpoint_is_not_believed(m.run),
    ),
    "P5 half a line stays in the log": (
        "run:Run._write_log", [("os.ftruncate(file, before)", "pass")],
        lambda m: test_run.test_a_short_write_leaves_no_half_line_and_loses_none(m.run, m.patch),
    ),
    "P5 no look at the room that is left": (
        "store:replacing", [("if room is not None and room < size:", "if False:")],
        lambda m: test_store.test_a_full_disk_is_noticed_before_writing(m.path, m.patch),
    ),
    "P6 one signal guarded of three": (
        "training:Interrupt.__enter__", [("(signal.SIGINT, signal.SIGTERM,", "(signal.SIGINT,")], check_interrupt,
    ),
    "P7 no lock": (
        "folder:Lock.__init__", [("fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)", "pass")],
        lambda m: test_run.test_reading_needs_no_lock_and_writing_needs_it(m.run),
    ),
    "P7 a replaced lock is believed": (
        "folder:Lock.require", [("if not os.path.samestat", "if False and not os.path.samestat")],
        lambda m: test_loading.test_a_deleted_lock_leaves_one_writer(m.tmp_path),
    ),
    "P8 deleted before the new one is there": (
        "run:Run.save", [("self._sync_log()", "self._sync_log(); [os.unlink(self.path(s)) for s in self.steps()]")],
        lambda m: test_run.test_a_failed_save_keeps_last_saved_step_true(m.run, m.patch),
    ),
    "P8 damaged ones count and go": (
        "run:Run.prune", [(" if self._is_sound(step)]", "]")],
        lambda m: test_run.test_prune_keeps_the_newest_sound_ones_and_all_damaged_ones(m.run),
    ),
    "P9 saving whatever it costs": (
        "training:Trainer._save_is_due", [("max(self.config.save_every, 100 * self._save_cost)", "0.0")],
        lambda m: test_health.test_saving_takes_one_percent_of_the_time(m.patch, m.tmp_path),
    ),
    "P10 no comparison of names and shapes": (
        "checkpoint:require_match", [("if wrong := differences(expected, found):", "if False:")],
        lambda m: test_checkpoint.test_the_first_ten_differences_are_listed_together(),
    ),
    "P11 another machine goes unnoticed": (
        "run:Run.changes", [("if then.get(n) != now.get(n)", "if False")],
        lambda m: test_health.check_circumstances(m.tmp_path),
    ),
    "P12 no guard against NaN": (
        "step:step_of", [("jnp.where(halted, a, b)", "b")], lambda m: test_health.check_poisons(4),
    ),
    "P13 spikes measured with what is not finite": (
        "step:spikes", [("np.isfinite(recent)", "np.ones(len(recent), bool)")],
        lambda m: test_health.test_spikes_are_found_and_nothing_else(0),
    ),
    "P14 rows are drawn, not dealt": (
        "data:permute", [("todo = np.flatnonzero(out >= n)", "out %= np.uint64(n); todo = []")],
        lambda m: test_data.test_each_epoch_visits_each_window_once(7, 3),
    ),
    "P16 each trainer compiles its own": (
        "step:compiled_update", [("@functools.lru_cache(maxsize=32)", "#")], check_one_program,
    ),
    "P17 no guard against Ctrl-C": (
        "training:Interrupt.__enter__", [("is threading.main_thread()", "is None")], check_interrupt,
    ),
    "P17 what is handed out is no copy": (
        "training:Trainer.sync", [("copies(params if", "(params if")], check_weights_handed_out,
    ),
    "P20 display errors are raised": (
        "live:Watch._guarded", [("except Exception as error:", "except KeyError as error:")], check_broken_display,
    ),
    "P21 drawn at every step": (
        "live:Watch.look", [("now + max(UPDATES, spent / DRAWING)", "now")],
        lambda m: test_live.test_drawing_is_rare_and_cheap(0.001, m.patch),
    ),
    "P23 no escaping": (
        "markup:esc", [("html.escape(visible(text), quote=True)", "visible(text)")], shown("<script>"),
    ),
    "P23 controls pass": (
        "markup:esc", [("html.escape(visible(text), quote=True)", "html.escape(str(text), quote=True)")],
        shown("\x1b["),
    ),
    "P25 ids are not checked": (
        "shards:check_tokens", [("if low < 0 or high >= vocab:", "if False:")],
        lambda m: test_data.test_check_tokens(),
    ),
    "P26 ids of a vocabulary are believed": (
        "vocabulary:_numbers", [("wrong is None,", "True,")], known_bad("ids must be"),
    ),
    "P26 any pattern goes to the library": (
        "vocabulary:_allowed", [('if rule == "known":', 'if rule == "known": return True\n    if False:')],
        known_bad("Split.pattern"),
    ),
    "P27 claims are believed before memory is taken": (
        "store:_layout", [("if end != data:", "if False:")],
        lambda m: test_store.test_allocation_follows_the_file_not_its_claims(m.tmp_path),
    ),
    "P27 no checksums of the engine's file": (
        "engine.file:read", [("crc32c(data[CHECKED:]) != crc or digest.digest() != begin[CHECKED:HASHED]", "False")],
        lambda m: test_engine_file.test_every_damaged_byte_is_found(m.sound, m.tmp_path),
    ),
    "P27 whatever is there is read to its end": (
        "reading:regular", [("if not stat.S_ISREG(status.st_mode):", "if False:"), ("stream.read()", "stream.read(9)")],
        lambda m: test_loading.test_what_hangs_or_never_ends_is_refused_at_once(test_loading.endless, m.tmp_path),
    ),
    "P28 a link is written through": (
        "folder:Lock.__init__", [("| os.O_NOFOLLOW", "")],
        lambda m: test_loading.test_a_writer_follows_no_link_out_of_its_folder(m.tmp_path),
    ),
    "P28 a neighbour is read": (
        "folder:read_config",
        [('path = folder / "config.json"', 'path = folder / "config.json"; (folder / "json.py").read_bytes()')],
        lambda m: test_loading.check_a_folder(m.tmp_path),
    ),
    "P29 tensors as they come": (
        "store:write_file", [("sorted(arrays, key=lambda name: (-arrays[name].itemsize, name))", "list(arrays)")],
        check_same_bytes,
    ),
}  # fmt: skip
# Wrong calls of a test would look like failures of it.
NOT_RED = (TypeError, NameError, ImportError, SyntaxError)


@pytest.fixture
def make(tmp_path, monkeypatch):
    return Make(tmp_path, monkeypatch)


def test_there_are_enough():
    assert len(SABOTAGES) >= 25


@pytest.mark.parametrize("name", SABOTAGES)
def test_without_its_guard_a_test_fails(name, make):  # P30
    target, changes, check = SABOTAGES[name]
    if check in (check_resume, check_interrupt):
        make.digests  # the undisturbed run, before anything is taken away
    with pytest.MonkeyPatch.context() as patch:
        sabotage(patch, target, *changes)
        if "compiled" in target or "step_of" in target:  # what was compiled with the guard must not stand in for it
            patch.setattr(step, "compiled_update", fresh(step.compiled_update))
            patch.setattr(training, "compiled_update", step.compiled_update)
        with pytest.raises((Exception, pytest.fail.Exception, KeyboardInterrupt, SystemExit)) as red:
            check(make)
    tracemalloc.stop()  # a test that failed may have left it on
    assert not isinstance(red.value, NOT_RED), red.value


@pytest.mark.slow
@pytest.mark.parametrize("name", SABOTAGES)
def test_with_its_guard_it_passes(name, make):  # P30
    SABOTAGES[name][2](make)


def test_every_promise_that_has_a_guard_loses_it_once():
    named = {name.split()[0] for name in SABOTAGES}
    others = {
        "P15": "a leak is no missing line",
        "P18": "the Stop button is there or not",
        "P19": "that of P1, with another process killed",
        "P22": "any swallowed error is a line too many",
        "P24": "pure functions: there is nothing to take away",
        "P30": "this file",
    }
    assert named | others.keys() == {f"P{n}" for n in range(1, 31)}
    assert not named & others.keys()
