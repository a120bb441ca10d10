"""What a report is made of, once, and how it is written as one HTML page and as Markdown with its figures beside it."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cola_core.files import new_dir, new_file

__all__ = ["Block", "Details", "Drawing", "Heading", "Table", "Text", "write_html", "write_markdown"]

STYLE = """
:root{--ink:#1a202c;--faint:#718096;--line:#e2e8f0}
body{font:16px/1.55 Georgia,'Times New Roman',serif;max-width:62rem;margin:2.5rem auto;padding:0 1.2rem}
body{color:var(--ink)}
h1{font-size:1.9rem;line-height:1.2}h2{margin-top:2.6rem;border-bottom:1px solid var(--line);padding-bottom:.2rem}
table{border-collapse:collapse;font:13.5px/1.45 system-ui,sans-serif;margin:1rem 0;display:block;overflow-x:auto}
td,th{padding:.22rem .6rem;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th{border-bottom:2px solid var(--ink);vertical-align:bottom}td:first-child,th:first-child{text-align:left}
th.wide{text-align:left}
td.wide{white-space:normal;text-align:left;min-width:16rem}
figure{margin:1.4rem 0}figcaption{color:var(--faint);font-size:.9rem}svg{max-width:100%;height:auto}
code{font:.85em ui-monospace,monospace}summary{cursor:pointer;color:var(--faint)}
""".strip()


@dataclass(frozen=True)
class Heading:
    """A section begins."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Text:
    """Paragraphs, parted by empty lines; `code`, **strong**, - lists and [links](...) as in Markdown, nothing else."""

    text: str


@dataclass(frozen=True)
class Table:
    """Rows of texts under `head`; a first column of names, the others numbers; wide: columns that may wrap."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    wide: Sequence[int] = ()


@dataclass(frozen=True)
class Drawing:
    """An SVG with what it shows."""

    name: str
    svg: str
    caption: str


@dataclass(frozen=True)
class Details:
    """A table that is folded away."""

    summary: str
    table: Table


Block = Heading | Text | Table | Drawing | Details


def write_html(path: Path, title: str, blocks: Sequence[Block]) -> None:
    """One self-contained page: styles and figures inside, nothing loaded from anywhere."""
    body = "\n".join(HTML[type(block)](block) for block in blocks)
    head = f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title>"
    with new_file(path) as temporary:
        temporary.write_text(f"{head}<style>{STYLE}</style>\n{body}\n</html>\n", encoding="utf-8")


def write_markdown(path: Path, blocks: Sequence[Block]) -> None:
    """The same as Markdown; figures go to `figures/` beside it, which holds nothing else afterwards."""
    with new_dir(path.parent / "figures") as folder:
        for block in blocks:
            if isinstance(block, Drawing):
                (folder / f"{block.name}.svg").write_text(block.svg, encoding="utf-8")
    with new_file(path) as temporary:
        temporary.write_text("\n\n".join(MARKDOWN[type(block)](block) for block in blocks) + "\n", encoding="utf-8")


def _html_text(block: Text) -> str:
    return "\n".join(_paragraph(part) for part in block.text.strip().split("\n\n"))


def _paragraph(part: str) -> str:
    lines = part.split("\n")
    if all(line.startswith(("- ", "  ")) for line in lines):
        items = re.split(r"\n?^- ", part, flags=re.MULTILINE)[1:]
        return "<ul>" + "".join(f"<li>{_inline(item)}" for item in items) + "</ul>"
    return f"<p>{_inline(part)}</p>"


def _inline(text: str) -> str:
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text, quote=False))
    text = re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", text)
    return re.sub(r"\[([^\]]+)\]\(([^)\s]+)\)", lambda m: f'<a href="{html.escape(m[2])}">{m[1]}</a>', text)


def _html_table(block: Table) -> str:
    head = _html_row("th", block.head, block.wide)
    rows = "".join(f"<tr>{_html_row('td', row, block.wide)}" for row in block.rows)
    return f"<table><thead><tr>{head}<tbody>{rows}</table>"


def _html_row(tag: str, row: Sequence[str], wide: Sequence[int]) -> str:
    return "".join(f"<{tag}{' class=wide' * (i in wide)}>{_inline(text)}" for i, text in enumerate(row))


def _html_drawing(block: Drawing) -> str:
    svg = block.svg[block.svg.index("<svg") :]
    return f"<figure>{svg}<figcaption>{_inline(block.caption)}</figcaption></figure>"


def _markdown_table(block: Table) -> str:
    lines = [block.head, [":--", *["--:"] * (len(block.head) - 1)], *block.rows]
    return "\n".join("| " + " | ".join(text.replace("|", "\\|") for text in line) + " |" for line in lines)


Writers = dict[type, Callable[[Any], str]]
HTML: Writers = {
    Heading: lambda block: f"<h{block.level}>{_inline(block.text)}</h{block.level}>",
    Text: _html_text,
    Table: _html_table,
    Drawing: _html_drawing,
    Details: lambda block: f"<details><summary>{_inline(block.summary)}</summary>{_html_table(block.table)}</details>",
}
MARKDOWN: Writers = {
    Heading: lambda block: f"{'#' * block.level} {block.text}",
    Text: lambda block: block.text.strip(),
    Table: _markdown_table,
    Drawing: lambda block: f"![{block.caption}](figures/{block.name}.svg)\n\n*{block.caption}*",
    Details: lambda block: (
        f"<details><summary>{block.summary}</summary>\n\n{_markdown_table(block.table)}\n\n</details>"
    ),
}
