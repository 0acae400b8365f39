"""What is drawn: inert whatever text goes in, right about the figures, and readable as text too."""

import math
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinylm import show
from tinylm.config import ModelConfig
from tinylm.markup import ATTRIBUTES, HIDDEN, TAGS, Markup, duration, esc, number, pane, tag, visible

ALLOWED = TAGS | {"svg"}


class Reader(HTMLParser):
    """Parses as a browser would begin to; collects text, and everything that is not plain text and boxes."""

    def __init__(self, markup: str):
        super().__init__(convert_charrefs=True)
        self.said, self.wrong, self.open, self.attributes = [], [], [], []
        self.feed(markup)
        self.close()
        if self.open:
            self.wrong.append(f"left open: {self.open}")

    def handle_starttag(self, name, attrs):
        self.open.append(name)
        if name not in {t.lower() for t in ALLOWED}:
            self.wrong.append(name)
        for key, value in attrs:
            self.attributes.append(value)
            if key not in {a.lower() for a in ATTRIBUTES} or key.startswith("on"):
                self.wrong.append(key)
            if key == "style" and re.search(r"url\(|expression|@import|javascript", value, re.I):
                self.wrong.append(value)

    def handle_endtag(self, name):
        if not self.open or self.open.pop() != name:
            self.wrong.append(f"/{name}")

    def handle_data(self, data):
        self.said.append(data)

    def handle_comment(self, data):
        self.wrong.append(f"<!--{data}")

    handle_decl = unknown_decl = handle_pi = handle_comment


PAYLOADS = [
    "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "<svg onload=alert(1)>", "</div></pre><b>",
    "</script>", "</style><script>", "</title><script>alert(1)</script>", "\"><img src=x onerror='alert(1)'>",
    "' onmouseover='x", '" x="', "<!-- -->", "<!--", "-->", "<![CDATA[", "]]>", "<?xml?>", "<!DOCTYPE html>",
    "<a href=javascript:alert(1)>x</a>", "<iframe src=//x></iframe>", "<style>*{display:none}</style>",
    "<link rel=stylesheet href=x>", "<meta http-equiv=refresh>", "<form><input autofocus onfocus=x>",
    "<math><mi//xlink:href=x>", "<object data=x>", "<base href=x>", "&lt;script&gt;", "&amp;", "&#60;script&#62;",
    "&#x3c;b&#x3e;", "&", "&notin", "$x^2$", "$$\\int$$", "\\(x\\)", "\\[x\\]", "`x`", "**x**", "javascript:alert(1)",
    "data:text/html,<script>", "url(javascript:x)", "expression(x)", "\u202egnp.exe", "a\u2066b\u2069",
    "zero\u200bwidth", "join\u200ded", "\ufeffbom", "soft\xadhyphen", "\x1b[31mred\x1b[0m", "\x1b]0;title\x07",
    "nul\0nul", "bell\a", "back\b\b", "return\rover", "\x7f", "\x9b31m", "line\u2028sep", "\ud800", "\udfff half",
    "\ufffe", "tag\U000e0041", "/etc/passwd", "https://example.org/x.html", "{{7*7}}", "%s%n", "😀 ünïcødé 漢字",
    "x" * 1_000_000, " ", "",
]  # fmt: skip


class Bytes:
    """A stand-in tokenizer: one token per byte."""

    def encode(self, text):
        return np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8)

    def decode_bytes(self, ids):
        return bytes(ids)


def trainer(**changes):
    """What `run_summary` reads of a trainer."""
    step = lambda n, valid=None: SimpleNamespace(  # noqa: E731
        step=n, loss=4.0 / n, tokens=n * 64, tokens_per_second=1234.0, eta=5.0, valid_bits=valid, valid_loss=valid
    )
    plain = {
        "losses": [4.0 / n for n in range(1, 41)], "step": 40, "steps": 80, "tokens_per_step": 64, "outcome": "running",
        "history": [step(10), step(20, 1.5), step(30), step(40, 0.5)], "valid_bytes": 2.0, "elapsed": 9.0,
        "progress": 0.5, "batches": lambda n: None, "config": SimpleNamespace(objective="next_token"),
    }  # fmt: skip
    return SimpleNamespace(**{**plain, **changes})


def displays(text):
    """Every display function with `text` wherever it takes one."""
    story = show.sample(text, text, prompt=text)
    return {
        "sample": story,
        "table": show.table([[text, 1], [2.5, text]], [text, "b"], title=text),
        "bars": show.bars({text: 1.0, "b" + text: 2.0}, unit=text, strong=[text], floor=0.5),
        "tokens": show.tokens(Bytes(), text),
        "run": show.run_summary(trainer(), floor=0.2, baselines={text: 0.9}, story=story, notes=[text]),
        "chart": show.chart(
            [show.Line([1, 2], [1, 2], text)], [show.Level(1.5, text)], x_label=text, y_label=text
        ),
    }  # fmt: skip


