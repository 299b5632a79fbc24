"""A section of tables that a terminal and a page show alike; what it holds may come from anywhere and is only text."""

from dataclasses import dataclass
from html import escape

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

CSS = """
.words { text-align: left } td.folded { text-align: left; white-space: normal; overflow-wrap: anywhere; min-width: 9rem }
td.marked { color: var(--bad) } .sample { grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr)) }
"""


@dataclass(frozen=True, slots=True)
class Listing:
    """Rows of cells under their columns.

    Args:
        columns: Their heads; one that begins with `<` is flush left, with `<<` it is also folded, others are flush right.
        rows: As many cells each; none drops the table.
        marked: What a cell says that tells of a fault.
    """

    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    marked: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Section:
    """Tables under a heading.

    Args:
        name: Its anchor in the page.
        heading: Above it.
        note: A sentence or two on what is shown.
        listings: The tables.
        html: What only the page shows after them, escaped.
    """

    name: str
    heading: str
    note: str = ""
    listings: tuple[Listing, ...] = ()
    html: str = ""

    def print(self, console: Console) -> None:
        """Show its tables in a terminal; nothing where it has none."""
        if not self.listings:
            return
        console.print(Text(self.heading, style="bold"))
        console.print(Text(self.note, style="dim"))
        for listing in self.listings:
            if listing.rows:
                console.print(_terminal_table(listing))
        console.print()

    def page(self) -> str:
        """Its HTML."""
        tables = "".join(_page_table(listing) for listing in self.listings if listing.rows)
        return (
            f'<section id="{self.name}"><h2>{escape(self.heading)}</h2><p class="note">{escape(self.note)}</p>'
            f"{tables}{self.html}</section>"
        )


def _terminal_table(listing: Listing) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in listing.columns:
        justify = "left" if column.startswith("<") else "right"
        table.add_column(column.lstrip("<"), overflow="fold", no_wrap=not column.startswith("<<"), justify=justify)
    for row in listing.rows:
        table.add_row(*(Text(printable(cell), "red" if cell in listing.marked else "") for cell in row))
    return table


def printable(text: str) -> str:
    """On one line, without what a terminal would obey."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in " ".join(text.split()))


def _page_table(listing: Listing) -> str:
    looks = ["folded" if column.startswith("<<") else "words" if column.startswith("<") else "" for column in listing.columns]
    head = "".join(
        f'<th scope="col" class="{look and "words"}">{escape(column.lstrip("<"))}</th>'
        for column, look in zip(listing.columns, looks, strict=True)
    )
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>'
        + "".join(
            f'<td class="{look}{" marked" if cell in listing.marked else ""}">{escape(cell)}</td>'
            for cell, look in zip(row[1:], looks[1:], strict=True)
        )
        + "</tr>"
        for row in listing.rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
