"""The explorer's page: one file with its data, style and script, which sets text and never markup."""

from __future__ import annotations

import base64
import hashlib
import json
from typing import Any

from tinylm import markup
from tinylm.markup import Markup, join, tag

STYLE = """
:root{color-scheme:light dark}
body{font:14px/1.45 system-ui,sans-serif;margin:0;display:grid;grid-template:auto 1fr/minmax(240px,340px) 1fr;
  height:100vh}
header{grid-column:1/3;padding:10px 16px;border-bottom:1px solid #8885}
header b{font-size:17px;margin-right:10px}
header span,.faint{opacity:.72}
nav{border-right:1px solid #8885;display:flex;flex-direction:column;min-height:0}
nav input{font:inherit;margin:10px;padding:6px 8px}
#list{overflow:auto;flex:1}
#list button{display:block;width:100%;text-align:left;font:inherit;border:0;background:none;color:inherit;
  padding:6px 12px;cursor:pointer;border-bottom:1px solid #8882}
#list button:hover,#list button:focus{background:#1f80c422}
#list button[aria-current=true]{background:#1f80c444}
#list small{opacity:.72;display:block;overflow-wrap:anywhere}
main{overflow:auto;padding:14px 20px}
h2{font-size:16px;margin:0 0 2px}
h3{font-size:14px;margin:18px 0 4px}
.context{padding:4px 0;border-bottom:1px solid #8883;overflow-wrap:anywhere;white-space:pre-wrap}
.context small{opacity:.6;margin-right:8px}
mark{background:#e69f0073;color:inherit;border-radius:3px;font-weight:600}
.words span{display:inline-block;margin:2px 12px 2px 0;font-variant-numeric:tabular-nums}
.two{display:grid;grid-template-columns:1fr 1fr;gap:20px}
.text{white-space:pre-wrap;border-left:3px solid #8886;padding-left:10px;overflow-wrap:anywhere}
@media(max-width:700px){body{display:block;height:auto}#list{max-height:40vh}}
"""

SCRIPT = """
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const $ = id => document.getElementById(id);
const el = (name, text, kind) => {
  const e = document.createElement(name);
  e.textContent = text;
  if (kind) e.className = kind;
  return e;
};
const words = (title, list) => {
  const d = el("div", "", "words");
  d.append(el("h3", title));
  for (const [w, x] of list) d.append(el("span", w + " " + x));
  return d;
};
let current = null;
function open(e, button) {
  current = e.code;
  for (const b of $("list").children) b.setAttribute("aria-current", b === button);
  const out = [el("h2", e.code), el("div", e.said, "faint"), el("h3", "Where it fires")];
  for (const [before, token, after, document] of e.contexts) {
    const c = el("div", "", "context");
    c.append(el("small", "doc " + document), el("span", before), el("mark", token), el("span", after));
    out.push(c);
  }
  const two = el("div", "", "two");
  two.append(words("Makes likelier (nats)", e.raised), words("Makes rarer", e.lowered));
  out.push(two);
  if (e.story) {
    const both = el("div", "", "two");
    for (const [title, text] of [["Written without it", data.plain], ["Written with it active", e.story]]) {
      const side = el("div", "");
      side.append(el("h3", title), el("div", text, "text"));
      both.append(side);
    }
    out.push(both);
  }
  $("view").replaceChildren(...out);
}
function find() {
  const q = $("query").value.toLowerCase().split(/\\s+/).filter(Boolean), list = $("list");
  list.replaceChildren();
  for (const e of data.entries) {
    const text = (e.code + " " + e.means + " " + e.raised.map(r => r[0]).join(" ")).toLowerCase();
    if (!q.every(w => text.includes(w))) continue;
    const b = el("button", e.means || "(no name)");
    const figures = e.figures ? " \\u00b7 " + e.figures : "";
    b.append(el("small", e.code + " \\u00b7 fires " + e.fires.toLocaleString("en") + figures));
    b.addEventListener("click", () => open(e, b));
    b.setAttribute("aria-current", e.code === current);
    list.append(b);
  }
  if (!list.children.length) list.append(el("div", "no code fits", "context"));
}
$("query").addEventListener("input", find);
find();
const first = $("list").querySelector("button");
if (first) first.click();
"""


def page(title: str, about: str, data: Any) -> str:
    """The whole file. Data is JSON with `<`, `>` and `&` spelled out, so that no text can end the element it is in."""
    spelled = (
        json.dumps(data, ensure_ascii=True).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    )
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    header = join([tag("b", title), tag("span", about)])
    body = Markup(
        f"<header>{header}</header><nav>"
        '<input id="query" type="search" placeholder="search: a word, a label, a site" aria-label="search codes">'
        '<section id="list"></section></nav><main id="view"></main>'
        f'<script type="application/json" id="data">{spelled}</script><script>{SCRIPT}</script>'
    )
    return markup.page(title, body, style=STYLE, policy=policy)