@pytest.mark.parametrize("payload", PAYLOADS, ids=lambda p: ascii(p[:30]))
def test_text_is_inert_in_every_display(payload):  # P23
    for name, picture in displays(payload).items():
        html_ = picture.html if isinstance(picture, show.Picture) else picture
        page = Reader(html_)
        assert page.wrong == [], name
        assert not HIDDEN.search(html_), name
        if name not in ("tokens", "run", "table"):  # tokens are cut anywhere, and long texts are cut
            assert visible(payload)[: show.LONGEST] in "".join([*page.said, *page.attributes]), name
        if isinstance(picture, show.Picture):
            assert not HIDDEN.search(picture.text), name
            assert "\x1b" not in repr(picture), name


@given(st.text())
def test_esc_says_all_and_only_the_visible_text(text):  # P23
    page = Reader(f"<div>{esc(text)}</div>")
    assert page.wrong == []
    assert "".join(page.said) == visible(text)
    assert esc(esc(text)) == esc(text)
    assert visible(visible(text)) == visible(text)


def test_visible_names_what_hides():
    assert visible("a\x1b[0m\u202eb\u200b\x85\ud800\U000e0041") == "a␛[0m\\u202eb\\u200b\\x85\\ud800\\U000e0041"
    assert visible("tab\tline\nÄ 漢 🙂 é\xa0!") == "tab\tline\nÄ 漢 🙂 é\xa0!"


@pytest.mark.parametrize("name", ["script", "img", "a", "iframe", "style", "div onload=x", ""])
def test_elements_that_could_act_are_refused(name):  # P23
    with pytest.raises(ValueError, match="not among"):
        tag(name, "x")


@pytest.mark.parametrize("name", ["onclick", "href", "src", "id", 'x" onload'])
def test_attributes_that_could_act_are_refused(name):  # P23
    with pytest.raises(ValueError, match="not among"):
        tag("div", "x", **{name: "y"})


def test_markup_passes_and_text_does_not():
    assert tag("b", "<", Markup("<i>"), class_="a&b") == '<b class="a&amp;b">&lt;<i></b>'


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0"),
        (1.2345, "1.23"),
        (0.09134, "0.091"),
        (12345.6, "12,346"),
        (99.96, "100.0"),
        (-0.5, "-0.500"),
        (math.nan, "–"),
        (math.inf, "–"),
        (None, "–"),
        (1e-9, "0.000"),
    ],
)
def test_numbers(value, shown):
    assert number(value) == shown


def test_durations():
    assert [duration(s) for s in (0.4, 59.6, 125, 11_220, math.inf)] == [
        "0 s",
        "1 min 0 s",
        "2 min 5 s",
        "3 h 7 min",
        "–",
    ]


# --- charts -----------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 300), max_size=12))
def test_labels_stand_apart_in_order(wanted):
    found = show.apart(wanted, 15, 0, 300)
    order = np.argsort(wanted, kind="stable")
    placed = np.array(found)[order]
    assert (np.diff(placed) >= 15 - 1e-6).all()
    assert len(found) == len(wanted)
    assert not found or max(found) <= 300
    if len(wanted) > 1 and (np.diff(np.sort(wanted)) >= 15).all():
        assert found == pytest.approx(wanted)


@given(st.floats(1e-6, 1e9), st.floats(1.01, 1e6), st.booleans())
def test_ticks_are_few_round_and_inside(low, ratio, log):
    high = low * ratio
    found = show.ticks(low, high, log)
    assert all(low <= t <= high * 1.001 for t in found)
    assert found == sorted(found)
    assert len(found) <= 14
    if not log:
        assert len(found) >= 2
    assert all(len(f"{t:.3g}") <= 9 for t in found)


def points(svg):
    return [[tuple(map(float, p.split())) for p in re.split("[ML]", d)[1:]] for d in re.findall(r' d="([^"]*)"', svg)]


def test_a_line_is_drawn_where_its_values_are():
    svg = show.chart([show.Line([1, 10, 100], [3.0, 2.0, 1.0], "a")], x_label="tokens", y_label="bits")
    ((first, middle, last),) = points(svg)
    assert middle[0] - first[0] == pytest.approx(last[0] - middle[0], abs=0.2)  # log axis
    assert middle[1] - first[1] == pytest.approx(last[1] - middle[1], abs=0.2)
    assert first[1] < last[1]  # SVG counts downwards
    (linear,) = points(show.chart([show.Line([1, 10, 100], [3.0, 2.0, 1.0])], x_label="", y_label="", log_x=False))
    assert linear[1][0] - linear[0][0] == pytest.approx((linear[2][0] - linear[0][0]) / 11, abs=0.2)


@pytest.mark.parametrize(
    ("x", "y"),
    [
        ([], []),
        ([5], [1.0]),
        ([1, 2, 3], [1, math.nan, 2]),
        ([1, 2], [math.inf, math.nan]),
        ([1, 2], [2.0, 2.0]),
        ([0, 1], [1.0, 2.0]),
        ([1, 2], [0.0, 0.0]),
        ([3, 3], [1.0, 2.0]),
        ([1, 2], [-1.0, -5.0]),
    ],
)
def test_odd_values_are_drawn_without_fuss(x, y):
    svg = show.chart([show.Line(x, y, "a")], [show.Level(math.nan, "n")], x_label="x", y_label="y")
    assert Reader(svg).wrong == []
    assert not re.search(r"\b(nan|inf)\b", svg)


