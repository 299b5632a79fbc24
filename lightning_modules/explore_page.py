"""What the search page shows: a query becomes a vector, the vector finds rows, the rows become cards of HTML.

Texts, names and media come from anywhere: all are escaped, pictures and pages are decoded within limits and drawn anew, sounds
and clips are copied into a folder that may be served.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from html import escape
from pathlib import Path
from urllib.parse import quote

import numpy as np
from PIL import Image

from datamodules.decode import decode_part
from datamodules.items import file_part
from datamodules.media.limits import DecodeLimits
from datamodules.record import KIND_OF
from datamodules.sample import KINDS, MEDIA_KINDS, Part
from lightning_modules.embeddings import Embeddings
from lightning_modules.listing import printable
from lightning_modules.search import Searcher

EVERY, ONE = "every modality", "one list"

# Our choice.
THUMBNAIL = 360  # pixels of its longer side
EXCERPT = 400  # letters
MAX_SERVED = 512  # copies of sounds and clips that lie in the folder
MAX_DRAWN = 1024  # thumbnails that are kept

SERVED = "/gradio_api/file="

CSS = """
.hits { --card: var(--background-fill-primary); --rule: var(--border-color-primary); --soft: var(--body-text-color-subdued);
  font-variant-numeric: tabular-nums; line-height: 1.4 }
.hits .note { color: var(--soft); margin: .2rem 0 1rem; font-size: .87rem }
.hits .trouble { border: 1px solid #c2612c; border-left-width: 5px; border-radius: 6px; padding: .8rem 1rem; margin: .4rem 0 }
.hits h3 { display: flex; align-items: baseline; gap: .7em; font-size: 1rem; margin: 1.6rem 0 .55rem; font-weight: 600 }
.hits h3 small { font-weight: 400; font-size: .8rem; color: var(--soft) }
.hits .asked { display: flex; gap: 1rem; align-items: center; border-bottom: 1px solid var(--rule); padding-bottom: .9rem }
.hits .asked img, .hits .asked video { max-height: 6.5rem; max-width: 11rem; width: auto; border-radius: 4px; margin: 0 }
.hits .asked p { margin: 0 } .hits .asked .text { font-size: 1.05rem; -webkit-line-clamp: 3 }
.hits .cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(10.5rem, 1fr)); gap: .8rem }
.hits .card { border: 1px solid var(--rule); border-radius: 8px; background: var(--card); min-width: 0;
  padding: .5rem .65rem .6rem; display: flex; flex-direction: column; gap: .4rem; overflow: hidden }
