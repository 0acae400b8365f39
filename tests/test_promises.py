"""Every promise has a test in the ordinary run, and README's table says which."""

import re
import tomllib

import promises
import pytest

ROOT = promises.TESTS.parent


@pytest.fixture(scope="module")
def held():
    return promises.asserting()


def test_every_promise_is_asserted(held):
    assert set(held) == set(promises.PROMISES) == set(range(1, 31))
    for number, tests in held.items():
        assert len(set(tests)) == len(tests)
        assert any(not slow for *_, slow in tests) or number == 19, f"P{number} is asserted by slow tests alone"


def test_every_tag_is_read(held):
    """A tag in another place or form would count for nothing."""
    tags = re.compile(r"# P\d+(, P\d+)*$", re.MULTILINE)
    written = sum(
        len(re.findall(r"P\d+", tag[0]))
        for p in promises.TESTS.glob("test_*.py")
        for tag in tags.finditer(p.read_text())
    )
    assert written == sum(map(len, held.values()))


def test_the_table_in_readme_is_the_tests(held, monkeypatch):
    monkeypatch.setattr(promises, "asserting", lambda: held)
    assert promises.README.read_text(encoding="utf-8") == promises.written(), "python tests/promises.py --write"


def parts(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)]


def test_the_constraints_fit_the_lowest_versions_and_name_no_place():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    lines = [x for x in (ROOT / "constraints.txt").read_text().splitlines() if not x.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[\w.]+", line) for line in lines)
    pinned = dict(line.split("==") for line in lines)
    assert list(pinned) == sorted(pinned)
    for wanted in [*project["dependencies"], *extras["notebooks"], *extras["onnx"], *extras["hub"], *extras["test"]]:
        name, _, least = wanted.partition(">=")
        assert parts(pinned[name.replace("_", "-").lower()]) >= parts(least), wanted