def test_pictures_carry_nothing_from_elsewhere_and_follow_the_theme():
    for picture in displays("x").values():
        html_ = getattr(picture, "html", picture)
        assert not re.search(r"https?:|src=|href|<script|<style|@font|white;|#fff|black", html_)
        assert "currentColor" in html_ or "--jp-content-font-color1" in html_


# --- pictures of a run ------------------------------------------------------------------------------------------------


def test_curves_convert_to_bits_and_count_tokens():
    c = show.curves(trainer())
    assert c.unit == "bits per byte"
    assert c.x.tolist() == [64.0 * n for n in range(1, 41)]
    assert c.raw == pytest.approx([4.0 / n / math.log(2) / 2 for n in range(1, 41)])
    assert c.valid_x.tolist() == [20 * 64, 40 * 64]
    assert c.valid.tolist() == [1.5, 0.5]
    tokens = SimpleNamespace(bytes_per_prediction=4.0)
    assert show.curves(trainer(batches=SimpleNamespace(tokens=tokens))).raw[0] == pytest.approx(1 / math.log(2))


def test_curves_stay_in_nats_where_bytes_are_unknown():
    for unknown in ({"valid_bytes": None}, {"config": SimpleNamespace(objective="mlm")}):
        c = show.curves(trainer(**unknown))
        assert c.unit == "nats per token"
        assert c.raw[0] == 4.0
        text = show.run_summary(trainer(**unknown), floor=0.1, baselines={"bigram": 0.7})
        assert "floor" not in text.html
        assert "bigram" not in text.html


def test_long_curves_are_thinned_without_bias():
    losses = (2 + np.sin(np.arange(50_000))).tolist()
    c = show.curves(trainer(losses=losses, step=50_000, history=[], valid_bytes=None))
    assert len(c.raw) < show.POINTS
    assert c.raw[-50:] == pytest.approx(2, abs=0.05)
    assert c.x[0] == 64
    assert len(show.run_summary(trainer(losses=losses, step=50_000)).html) < 30_000


def test_earlier_sittings_are_drawn_from_the_log():
    resumed = trainer(losses=[0.2, 0.1], step=32)
    c = show.curves(resumed)
    assert c.x.tolist() == [64 * n for n in (10, 20, 30, 31, 32)]


def test_summary_says_how_it_stands():
    running = show.run_summary(trainer(), floor=0.2)
    assert "training" in running.text
    assert "0.500 bits per byte, validation" in running.text
    assert "0.300 above the floor" in running.text
    assert "5 s to go" in running.text
    assert "0.100 below the floor" in show.run_summary(trainer(), floor=0.6).text
    stopped = show.run_summary(trainer(outcome="stopped"))
    assert "stopped" in stopped.html
    assert "9 s spent" in stopped.text
    new = show.run_summary(trainer(losses=[], step=0, history=[], progress=0.0))
    assert "starting" in new.text
    assert Reader(new.html).wrong == []


def test_sizes_add_up():
    config = ModelConfig(vocab=300, width=32, layers=2, heads=2, context=16)
    picture = show.sizes(config)
    cells = {
        name: int(n.replace(",", "")) for name, n in re.findall(r"^([a-z ]+?)  +([\d,]+)  +[\d.]+%", picture.text, re.M)
    }
    total = cells.pop("total")
    assert sum(cells.values()) == total
    assert f"{total:,}" in picture.html


def test_tokens_show_each_piece_once():
    picture = show.tokens(Bytes(), "ab<\n")
    page = Reader(picture.html)
    assert picture.text.splitlines()[0] == "a|b|<|"
    assert [a for a in page.attributes if a.startswith("token ")] == ["token 97", "token 98", "token 60", "token 10"]
    assert "4 tokens for 4 bytes" in picture.text


def test_the_only_html_door():  # P23
    """No room but `markup` writes an element, and none shows a raw string as HTML."""
    import pathlib

    for path in pathlib.Path(show.__file__).parent.rglob("*.py"):
        if path.name != "markup.py":
            source = path.read_text()
            assert not re.search(r"\b(HTML|Javascript|SVG|display_html)\(|_repr_html_\b(?!\()", source), path
            assert not re.search(r"""["']<(div|span|svg|table|p|b|pre)[ >]""", source), path


def test_a_pane_shows_pictures_and_no_markup_of_others():  # P23
    pytest.importorskip("ipywidgets")
    shown = pane()
    shown.put("<script>alert(1)</script>")
    assert "<script" not in shown.value
    assert "&lt;script" in shown.value
    shown.put(show.table([["a"]], ["name"]))
    assert "<table" in shown.value
    shown.put(None)
    assert shown.value == ""
