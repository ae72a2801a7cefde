"""A document of headings, paragraphs, lists, tables and pictures, as Markdown and as one HTML file.

Text may hold `code` between backticks, and nothing else that is marked up.
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Heading:
    text: str


@dataclass(frozen=True)
class Paragraph:
    text: str
    kind: str = ""
    """"" (body), "lead" (the one thing to read) or "note" (small print)."""


@dataclass(frozen=True)
class Items:
    items: Sequence[str]
    kind: str = ""
    """"" or "note"."""


@dataclass(frozen=True)
class Key:
    """A table cell with the colour that the thing has in the pictures."""

    text: str
    colour: str


@dataclass(frozen=True)
class Share:
    """A table cell shaded by its value in [0, 1]."""

    value: float
    text: str


@dataclass(frozen=True)
class Tick:
    """A table cell: whether something holds."""

    ok: bool


Cell = str | Key | Share | Tick


@dataclass(frozen=True)
class Table:
    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]


@dataclass(frozen=True)
class Picture:
    path: Path
    """A PNG; the document refers to it relative to its own directory, or holds it."""
    caption: str


FEW_COLUMNS = 5
"""Tables with more may be broader than the text, where the window is."""

Block = Heading | Paragraph | Items | Table | Picture


def markdown(title: str, blocks: Sequence[Block], directory: Path) -> str:
    """The document as GitHub-flavoured Markdown that stands in ``directory``."""
    return "\n\n".join([f"# {title}", *(block_markdown(block, directory) for block in blocks)]) + "\n"


def web_page(title: str, blocks: Sequence[Block]) -> str:
    """The document as one HTML file that needs no other."""
    body = "\n".join(_html(block) for block in blocks)
    return PAGE.replace("{title}", html.escape(title)).replace("{body}", body)


def block_markdown(block: Block, directory: Path) -> str:
    """One block of it; ``directory`` as for :func:`markdown`."""
    match block:
        case Heading():
            return f"## {block.text}"
        case Paragraph():
            return f"**{block.text}**" if block.kind == "lead" else block.text
        case Items():
            return "\n".join(f"- {item}" for item in block.items)
        case Picture():
            return f"![{block.caption}]({block.path.relative_to(directory).as_posix()})\n\n{block.caption}"
        case Table():
            rows = [block.header, ["---"] * len(block.header)]
            rows += [[_plain(cell).replace("|", "\\|") for cell in row] for row in block.rows]
            return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _plain(cell: Cell) -> str:
    if isinstance(cell, Tick):
        return "✓" if cell.ok else "✗"
    return cell if isinstance(cell, str) else cell.text


def _html(block: Block) -> str:
    match block:
        case Heading():
            return f"<h2>{_text(block.text)}</h2>"
        case Paragraph():
            return f"<p{_class(block.kind)}>{_text(block.text)}</p>"
        case Items():
            return (
                f"<ul{_class(block.kind)}>" + "".join(f"<li>{_text(i)}</li>" for i in block.items) + "</ul>"
            )
        case Picture():
            data = base64.b64encode(block.path.read_bytes()).decode()
            caption = html.escape(block.caption, quote=True)
            return (
                f'<figure><img alt="{caption}" src="data:image/png;base64,{data}">'
                f"<figcaption>{_text(block.caption)}</figcaption></figure>"
            )
        case Table():
            head = "".join(f"<th>{_text(cell)}</th>" for cell in block.header)
            rows = "".join(f"<tr>{''.join(_html_cell(cell) for cell in row)}</tr>\n" for row in block.rows)
            return (
                f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
            )


def _html_cell(cell: Cell) -> str:
    match cell:
        case Key():
            dot = f'<span class="dot" style="background:{cell.colour}"></span>'
            return f'<td class="key">{dot}{_text(cell.text)}</td>'
        case Share():
            shade = f"background:rgba(0,114,178,{0.55 * min(max(cell.value, 0), 1) ** 2:.2f})"
            return f'<td class="share" style="{shade}">{_text(cell.text)}</td>'
        case Tick():
            return f'<td class="{"yes" if cell.ok else "no"}">{_plain(cell)}</td>'
        case _:
            return f"<td>{_text(cell)}</td>"


def _class(kind: str) -> str:
    return f' class="{kind}"' if kind else ""


def _text(text: str) -> str:
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", html.escape(text, quote=False))


PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light">
<title>{title}</title>
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
@media (min-width: 1100px) { .broad { margin: .8rem -130px; } }
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
