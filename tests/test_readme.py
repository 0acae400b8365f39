"""README keeps its word: its Python tour runs, its two commands are there, its table of rooms is complete."""

import re
import shlex
from pathlib import Path

from tinylm import cli

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()


def test_the_tour_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tour, technique = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    for part in (tour, technique):
        exec(compile(part, "README.md", "exec"), {"__name__": "__main__"})
    said = capsys.readouterr().out
    assert re.search(r"loss \d\.\d+", said)
    assert "bits/byte [" in said
    assert re.search(r"\(1, \d+, \d+, \d+\)", said)
    assert "'blocks.0.mlp.down.gain'" in said


def test_both_commands_are_there():
    commands = re.findall(r"^    (python3 -m venv .*)$", TEXT, re.M)
    assert len(commands) == 2
    assert commands[0].endswith(".venv/bin/tinylm story")
    assert ".venv/bin/python -m pytest" in commands[1]
    for command in commands:
        assert shlex.split(command)


def test_every_room_is_in_the_table():
    rooms = {p.stem if p.is_file() else p.name for p in (ROOT / "tinylm").iterdir() if not p.name.startswith("__")}
    table = TEXT.partition("| room |")[2].partition("\n\n")[0]
    assert set(re.findall(r"`(\w+)/?`(?=[,| ])", table)) >= rooms


def test_every_command_is_listed():
    (commands,) = (
        action.choices for action in cli.build_parser()._actions if action.dest == "command" or action.choices
    )
    for name in commands:
        assert re.search(rf"^    tinylm {name}\b", TEXT, re.M), name
