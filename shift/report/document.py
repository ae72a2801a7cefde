"""A document of headings, paragraphs, lists, tables and pictures, as Markdown and as one HTML file.

Text is plain: whatever it holds, names and messages out of files too, the reader sees those characters and
nothing else. What is to look like code is a :class:`Code`. Control characters, which no reader can see, and
halves of surrogate pairs, which no file can hold, become U+FFFD; line breaks become spaces.
"""

from __future__ import annotations

import base64
import html
import re
import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from shift.report.words import visible
from shift_kernels.errors import input_error


@dataclass(frozen=True)
class Code:
    """A piece of text that is shown as code."""

    text: str


Text = str | tuple[str | Code, ...]
"""Plain text, or pieces of it one after the other."""


@dataclass(frozen=True)
class Heading:
    text: Text


Kind = Literal["", "lead", "note"]
"""Of a text: "" (body), "lead" (the one thing to read) or "note" (small print)."""


@dataclass(frozen=True)
class Paragraph:
    text: Text
    kind: Kind = ""

    def __post_init__(self) -> None:
        _check_kind(self.kind)


@dataclass(frozen=True)
class Items:
    items: Sequence[Text]
    kind: Kind = ""

    def __post_init__(self) -> None:
        _check_kind(self.kind)


@dataclass(frozen=True)
class Key:
    """A table cell with the colour that the thing has in the pictures.

    Raises:
        ShiftInputError: a colour that is not ``#rrggbb``.
    """

    text: Text
    colour: str

    def __post_init__(self) -> None:
        if not re.fullmatch(r"#[0-9a-fA-F]{6}", self.colour):
            raise input_error("Key", "colour", self.colour, "'#rrggbb'", "Give the colour in hexadecimal.")


@dataclass(frozen=True)
class Share:
    """A table cell shaded by its value in [0, 1]."""

    value: float
    text: Text


@dataclass(frozen=True)
class Tick:
    """A table cell: whether something holds."""

    ok: bool


TICK = {True: "✓", False: "✗"}


Cell = Text | Key | Share | Tick


@dataclass(frozen=True)
class Table:
    header: Sequence[Text]
    rows: Sequence[Sequence[Cell]]


@dataclass(frozen=True)
class Picture:
    path: Path
    """A PNG; the document refers to it relative to its own directory, or holds it."""
    caption: Text


Block = Heading | Paragraph | Items | Table | Picture


def _check_kind(kind: str) -> None:
    if kind not in ("", "lead", "note"):
        raise input_error("Paragraph", "kind", kind, "'', 'lead' or 'note'", "Choose one of them.")


def _pieces(text: Text) -> list[tuple[str, bool]]:
    """(characters, whether they are code) of each piece."""
    pieces = (text,) if isinstance(text, str) else text
    return [
        (visible(piece.text if isinstance(piece, Code) else piece), isinstance(piece, Code))
        for piece in pieces
    ]


# Markdown


def markdown(title: Text, blocks: Sequence[Block], directory: Path) -> str:
    """The document as GitHub-flavoured Markdown that stands in ``directory``."""
    parts = [f"# {_markdown(title)}", *(block_markdown(block, directory) for block in blocks)]
    return "\n\n".join(parts) + "\n"


def block_markdown(block: Block, directory: Path) -> str:
    """One block of it; ``directory`` as for :func:`markdown`."""
    match block:
        case Heading():
            return f"## {_markdown(block.text)}"
        case Paragraph():
            text = _markdown(block.text)
            return f"**{text}**" if text and block.kind == "lead" else text
        case Items():
            return "\n".join(f"- {_markdown(item)}" for item in block.items)
        case Picture():
            path = urllib.parse.quote(block.path.relative_to(directory).as_posix())
            caption = _markdown(block.caption)
            return f"![{caption}]({path})\n\n{caption}"
        case Table():
            rows = [[_markdown_cell(cell) for cell in row] for row in (block.header, *block.rows)]
            rows.insert(1, ["---"] * len(block.header))
            return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _markdown_cell(cell: Cell) -> str:
    if isinstance(cell, Tick):
        return TICK[cell.ok]
    text = cell.text if isinstance(cell, (Key, Share)) else cell
    # A stroke ends the cell, within code too, where no backslash helps.
    pieces = (text,) if isinstance(text, str) else text
    return _inline(tuple(p.text if isinstance(p, Code) and "|" in p.text else p for p in pieces))


def _markdown(text: Text) -> str:
    written = _inline(text)
    # What would begin a quotation, a list or a rule at the start of a line.
    return re.sub(r"^(\d{1,9}(?=[.)](?: |$))|(?=>|[+-](?:[ -]|$)))", r"\1\\", written)


def _inline(text: Text) -> str:
    return "".join(_code_span(part) if code else _escape(part) for part, code in _pieces(text)).strip(" ")


