"""What the pages of a run share: a shell, a look, and how items are drawn; see `report.py` and `inspection.py`.

A page is a single HTML file that asks nothing of anybody: style inline, media as data URIs, no script; its
Content-Security-Policy makes the browser hold it to that.
"""

import base64
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path

from datamodules.files import replace_file
from datamodules.sample import TEXT_KINDS, Item, Part

MAX_MEDIA_BYTES = 16 * 2**20  # our choice

SUBTYPES = {name: name for name in ("flac", "jpeg", "mp4", "ogg", "pdf", "png", "wav", "webm", "webp")}
SUBTYPES |= {"jpg": "jpeg", "mp3": "mpeg"}

CSS = """
:root { color-scheme: light dark; --paper: #fcfbf8; --ink: #1c1c1a; --soft: #6a6862; --rule: #dfdcd3; --card: #fff;
  --light: .55; --tint: 52 112 160; --good: #2c7a4b; --bad: #a8452c }
@media (prefers-color-scheme: dark) { :root { --paper: #161719; --ink: #e5e3dd; --soft: #9b9890; --rule: #34363a;
  --card: #1d1f22; --light: .74; --tint: 104 166 216; --good: #6cc48e; --bad: #e58b70 } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 3rem clamp(1rem, 3vw, 2.5rem) 5rem; max-width: 78rem; font: 15px/1.5 system-ui, sans-serif;
  font-variant-numeric: tabular-nums; background: var(--paper); color: var(--ink) }
h1, h2 { font: 500 1.45rem/1.2 "Iowan Old Style", Charter, Palatino, Georgia, serif }
h1 { font-size: clamp(1.7rem, 4vw, 2.4rem); margin: 0 0 1.5rem; overflow-wrap: anywhere }
h2 { margin: 3.5rem 0 .4rem; padding-top: 1.1rem; border-top: 1px solid var(--rule) }
h3 { font-size: 1rem; font-weight: 600; margin: 2rem 0 .3rem; overflow-wrap: anywhere }
.note, small { margin: .3rem 0; color: var(--soft); font-size: .82rem; font-weight: 400 }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(45%, 11rem), 1fr)); gap: .8rem 2rem; margin: 0 }
dt { color: var(--soft); font-size: .78rem } dd { margin: 0; overflow-wrap: anywhere }
.scroll { overflow-x: auto; margin: 1rem 0 } table { border-collapse: collapse; width: 100% }
th, td { padding: .42rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--rule); line-height: 1.3 }
th { font-weight: 400; color: var(--soft); font-size: .82rem } th[scope=row] { color: var(--ink); font-size: inherit }
th:first-child, .metric { text-align: left } th:first-child { padding-left: 0 } th small { display: block }
.score { background: rgb(var(--tint) / calc(var(--share) * .4)) } .score.below { color: var(--bad) }
.score small { display: inline-block; min-width: 3.3em; color: inherit; opacity: .7 }
.missing { color: var(--soft); text-align: left; white-space: normal; min-width: 9rem }
details { margin: .5rem 0 } summary { cursor: pointer; color: var(--soft); overflow-wrap: anywhere }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr)); gap: 1.6rem 2rem }
figure { margin: 0; min-width: 0 } figcaption { display: flex; flex-wrap: wrap; gap: 0 .8rem; overflow-wrap: anywhere }
figcaption b { font-weight: 600; margin-right: auto }
svg { display: block; width: 100%; height: auto; font: 11px system-ui, sans-serif; fill: var(--soft) }
.value { fill: var(--ink); stroke: var(--paper); stroke-width: 4; paint-order: stroke }
.grid { stroke: var(--rule) } .chance { stroke: var(--soft); stroke-dasharray: 2 4 }
.line { fill: none; stroke: oklch(var(--light) .13 var(--hue)); stroke-width: 1.7; stroke-linejoin: round }
.band { fill: oklch(var(--light) .13 var(--hue)); opacity: .17 }
.sample-band { stroke: var(--soft); stroke-width: 8; opacity: .3 }
.faint { stroke-width: 1; opacity: .35 } .dashed { stroke-dasharray: 5 3 }
circle, .run { fill: oklch(var(--light) .13 var(--hue)); color: oklch(var(--light) .13 var(--hue)) }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.4rem; margin: .4rem 0 1.3rem; font-size: .85rem }
.legend svg { display: inline-block; width: 28px; height: 8px; margin-right: .45em; vertical-align: middle }
.query { display: grid; grid-template-columns: repeat(6, minmax(0, 1fr)); gap: .8rem; padding: .9rem 0 }
.query + .query { border-top: 1px solid var(--rule) }
.item { border: 1px solid var(--rule); border-radius: 5px; padding: .5rem .6rem .6rem; background: var(--card); min-width: 0 }
.item.asked { border-color: transparent; background: none; padding-left: 0 }
.item.relevant { border-color: var(--good); box-shadow: inset 0 0 0 1px var(--good) }
.tag { display: flex; flex-wrap: wrap; gap: 0 .6em; margin: 0 0 .4rem; font-size: .75rem; color: var(--soft) }
.relevant .tag b { color: var(--good); margin-left: auto }
.item > :where(:not(.tag)) { display: block; width: 100%; max-height: 15rem; margin: .4rem 0 0; font-size: .87rem }
.item img, .item video { object-fit: contain; border-radius: 3px } audio { height: 36px } a { color: inherit }
.item > p, .item > pre { overflow: auto; overflow-wrap: anywhere; white-space: pre-wrap; line-height: 1.4; tab-size: 4 }
.item > p { max-height: 10rem } .item > pre { font: .75rem/1.4 ui-monospace, Menlo, Consolas, monospace }
@media (max-width: 760px) { body { padding-top: 1.6rem } th, td { padding: .4rem .45rem; font-size: .85rem }
  .query { grid-template-columns: repeat(2, minmax(0, 1fr)) } .item.asked { grid-column: 1 / -1 }
  .metric { white-space: normal } .score small { display: block }
  th:first-child { position: sticky; left: 0; background: var(--paper); white-space: normal; min-width: 7rem;
    max-width: 9rem; overflow-wrap: anywhere } }
"""

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src 'unsafe-inline'; img-src data:; media-src data:">
<link rel="icon" href="data:,"><style>{css}</style></head>
<body><header><h1>{title}</h1><dl>{facts}</dl></header><main>
{sections}
</main></body></html>
"""


def write_page(path: Path, *, title: str, facts: Mapping[str, str], sections: Iterable[str], css: str = "") -> None:
    """Write a page; at `path` there is afterwards a whole page or what was there before.

    Args:
        path: The HTML file.
        title: Its heading.
        facts: Short values for the head.
        sections: HTML, escaped.
        css: Style of its own, after that of all pages.

    Raises:
        OSError: The page cannot be written.
    """
    head = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items())
    page = PAGE.format(title=escape(title), css=CSS + css, facts=head, sections="\n".join(sections))
    replace_file(path, page.encode("utf-8", "replace").decode())  # JSON can name half of a surrogate pair, a file cannot


def item_of(item: Item) -> str:
    """An item's title, texts, pictures and players."""
    title = f"<p><b>{escape(item.title)}</b></p>" if item.title else ""
    return title + "".join(map(_part, item.parts))


def _part(part: Part) -> str:
    if part.kind in TEXT_KINDS:
        tag = "pre" if part.kind == "code" else "p"
        return f"<{tag}>{escape(str(part.data))}</{tag}>"
    assert isinstance(part.data, bytes)
    name = f"{part.kind}, {part.format}, {len(part.data) / 1024:,.0f} KiB"
    if len(part.data) > MAX_MEDIA_BYTES:
        return f'<p class="note">{escape(name)}: too large for this page</p>'
    family = "image" if part.kind == "page" else part.kind
    family = "application" if part.format not in SUBTYPES or part.format == "pdf" else family
    source = f"data:{family}/{SUBTYPES.get(part.format, 'octet-stream')};base64,{base64.b64encode(part.data).decode()}"
    tags = {
        "image": f'<img src="{source}" alt="{escape(name)}">',
        "audio": f'<audio controls preload="metadata" src="{source}"></audio>',
        "video": f'<video controls loop muted playsinline preload="metadata" src="{source}"></video>',
        "application": f'<a download="{escape(part.kind)}.{escape(part.format)}" href="{source}">{escape(name)}</a>',
    }
    return tags[family]
