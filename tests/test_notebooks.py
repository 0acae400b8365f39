"""Every notebook: kept without outputs, short, one question; and it runs, on a small budget, into an inert page."""

import json
import os
import re
import warnings
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tinylm import native
from tinylm.markup import ATTRIBUTES, TAGS

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
LARGEST = 200_000  # bytes of an executed notebook: see P21 of the reliability contract
# Of training; none of the figures depends on it, only how good they are.
SECONDS = {"01_train_a_storyteller": 5, "02_one_point_five_eight_bits": 5, "03_a_committee_of_one_layer_minds": 4}
SECONDS |= {"04_memories": 6, "05_codebooks": 4, "06_the_bigram_inside": 4, "07_look_inside": 4}
SECONDS |= {"08_int8_on_a_cpu": 4, "09_adapters": 3}


def named(path):
    return path.stem


@pytest.fixture(params=NOTEBOOKS, ids=named)
def notebook(request):
    return request.param


def require_what_it_needs(path):
    if path.stem == "08_int8_on_a_cpu" and not native.available():
        pytest.skip("the native engine is not built: NumPy would take minutes")


def test_there_are_notebooks():
    assert (FOLDER / "01_train_a_storyteller.ipynb") in NOTEBOOKS


def test_outputs_are_stripped(notebook):
    raw = json.loads(notebook.read_text())
    for cell in raw["cells"]:
        assert cell.get("outputs", []) == []
        assert cell.get("execution_count") is None
    assert "widgets" not in raw["metadata"]
    assert set(raw["metadata"]) <= {"kernelspec", "language_info"}
    assert set(raw["metadata"]["language_info"]) == {"name"}  # no version: it would differ on every machine
    assert notebook.stat().st_size < 40_000


def test_it_asks_a_question_first_and_keeps_cells_short(notebook):
    cells = json.loads(notebook.read_text())["cells"]
    assert cells[0]["cell_type"] == "markdown"
    assert "?" in "".join(cells[0]["source"])
    assert all(len("".join(c["source"]).splitlines()) <= 16 for c in cells if c["cell_type"] == "code")
    assert all(c["cell_type"] == "markdown" for c in cells[:1])


def test_it_names_no_place_of_this_machine(notebook):
    assert not re.search(r"/(work|tmp|opt|home|root)/", notebook.read_text())


class Page(HTMLParser):
    """Collects what does not belong into a static picture."""

    def __init__(self, markup):
        super().__init__()
        self.wrong = []
        self.feed(markup)

    def handle_starttag(self, name, attrs):
        if name not in {t.lower() for t in TAGS}:
            self.wrong.append(name)
        self.wrong += [k for k, _ in attrs if k not in {a.lower() for a in ATTRIBUTES}]


def execute(path, tmp_path, seconds):
    """Run a notebook in a kernel of its own; returns it with outputs. Raises nbclient's CellExecutionError."""
    import nbformat
    from nbclient import NotebookClient

    book = nbformat.read(path, as_version=4)
    source = str(FOLDER.parent)
    env = {**os.environ, "TINYLM_BUDGET": str(seconds), "PYTHONWARNINGS": "default", "TMPDIR": str(tmp_path)}
    env["PYTHONPATH"] = os.pathsep.join([source, env.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the notebook machinery, which is not ours
        client = NotebookClient(
            book, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
        )
        client.execute(env=env)
    return book


def the_storyteller(text):
    """Above the floor, inside its interval, exact where it says so."""
    floor = float(re.search(r"The floor is ([\d.]+) bits per byte", text)[1])
    score = re.search(r"^([\d.]+) bits per byte \(95%.*: ([\d.]+) to ([\d.]+)\)", text, re.M)
    score, low, high = map(float, score.groups())
    above = float(re.search(r"([\d.]+) above the floor: ", text)[1])
    assert floor < low <= score <= high < 4
    assert above == pytest.approx(score - floor, abs=0.002)
    assert text.count("True") == 2  # a stop changed no loss; the loaded model tells the same story


def the_bits(text):
    """What was trained in three values is written in them, and nothing else; int8 costs next to nothing.

    That training costs less than rounding does not show in seconds: `tests/bench/quantization.py` is about that.
    """
    assert re.search(r"Trained so: [+-][\d.]+ with the mean", text)
    int8, share = re.search(r"And the floats in int8: ([+-][\d.]+) in (\d+)% of them", text).groups()
    assert abs(float(int8)) < 0.02
    assert int(share) < 35
    assert "with these weights: [(-1, 0, 1)]" in text
    assert "the same numbers after loading: True" in text


def the_memories(text):
    """A branch that is taken out takes its facts with it, and changes nothing elsewhere."""
    assert "every other log-probability is the same: True" in text
    before, after = map(int, re.search(r"blocked: (\d+)% of its facts become (\d+)%", text).groups())
    assert after <= before


def the_engine(text):
    """int8 costs next to nothing, and a guess changes no letter."""
    bits = {name: float(b) for name, b in re.findall(r"^(float32|int8|ternary)\S*.*\s(\d+\.\d{4})$", text, re.M)}
    assert abs(bits["int8"] - bits["float32"]) < 0.02
    assert bits["ternary"] > bits["float32"]
    assert re.search(r"^int8 costs [+-]0\.0[01]\d+ bits per byte", text, re.M)
    assert "True" in text


def the_adapters(text):
    """Thin products learn something, and folding them in changes nothing."""
    assert float(re.search(r"largest difference of a logit: (\S+)", text)[1]) < 1e-3
    gained = [float(g) for g in re.findall(r": (-?[\d.]+) gained there", text)]
    assert len(gained) == 4
    assert min(gained[0], gained[3]) > 0


ANSWERS = {
    "01_train_a_storyteller": the_storyteller,
    "02_one_point_five_eight_bits": the_bits,
    "04_memories": the_memories,
    "08_int8_on_a_cpu": the_engine,
    "09_adapters": the_adapters,
}


@pytest.mark.filterwarnings("ignore")
def test_it_runs_and_answers_its_question(notebook, tmp_path):  # P20, P21
    import nbformat

    require_what_it_needs(notebook)
    book = execute(notebook, tmp_path, SECONDS.get(notebook.stem, 10))
    assert len(nbformat.writes(book)) < LARGEST
    shown = [output for cell in book.cells for output in cell.get("outputs", [])]
    assert [o for o in shown if o.output_type == "error"] == []
    assert [o.text for o in shown if o.output_type == "stream" and o.name == "stderr"] == []
    pictures = [o.data["text/html"] for o in shown if "text/html" in o.get("data", {})]
    assert any("<svg" in picture for picture in pictures)
    assert [w for picture in pictures for w in Page(picture).wrong] == []
    # What is kept needs no kernel: no widget is left, and every picture has a text beside it.
    assert not any("application/vnd.jupyter.widget-view+json" in o.get("data", {}) for o in shown)
    assert all("text/plain" in o.data for o in shown if "data" in o)
    text = "\n".join(o.get("text", "") or o.get("data", {}).get("text/plain", "") for o in shown)
    if notebook.stem in ANSWERS:
        ANSWERS[notebook.stem](text)
        assert "False" not in text