def _escape(text: str) -> str:
    """Each character that Markdown might take as its own stands behind a backslash."""
    text = re.sub(r"[\\`*<&|~$#]", r"\\\g<0>", text)
    # Between letters or digits an underscore never begins or ends emphasis.
    text = re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\_", text)
    # Brackets are links only where something of this follows, or a box to tick at the start.
    links = re.search(r"\][\[(:]|!\[|\[\^|^ *\[[ xX]\]", text)
    return re.sub(r"[\[\]]", r"\\\g<0>", text) if links else text


def _code_span(text: str) -> str:
    """Between more backticks than ever stand together in it."""
    if not text.strip():
        return text
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    pad = " " if text[0] in "` " or text[-1] in "` " else ""
    return f"{fence}{pad}{text}{pad}{fence}"


# HTML


def web_page(title: Text, blocks: Sequence[Block]) -> str:
    """The document as one HTML file that needs no other."""
    parts = {
        "name": html.escape("".join(part for part, _ in _pieces(title))),
        "title": _html(title),
        "body": "\n".join(_block_html(block) for block in blocks),
    }
    return re.sub(r"\{(name|title|body)\}", lambda mark: parts[mark[1]], PAGE)


def _block_html(block: Block) -> str:
    match block:
        case Heading():
            return f"<h2>{_html(block.text)}</h2>"
        case Paragraph():
            return f"<p{_class(block.kind)}>{_html(block.text)}</p>"
        case Items():
            items = "".join(f"<li>{_html(item)}</li>" for item in block.items)
            return f"<ul{_class(block.kind)}>{items}</ul>"
        case Picture():
            data = base64.b64encode(block.path.read_bytes()).decode()
            caption = html.escape("".join(part for part, _ in _pieces(block.caption)))
            return (
                f'<figure><img alt="{caption}" src="data:image/png;base64,{data}">'
                f"<figcaption>{_html(block.caption)}</figcaption></figure>"
            )
        case Table():
            head = "".join(f"<th>{_html(cell)}</th>" for cell in block.header)
            rows = "".join(f"<tr>{''.join(_html_cell(cell) for cell in row)}</tr>\n" for row in block.rows)
            return (
                f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
            )


def _html_cell(cell: Cell) -> str:
    match cell:
        case Key():
            dot = f'<span class="dot" style="background:{cell.colour}"></span>'
            return f'<td class="key">{dot}{_html(cell.text)}</td>'
        case Share():
            shade = f"background:rgba(0,114,178,{0.55 * min(max(cell.value, 0), 1) ** 2:.2f})"
            return f'<td class="share" style="{shade}">{_html(cell.text)}</td>'
        case Tick():
            return f'<td class="{"yes" if cell.ok else "no"}">{TICK[cell.ok]}</td>'
        case _:
            return f"<td>{_html(cell)}</td>"


def _class(kind: Kind) -> str:
    return f' class="{kind}"' if kind else ""


def _html(text: Text) -> str:
    escaped = ((html.escape(part, quote=False), code) for part, code in _pieces(text))
    return "".join(f"<code>{part}</code>" if code else part for part, code in escaped)


PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light">
<title>{name}</title>
<style>
body { margin: 0; background: #fff; color: #1c1f23;
  font: 16px/1.55 system-ui, "Segoe UI", Helvetica, Arial, sans-serif; }
main { max-width: 800px; margin: 0 auto; padding: 2rem 1rem 4rem; overflow-wrap: break-word; }
h1 { font-size: 1.8rem; line-height: 1.2; margin: 0 0 1rem; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .8rem; padding-top: 1rem; border-top: 1px solid #dfe3e8; }
p, ul { margin: .7rem 0; }
ul { padding-left: 1.2rem; }
p.lead { font-size: 1.15rem; font-weight: 600; background: #f3f6f9; border-left: 4px solid #d55e00;
  padding: .8rem 1rem; }
.note, figcaption { font-size: .88rem; color: #58616b; }
figure { margin: 1.2rem 0; overflow-x: auto; }
img { display: block; width: 100%; min-width: 560px; height: auto; }
.wide { overflow-x: auto; margin: .8rem 0; }
table { border-collapse: collapse; font-size: .88rem; line-height: 1.4; min-width: 100%;
  font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .4rem .7rem; border-bottom: 1px solid #e8ebee; }
th { border-bottom: 2px solid #c5ccd3; font-weight: 600; vertical-align: bottom; }
td.share { text-align: right; }
td.yes { color: #00694c; font-weight: 700; }
td.no { color: #b3261e; font-weight: 700; }
td.key { min-width: 9rem; padding-left: 1.9em; text-indent: -1.2em; }
.dot { display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin-right: .5em; }
code { font: .9em ui-monospace, Menlo, Consolas, monospace; background: #f3f6f9; padding: .1em .3em;
  overflow-wrap: anywhere; }
@media print { main { max-width: none; padding: 0; } figure, tr { break-inside: avoid; } }
</style>
</head>
<body>
<main>
<h1>{title}</h1>
{body}
</main>
</body>
</html>
"""
