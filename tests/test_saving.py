"""Pictures as files, and the page about a run: standing alone, inert, with the figures that were drawn."""

import csv
import io
import json
import re
import shutil
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest

import tinylm
from tinylm import probe, reporting, show
from tinylm.classification import pictures
from tinylm.cli import main
from tinylm.config import ConfigError, ModelConfig, TrainConfig
from tinylm.evaluation import evaluate, evaluate_floor
from tinylm.markup import Picture, drawing, lines_of, table_of
from tinylm.store import CheckpointDamaged
from tinylm.yardsticks import EvaluationError

PAYLOADS = ["</svg><script>alert(1)</script>", "a & b < c", "‮x", '"><img src=x onerror=alert(1)>', "]]>"]
SVG = "{http://www.w3.org/2000/svg}"


def drawn(text):
    bars = show.bars({text: 2.0, "b": 1.0}, unit=text, strong=["b"], floor=0.5)
    matrix = probe.heat_map(np.eye(3), rows=[text, "b", "c"], title=text)
    confusion = pictures.confusion_map(np.arange(9).reshape(3, 3), [text, "b", "c"], text)
    return [bars, matrix, confusion, show.table([[text, 1]], ["name", text]), show.sample(text)]


# --- one picture ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", PAYLOADS, ids=ascii)
def test_a_drawing_is_a_file_of_its_own_and_inert(text, tmp_path):  # P23
    for i, picture in enumerate(drawn(text)):
        tree = ET.parse(picture.save(tmp_path / f"{i}.svg")).getroot()
        assert tree.tag == f"{SVG}svg"
        assert {element.tag.removeprefix(SVG) for element in tree.iter()} <= {
            "svg",
            "title",
            "text",
            "rect",
            "path",
            "line",
        }
        assert not [key for element in tree.iter() for key in element.attrib if key.startswith("on") or "href" in key]
        assert float(tree.get("width")) > 20
        assert float(tree.get("height")) > 20
        page = picture.save(tmp_path / f"{i}.html", title=text).read_text()
        assert "<script" not in page
        assert "<img" not in page
        assert "default-src 'none'" in page


def test_drawings_stand_side_by_side_and_wrap():
    small = '<svg viewBox="0 0 10 20" style="width:300px">{}</svg>'
    tree = ET.fromstring(drawing(small.format("<rect/>") * 3, ""))
    boxes = [tuple(float(inner.get(key)) for key in ("x", "y", "width", "height")) for inner in tree]
    assert boxes == [(0, 0, 300, 600), (312, 0, 300, 600), (0, 612, 300, 600)]
    assert (float(tree.get("width")), float(tree.get("height"))) == (612 + 24, 1212 + 24)


def test_words_alone_are_drawn_as_their_lines():
    about, inside = lines_of("one\ntwo  three")
    tree = ET.fromstring(f"<svg{about}>{inside}</svg>")
    assert [line.text for line in tree] == ["one", "two\xa0\xa0three"]


def test_the_figures_behind_it_come_as_csv(tmp_path):
    bars = show.bars({"a": 1.25, "b": 1 / 3}, unit="bits", floor=0.1)
    rows = list(csv.reader(bars.save(tmp_path / "a.csv").read_text().splitlines()))
    assert rows == [["", "bits"], ["a", "1.25"], ["b", repr(1 / 3)], ["the floor", "0.1"]]
    matrix = probe.heat_map(np.array([[1.0, np.nan], [0.5, -2.0]]), rows=["r", "s"], columns=["c", "d"])
    assert list(csv.reader(matrix.save(tmp_path / "m.csv").read_text().splitlines())) == [
        ["", "c", "d"],
        ["r", "1.0", "nan"],
        ["s", "0.5", "-2.0"],
    ]
    lines = [show.Line([1, 2], [3.0, 4.0], "up"), show.Line([5], [6.0])]
    found = show.points(lines, [show.Level(0.5, "floor")], x_label="step", y_label="loss")
    assert found == [["line", "step", "loss"], ["up", 1, 3.0], ["up", 2, 4.0], ["line 2", 5, 6.0], ["floor", "", 0.5]]


