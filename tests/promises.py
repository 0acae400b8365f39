"""Thirty promises, and the tests that hold them: a test says `# P4` at the end of the line its signature ends with.

`python tests/promises.py` prints the table of README.md; `--write` puts it there.
"""

import ast
import collections
import re
import sys
from pathlib import Path

TESTS = Path(__file__).parent
README = TESTS.parent / "README.md"
BEGIN, END = "<!-- promises: python tests/promises.py --write -->", "<!-- end of promises -->"
PROMISES = {
    1: "kill -9 at any moment costs at most the last interval; the resumed run is the undisturbed one, bit for bit",
    2: "a checkpoint is there whole or not at all, whatever operation fails; a save that returned survives a power cut",
    3: "stopping and resuming at any step changes no bit, with dropout, accumulation and schedules",
    4: "a changed, missing or added byte is found; the newest sound checkpoint is taken, the damaged one is kept",
    5: "a full or failing disk ends no run and loses no line of its log; a save that was asked for says so",
    6: "Ctrl-C, SIGTERM and SIGHUP end the step, save it, and give 130, 143, 129; a second one acts at once",
    7: "one process writes a run, others are told which; a dead one blocks nobody; readers need no lock",
    8: "cleaning up never takes the newest sound checkpoint, a damaged one, or a file that is not ours",
    9: "saving takes at most one percent of the time, however slow the disk",
    10: "another shape, type, setting, tokenizer, data set or newer format is refused, with the first ten differences",
    11: "the same machine gives the same bits; on another, resuming names what differs",
    12: "a loss or gradient that is not finite never reaches the weights or a file",
    13: "losses that stand out are in the log",
    14: "a batch is a function of seed and step; every row once per epoch; changed data is refused",
    15: "memory and open files do not grow with the steps",
    16: "running a notebook's cells again compiles nothing and leaves nothing open",
    17: "an interrupt at any moment leaves a whole state of one step, and training goes on from it bit for bit",
    18: "with `await fit(...)` a Stop button works while training",
    19: "a killed kernel costs what a killed process does: one call goes on",
    20: "no display, or a broken one, changes no bit of the training",
    21: "at most four drawings a second and one percent of the time; a saved notebook stays below 200 KB",
    22: "an error in data, tracker, validation or disk reaches the caller; nothing is caught in silence",
    23: "text that is shown is inert: no markup, no control codes, whoever wrote it",
    24: "looking inside changes nothing, and what was handed out stays as it was",
    25: "bad text, ids and data sets give one message that says where; never NaN, never a hang",
    26: "tokenizers are byte-exact, special tokens never come from text, no bad tokenizer.json reaches the library",
    27: "a hostile file is refused before memory is taken for what it claims",
    28: "loading runs no code, writes nothing, asks nobody, follows no path",
    29: "the same model gives the same file, and the engine the same tokens on any number of threads",
    30: "each guard, taken away, makes a test fail",
}


def asserting() -> dict[int, list[tuple[str, str, bool]]]:
    """Promise -> (file, test, whether all of it is `slow`) of each test that says it asserts it."""
    found = collections.defaultdict(list)
    for path in sorted(TESTS.glob("test_*.py")):
        text = path.read_text(encoding="utf-8")
        lines, tree = text.splitlines(), ast.parse(text)
        marks = [ast.unparse(node) for node in tree.body if isinstance(node, ast.Assign)]
        whole = "pytestmark = pytest.mark.slow" in marks
        for test in (n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name.startswith("test_")):
            slow = whole or any(ast.unparse(d) == "pytest.mark.slow" for d in test.decorator_list)
            for line in lines[test.lineno - 1 : test.body[0].lineno]:
                if said := re.search(r":  # (P\d+(?:, P\d+)*)$", line):
                    for number in re.findall(r"\d+", said[1]):
                        found[int(number)].append((path.stem, test.name, slow))
                    break
    return found


def table() -> str:
    """The table of README.md."""
    rows = ["| | promise | tests |", "|---|---|---|"]
    held = asserting()
    for number, promise in PROMISES.items():
        files = collections.Counter(file.removeprefix("test_") for file, _, slow in held[number] if not slow)
        names = ", ".join(f"{file} {count}" for file, count in sorted(files.items()))
        slow = sum(slow for *_, slow in held[number])
        names += f"{'; ' if names else ''}slow {slow}" if slow else ""
        rows.append(f"| P{number} | {promise} | {names} |")
    return "\n".join(rows)


def written() -> str:
    """README.md with the table as it should be."""
    before, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        README.write_text(written(), encoding="utf-8")
    else:
        print(table())