.hits .tag { display: flex; gap: .6em; align-items: baseline; margin: 0; font-size: .78rem; color: var(--soft) }
.hits .tag b { color: var(--body-text-color); font-size: .95rem } .hits .tag .cos { margin-left: auto }
.hits .tag .new { color: #b4531f; font-weight: 600 }
.hits .bar { height: 3px; border-radius: 2px; background: var(--rule) }
.hits .bar i { display: block; height: 100%; border-radius: 2px; background: var(--color-accent) }
.hits img, .hits video { display: block; width: 100%; height: 9rem; object-fit: contain; border-radius: 4px; margin: 0;
  background: var(--background-fill-secondary) }
.hits video:not(:hover):not(:focus)::-webkit-media-controls-panel { display: none }
.hits audio { width: 100%; height: 36px }
.hits .text { margin: 0; font-size: .85rem; white-space: pre-wrap; overflow-wrap: anywhere; overflow: hidden;
  display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 6 }
.hits .code { font: .75rem/1.45 ui-monospace, Menlo, Consolas, monospace; -webkit-line-clamp: 9 }
.hits .name { margin: auto 0 0; font-size: .72rem; color: var(--soft); white-space: nowrap; overflow: hidden;
  text-overflow: ellipsis }
"""


@dataclass(frozen=True, slots=True)
class Hit:
    """A row that was found: where in its list, its cosine, and whether the full width would not have found it."""

    row: int
    rank: int
    cosine: float
    is_new: bool


@dataclass(frozen=True, slots=True)
class Hits:
    """A list, best first, of a modality (None: of all), out of so many."""

    modality: str | None
    hits: Sequence[Hit]
    num_items: int


class Results:
    """Finds rows and draws them.

    Args:
        embeddings: What is searched.
        folder: Where copies of sounds and clips go, which the page's server may hand out.
        limits: For pictures and pages that are drawn.
    """

    def __init__(self, embeddings: Embeddings, folder: Path, limits: DecodeLimits) -> None:
        self.embeddings, self.folder, self.limits = embeddings, folder, limits
        self.searcher = Searcher(embeddings)
        counts = {kind: embeddings.modalities.count(kind) for kind in (*KINDS, "mixed")}
        self.counts = {kind: count for kind, count in counts.items() if count}
        self._drawn = lru_cache(MAX_DRAWN)(self._drawn_anew)

    def found(self, vector_D: np.ndarray, *, prefix: int, shown: str, k: int) -> list[Hits]:
        """The k nearest, as lists.

        Args:
            vector_D: The query's.
            prefix: Width of the comparison.
            shown: `EVERY`: a list for each modality; `ONE`: a list of all; or a modality: a list of it.
            k: Length of a list.
        """
        lists = list(self.counts) if shown == EVERY else [None] if shown == ONE else [shown]
        return [self._list(vector_D, prefix, modality, k) for modality in lists]

    def _list(self, vector_D: np.ndarray, prefix: int, modality: str | None, k: int) -> Hits:
        def nearest(prefix: int) -> tuple[list[int], list[float]]:
            found = self.searcher.search(vector_D[None], k, prefix=prefix, modality=modality)
            return found.positions[0].tolist(), found.cosines[0].tolist()

        rows, cosines = nearest(prefix)
        full = set(rows if prefix == self.embeddings.width else nearest(self.embeddings.width)[0])
        hits = [
            Hit(row, rank, cosine, row not in full) for rank, (row, cosine) in enumerate(zip(rows, cosines, strict=True), 1)
        ]
        return Hits(modality, hits, len(self.embeddings) if modality is None else self.counts[modality])

    def page(self, lists: Sequence[Hits], prefix: int) -> str:
        """The lists as HTML."""
        return "".join(self._section(found, prefix, is_only=len(lists) == 1) for found in lists)

    def _section(self, found: Hits, prefix: int, *, is_only: bool) -> str:
        told = f"{len(found.hits)} of {found.num_items:,}"
        if prefix < self.embeddings.width:
            kept = sum(not hit.is_new for hit in found.hits)
            told += f" · {kept} of these {len(found.hits)} also at {self.embeddings.width} dimensions"
        heading = "nearest" if found.modality is None else found.modality
        cards = "".join(self._card(hit, names_modality=found.modality is None) for hit in found.hits)
        return (
            f'<section data-modality="{escape(heading)}"><h3>{escape(heading)}<small>{told}</small></h3>'
            f'<div class="cards">{cards}</div></section>'
        )

    def _card(self, hit: Hit, *, names_modality: bool) -> str:
        item = self.embeddings.described(hit.row)
        named = f"<span>{escape(item['modality'])}</span>" if names_modality else ""
        new = '<span class="new" title="not among the nearest at full width">new</span>' if hit.is_new else ""
        name, place = printable(str(item["id"])), printable(str(item["path"] or item["id"]))
        return (
            f'<div class="card" data-row="{hit.row}"><p class="tag"><b>{hit.rank}</b>{named}{new}'
            f'<span class="cos">{hit.cosine:.3f}</span></p>'
            f'<div class="bar"><i style="width: {100 * min(1.0, max(0.0, hit.cosine)):.1f}%"></i></div>'
            f"{self._medium(hit.row)}{excerpt(item['text'], item['modality'])}"
            f'<p class="name" title="{escape(place)}">{escape(name)}</p></div>'
        )

    def _medium(self, row: int) -> str:
        """The first medium of an item; a sentence where it is not to be had."""
        try:
            return self._drawn(row) or self._played(row)
        except (OSError, ValueError) as error:
            return f'<p class="note">cannot be shown: {escape(printable(str(error)))}</p>'

    def _drawn_anew(self, row: int) -> str:
        """A picture; empty where the item has none."""
        found = self.embeddings.medium(row)
        return "" if found is None else picture_html(*found, self.limits)

    def _played(self, row: int) -> str:
        found = self.embeddings.medium(row)
        return "" if found is None else player_html(found[1], self._served(row, *found))

    def _served(self, row: int, data: bytes, format: str) -> Path:
        """A copy that may be served; the oldest ones go."""
        file = self.folder / f"{row}.{format}"
        file.write_bytes(data)
        kept = sorted(self.folder.iterdir(), key=lambda path: path.stat().st_mtime_ns)
        for old in kept[: max(0, len(kept) - MAX_SERVED)]:
            old.unlink(missing_ok=True)
        return file


def asked_html(text: str, file: str | Path | None, limits: DecodeLimits) -> str:
    """What is asked for, once more above what it found."""
    shown = ""
    if file is not None:
        part = file_part(Path(file))
        assert isinstance(part.data, bytes)
        shown = picture_html(part.data, part.format, limits) or player_html(part.format, Path(file))
    return f'<div class="asked">{shown}{excerpt(text.strip(), "text")}</div>'


def picture_html(data: bytes, format: str, limits: DecodeLimits) -> str:
    """A picture, or the first page of a document, drawn small; empty for sounds and clips.

    Raises:
        ValueError: It does not decode, or is of no format that is read.
    """
    kind = kind_of(format)
    if kind not in ("image", "page"):
        return ""
    content = decode_part(Part(kind, data, format), limits).content
    return f'<img src="{_thumbnail(content if kind == "image" else content[0])}" alt="{kind}">'


def kind_of(format: str) -> str:
    """The kind of a medium in a file of some extension."""
    if KIND_OF.get(format) not in MEDIA_KINDS:
        raise ValueError(f"files of the format {format!r} are not shown")
    return KIND_OF[format]


def player_html(format: str, file: Path) -> str:
    """A player of a sound or a clip in a file that is served."""
    address = escape(SERVED + quote(str(file)))
    if kind_of(format) == "audio":
        return f'<audio controls preload="metadata" src="{address}"></audio>'
    return f'<video controls loop muted playsinline preload="metadata" src="{address}"></video>'


def _thumbnail(pixels: np.ndarray) -> str:
    picture = Image.fromarray(pixels)
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def excerpt(text: str | None, modality: str) -> str:
    """The beginning of a text."""
    if not text:
        return ""
    look = "text code" if modality == "code" else "text"
    return f'<p class="{look}">{escape(text[:EXCERPT])}{"…" if len(text) > EXCERPT else ""}</p>'


def trouble(message: str) -> str:
    """What went wrong, in a sentence."""
    return f'<p class="trouble" role="alert">{escape(message)}</p>'