def test_a_plot_has_its_figures_in_text_and_file(tmp_path):
    picture = show.plot([show.Line([1, 10], [0.5, 0.25], "mine")], x_label="tokens", y_label="loss")
    assert picture.text.splitlines() == ["line  tokens  loss", "mine  1  0.5000", "mine  10  0.2500"]
    assert picture.save(tmp_path / "p.csv").read_text().splitlines()[1:] == ["mine,1,0.5", "mine,10,0.25"]
    assert len(ET.parse(picture.save(tmp_path / "p.svg")).getroot()) == 1
    long = show.plot([show.Line(range(1, 99), range(1, 99), "l")], x_label="x", y_label="y")
    assert long.text.endswith("… 59 more rows")


@pytest.mark.parametrize("text", ["=1+1", "+1", "-x", "@SUM(A1)", "\tx", "\rx"])
def test_no_cell_becomes_a_formula(text):  # P23
    (row,) = csv.reader(io.StringIO(table_of([[text, -1.5]]), newline=""))
    assert row == [f"'{text}", "-1.5"]


@pytest.mark.parametrize(
    ("picture", "name", "message"),
    [
        (Picture("", "words"), "a.csv", "no figures are behind this picture"),
        (show.bars({"a": 1.0}), "a.png", r"saved as \.svg, \.csv or \.html"),
        (show.bars({"a": 1.0}), "a", r"saved as \.svg"),
    ],
)
def test_what_cannot_be_saved(picture, name, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        picture.save(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_bars_are_as_long_as_their_values():
    svg = ET.fromstring(re.search(r"<svg.*</svg>", show.bars({"a": 4.0, "b": 1.0, "c": float("nan")}).html)[0])
    wide = [float(rect.get("width")) for rect in svg.iter("rect")]
    assert wide[0] == pytest.approx(4 * wide[1], abs=0.2)
    assert wide[2] == 0


# --- a run ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on the world that has its shards beside it."""
    folder, world = tmp_path_factory.mktemp("runs") / "first", tinylm.World()
    docs, held = list(world.texts(60)), list(world.texts(6, seed=2**40))
    tokenizer = tinylm.Tokenizer.train(docs, vocab=300)
    tokens = tinylm.write_tokens(docs, tokenizer, folder / "data")
    valid = tinylm.write_tokens(held, tokenizer, folder / "data", split="valid")
    config = ModelConfig(vocab=tokenizer.vocab, width=16, layers=1, heads=2, context=32)
    rule = TrainConfig(steps=8, batch=2, length=32, log_every=2, eval_every=4)
    trainer = tinylm.train(tinylm.Transformer(config, tokenizer=tokenizer), tokens, rule, valid=valid, out=folder)
    list(trainer)
    trainer.run.close()
    return trainer, held


def test_the_page_says_what_was_measured(run, tmp_path):
    trainer, held = run
    page = tinylm.report(trainer, tmp_path / "a page.html")
    text = page.path.read_text()
    own = evaluate(trainer.model, held)
    assert page.figures["evaluation"]["bits_per_byte"] == pytest.approx(own.bits_per_byte)
    floor = evaluate_floor(tinylm.World(), held)
    assert page.figures["controls"]["the floor"]["bits_per_byte"] == pytest.approx(floor.bits_per_byte)
    others = tinylm.baselines(list(tinylm.World().texts(60)), held, trainer.model.tokenizer)
    assert page.figures["controls"]["5-grams, Kneser-Ney"]["bits_per_byte"] == pytest.approx(others["kneser_ney_5"])
    assert page.figures["controls"]["gzip -9"]["bits_per_byte"] == pytest.approx(others["gzip"])
    json.dumps(page.figures)
    for words in (
        "How it went",
        "done",
        f"{own.bits_per_byte:.4g}"[:5],
        "What it writes",
        "seed 2",
        "sha256",
        "8 steps"[2:],
    ):
        assert words in text
    assert trainer.batches.tokens.sha256 in text
    assert "<script" not in text
    assert not re.search(r"""(src|href|url)\s*[=(]""", text)
    losses = [row for row in page.numbers if row[0] == "validation"]
    assert [row[2] for row in losses] == pytest.approx(
        [s.valid_bits for s in trainer.history if s.valid_bits is not None]
    )


def test_a_page_from_the_folder_alone_replaces_the_last_one(run):
    trainer, _ = run
    folder = trainer.run.folder
    first = tinylm.report(folder, prompts=["Once"])
    assert first.path == folder / "report.html"
    before = first.path.read_bytes()
    assert tinylm.report(str(folder), prompts=["Once"]).path.read_bytes() == before
    tinylm.resume(folder, steps=9).run.close()  # a report in it does not make it another folder


def test_other_text_and_pictures_of_ones_own(run, tmp_path):
    trainer, _ = run
    extra = {"<b>mine</b>": show.bars({"a": 1.0})}
    page = tinylm.report(trainer, tmp_path / "r.html", text=["A cat sat.", "A dog ran."], extra=extra)
    assert page.figures["evaluation"]["bytes"] == 20
    assert "the floor" not in page.figures["controls"]
    assert "&lt;b&gt;mine" in page.path.read_text()


def test_a_split_comes_back_as_its_documents(run):
    trainer, held = run
    valid = tinylm.Tokens.open(trainer.run.folder / "data", "valid")
    assert reporting.texts_of(valid, trainer.model.tokenizer, 10**6) == held
    some = reporting.texts_of(valid, trainer.model.tokenizer, len(held[0].encode()) + 1)
    assert some
    assert some == held[: len(some)]


@pytest.fixture
def copied(run, tmp_path):
    """The run's folder once more, to be spoilt."""
    return Path(shutil.copytree(run[0].run.folder, tmp_path / "copied"))


def test_a_run_whose_shards_are_gone_says_so(copied):
    shutil.rmtree(copied / "data")
    page = tinylm.report(copied)
    assert "no split 'train' in" in page.text
    assert "evaluation" not in page.figures


def test_a_run_whose_shards_have_changed_says_so(copied):
    shutil.rmtree(copied / "data")
    tinylm.write_tokens(["Another text."] * 9, tinylm.Tokenizer.load(copied / "tokenizer.json"), copied / "data")
    page = tinylm.report(copied)
    assert "has changed: sha256 was" in page.text
    assert "evaluation" not in page.figures


@pytest.mark.parametrize(
    "line",
    ['{"step": 0}', '{"step": 9}', '{"step": "<b>", "loss": 1}', '{"step": 9, "loss": "1", "tokens": 1, "seconds": 1}'],
)
def test_a_log_that_says_nonsense_is_damaged(copied, line):
    log = copied / "run.jsonl"
    log.write_text(log.read_text() + line + "\n")
    with pytest.raises(CheckpointDamaged, match=r"run\.jsonl line \d+ is damaged"):
        tinylm.report(copied)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"path": "page.pdf"}, ConfigError, "ends in .html"),
        ({"text": []}, EvaluationError, "nothing in it to score"),
        ({"seed": "1"}, ConfigError, "seed = '1'"),
        ({"extra": {"a": "b"}}, ConfigError, "give pictures of the kit"),
        ({"extra": {"How it went": show.bars({"a": 1.0})}}, ConfigError, "has already"),
        ({"run": 3}, ConfigError, "a report is about a run folder"),
        ({"run": Path("/nowhere/at/all")}, FileNotFoundError, "/nowhere/at/all"),
    ],
)
def test_what_has_no_report(run, given, error, message):
    with pytest.raises(error, match=message):
        tinylm.report(**{"run": run[0], **given})


def test_the_command(run, tmp_path, capsys):
    folder = str(run[0].run.folder)
    main(["report", folder, "--out", str(tmp_path / "x.html"), "--prompt", "Once", "--json"])
    figures = json.loads(capsys.readouterr().out)
    assert figures["page"] == str(tmp_path / "x.html")
    assert figures["step"] == 8
    assert (tmp_path / "x.html").stat().st_size > 5000
