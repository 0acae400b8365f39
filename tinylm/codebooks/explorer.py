"""Look at codes: search them, see where they fire, what they do to the next token, and what they make a model write.

    look = Explorer(model, index, tokenizer, labels)
    look                                    # the most telling codes, in a notebook
    look.search("farm"); look.code(("blocks.1.mlp.down", 0, 17))
    look.save("codes.html", stories=8)      # one file to share: search, click, read; no server, no network
    look.widget()                           # the same with a live model, where ipywidgets is installed

Everything shown is escaped. The page's script only ever sets text, never markup, and the page forbids all else.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tinylm import show
from tinylm.codebooks.books import CodebookError, books
from tinylm.codebooks.page import page
from tinylm.codebooks.reading import Context, Labels, Match, contexts, named_codes
from tinylm.codebooks.steering import Handle, effects, handle, steer
from tinylm.generation import prompt_ids
from tinylm.markup import FAINT, RULE, Markup, Picture, framed, join, pane, tag, visible
from tinylm.store import write_bytes

MARK = "background:rgba(230,159,0,.45);border-radius:3px;padding:1px 0;font-weight:600"


class Card(NamedTuple):
    """What is known of one code.

    Attributes:
        handle: (site, group, code). fires: how often, in the index. match: the class that describes it best, or None.
        contexts: places where it fires. raised, lowered: tokens whose log-probability it changes most, and by how much.
    """

    handle: Handle
    fires: int
    match: Match | None
    contexts: tuple[Context, ...]
    raised: tuple[tuple[str, float], ...]
    lowered: tuple[tuple[str, float], ...]


def printed(text: str) -> str:
    """A token as it may be shown: spaces and line ends made visible."""
    return visible(text).replace("\n", "⏎").replace(" ", "·") or "∅"


class Explorer:
    """The codes of a model, read through an index.

    Args:
        model: with codebooks; index: of a corpus it read; tokenizer: of both, default the model's.
        labels: what codes may mean, tried for every code; see `reading`.
        texts: tokens (n, T) of positions at which the effect on the next token is measured; default 32 from the index.

    Raises CodebookError without a tokenizer, or for an index of another model.
    """

    def __init__(
        self,
        model: Any,
        index: Any,
        tokenizer: Any = None,
        labels: Sequence[Labels] = (),
        *,
        texts: np.ndarray | None = None,
        seed: int = 0,
    ):
        self.model, self.index, self.seed = model, index, seed
        self.tokenizer = model.tokenizer if tokenizer is None else tokenizer
        if self.tokenizer is None:
            raise CodebookError("the model carries no tokenizer: pass tokenizer=, or codes have no text")
        own = {name: (book.groups, book.book.shape[1], book.k) for name, book in books(model).items()}
        if own != {name: (index.sites[name], index.codes[name], index.k[name]) for name in index.sites}:
            raise CodebookError(
                f"{index} is not of this model, whose codebooks are {', '.join(own)}: build one with it"
            )
        self.names = named_codes(index, labels) if labels else {}
        self.counts = {(name, g): index.counts(name, g) for name, g in index.columns}
        if texts is None:
            width = min(24, len(index), model.config.context)
            starts = np.random.default_rng(seed).integers(0, max(1, len(index) - width), 32)
            texts = np.stack([np.asarray(index.tokens[a : a + width]) for a in starts]).astype(np.int32)
        self.texts = texts

    def match(self, code: Handle | Match) -> Match | None:
        """The class that describes a code best, or None."""
        name, group, number = handle(code)
        return self.names[name, group][number] if (name, group) in self.names else None

    def ranked(self) -> list[Handle]:
        """Every code that fires: described best first, then the frequent ones."""
        codes = [(*column, int(c)) for column, own in self.counts.items() for c in np.flatnonzero(own)]
        f1 = lambda code: match.f1 if (match := self.match(code)) else 0.0  # noqa: E731
        return sorted(codes, key=lambda code: (-f1(code), -int(self.counts[code[:2]][code[2]])))

    def card(self, code: Handle | Match, *, n: int = 8, words: int = 8) -> Card:
        """All that is known of one code. Raises CodebookError for a code there is not."""
        return self.cards([code], n=n, words=words)[0]

    def cards(self, codes: Sequence[Handle | Match], *, n: int = 8, words: int = 8) -> list[Card]:
        """The same for several: `n` contexts each, `words` tokens raised and lowered."""
        found = []
        for code, effect in zip(codes, effects(self.model, self.texts, codes), strict=True):
            name, group, number = own = handle(code)
            effect = effect[: self.tokenizer.vocab]
            order = np.argsort(effect)
            piece = lambda i: self.tokenizer.decode_bytes([int(i)]).decode("utf-8", "backslashreplace")  # noqa: E731
            up = tuple((piece(i), float(effect[i])) for i in order[::-1][:words])
            down = tuple((piece(i), float(effect[i])) for i in order[:words])
            places = contexts(self.index, self.tokenizer, *own, n=n, seed=self.seed)
            found.append(Card(own, int(self.counts[name, group][number]), self.match(own), tuple(places), up, down))
        return found

    def found(self, query: str) -> list[Handle]:
        """Codes whose address, or meaning, contains every word of the query; best described first."""
        words = query.lower().split()
        return [code for code in self.ranked() if all(w in self.told(code).lower() for w in words)]

    def told(self, code: Handle) -> str:
        """One line: address and meaning."""
        match = self.match(code)
        return f"{address(code)} {match.kind} {match.label}" if match else address(code)

    # --- in a notebook ---

    def search(self, query: str = "", *, most: int = 20) -> Picture:
        """The codes that `found` finds, as a table."""
        rows = []
        for code in (all_of_them := self.found(query))[:most]:
            match = self.match(code)
            told = (
                (f"{match.kind}: {printed(match.label)}", f"{match.precision:.2f}", f"{match.recall:.2f}")
                if match
                else ("", "", "")
            )
            rows.append([address(code), int(self.counts[code[:2]][code[2]]), *told])
        more = f" ({len(all_of_them) - most:,} more)" if len(all_of_them) > most else ""
        title = f"codes for {query!r}{more}" if query else f"codes, best described first{more}"
        return show.table(rows, ["code", "fires", "means", "precision", "recall"], title)

    def code(self, code: Handle | Match, *, n: int = 8) -> Picture:
        """One code: where it fires, and what it does to the next token."""
        card = self.card(code, n=n)
        lines = [tag("div", tag("b", address(card.handle)), " ", said(card), style="margin-bottom:6px")]
        for c in card.contexts:
            text = join([one_line(c.before), tag("span", one_line(c.token) or "∅", style=MARK), one_line(c.after)])
            lines.append(tag("div", text, style=f"padding:3px 0;{RULE};overflow-wrap:anywhere"))
        for what, words in (("makes likelier", card.raised), ("makes rarer", card.lowered)):
            shown = "   ".join(f"{printed(word)} {change:+.2f}" for word, change in words)
            lines.append(tag("div", tag("span", f"{what}: ", style=FAINT), shown, style="margin-top:6px"))
        plain = [f"{address(card.handle)} {said(card)}", *(f"{c.before}[{c.token}]{c.after}" for c in card.contexts)]
        return Picture(framed(*lines), "\n".join(visible(line.replace("\n", " ")) for line in plain))

    def __repr__(self) -> str:
        return self.search().text

    def _repr_html_(self) -> str:
        return self.search().html

    # --- to share ---

    def save(
        self,
        path: str | os.PathLike,
        *,
        codes: Sequence[Handle | Match] | None = None,
        most: int = 200,
        prompt: str = "",
        stories: int = 0,
        tokens: int = 60,
        title: str = "Codes",
    ) -> Path:
        """Write a page that needs nothing else: search and click codes, see contexts and effects, read steered texts.

        Args:
            codes: to show; default the `most` best described. stories: how many of them, from the first on, come with
                a text that the model wrote while the code was active, beside one without. prompt, tokens: of these.
        """
        chosen = [handle(c) for c in codes] if codes is not None else self.ranked()[:most]
        if not chosen:
            raise CodebookError("no code fires in this index: there is nothing to show")
        plain = steer(self.model, [prompt], tokens=tokens, seed=self.seed)[0] if stories else ""
        entries = []
        for i, card in enumerate(self.cards(chosen)):
            match = card.match
            story = (
                steer(self.model, [prompt], activate=[card.handle], tokens=tokens, seed=self.seed)[0]
                if i < stories
                else ""
            )
            entries.append({
                "code": address(card.handle), "fires": card.fires, "said": said(card),
                "means": f"{match.kind}: {printed(match.label)}" if match else "",
                "figures": f"precision {match.precision:.2f}, recall {match.recall:.2f}" if match else "",
                "contexts": [
                    [one_line(c.before), one_line(c.token) or "∅", one_line(c.after), c.document] for c in card.contexts
                ],
                "raised": [[printed(w), f"{x:+.2f}"] for w, x in card.raised],
                "lowered": [[printed(w), f"{x:+.2f}"] for w, x in card.lowered],
                "story": visible(story),
            })  # fmt: skip
        size = f"{len(self.index):,} positions, {self.index.documents:,} documents"
        about = f"{size}; {len(entries)} of {len(self.ranked()):,} codes that fire"
        data = {"entries": entries, "plain": visible(plain), "prompt": visible(prompt)}
        path = Path(path)
        write_bytes(path, page(title, about, data).encode())
        return path

    def widget(self) -> Any:
        """Search, click, steer with the live model. Raises CodebookError without ipywidgets."""
        try:
            import ipywidgets as w
        except ImportError:
            raise CodebookError(
                "widget() needs ipywidgets (pip install ipywidgets); `save` writes a page without it"
            ) from None
        query = w.Text(placeholder="search: a word, a label, a site", layout=w.Layout(width="320px"))
        listed = w.Select(rows=12, layout=w.Layout(width="320px"))
        view, made = pane(), pane()
        prompt, ban = w.Text(value="One day,", description="prompt"), w.Checkbox(value=False, description="ban instead")
        go = w.Button(description="steer by this code")

        def find(_: Any = None) -> None:
            listed.options = [(visible(self.told(c)), c) for c in self.found(query.value)[:200]]

        def open_one(_: Any = None) -> None:
            if listed.value is not None:
                view.put(self.code(listed.value))
                made.put(None)

        def write(_: Any) -> None:
            if listed.value is None:
                return
            change: dict[str, Any] = {"ban" if ban.value else "activate": [listed.value]}
            room = self.model.config.context - len(prompt_ids(self.tokenizer, prompt.value))
            try:
                text = steer(self.model, [prompt.value], tokens=min(60, room), seed=self.seed, **change)[0]
                how = f"{'without' if ban.value else 'with'} {address(listed.value)}"
                made.put(show.sample(text, how, prompt=prompt.value))
            except ValueError as error:  # such as a prompt that fills the context
                made.put(str(error))

        query.observe(find, "value")
        listed.observe(open_one, "value")
        go.on_click(write)
        find()
        return w.HBox([w.VBox([query, listed]), w.VBox([view, w.HBox([prompt, ban, go]), made])])


def usage_picture(index: Any) -> Picture:
    """How unevenly codes are used: the share of all firings that the most frequent codes have, per codebook."""
    lines, told = [], []
    for name, groups in index.sites.items():
        counts = np.sort(np.concatenate([index.counts(name, g) for g in range(groups)]))[::-1]
        ranks = np.unique(np.geomspace(1, len(counts), 60).astype(int))
        share = np.cumsum(counts)[ranks - 1] / max(1, counts.sum())
        color = show.BLUE if "attn" in name else show.ORANGE
        lines.append(show.Line(ranks.tolist(), share.tolist(), "", color, opacity=0.8))
        half = int(np.searchsorted(np.cumsum(counts), counts.sum() / 2)) + 1
        told.append([name, len(counts), int((counts == 0).sum()), half])
    x_label, y_label = "codes, most frequent first", "share of all firings"
    svg = show.chart(lines, x_label=x_label, y_label=y_label)
    rows = show.table(told, ["codebook", "codes", "never fired", "codes with half of all firings"])
    lines = [line._replace(label=name) for line, name in zip(lines, index.sites, strict=True)]
    return Picture(framed(svg, Markup(rows.html)), rows.text, show.points(lines, x_label=x_label, y_label=y_label))


def address(code: Handle) -> str:
    """`blocks.1.attn.o/2 #17`: site, group, code."""
    return f"{code[0]}/{code[1]} #{code[2]}"


def said(card: Card) -> str:
    """What a code means, with the figures that say how surely."""
    fires = f"fires {card.fires:,} times"
    if card.match is None:
        return f"{fires}; no name"
    m = card.match
    figures = f"precision {m.precision:.2f}, recall {m.recall:.2f}"
    return f"{fires}; {m.kind}: {printed(m.label)} ({figures}, on documents not chosen on)"


def one_line(text: str) -> str:
    """Text with its line ends shown as signs."""
    return visible(text).replace("\n", " ⏎ ")
