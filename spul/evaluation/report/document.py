"""A report of sections, as Markdown and as one HTML page; all text is plain and is escaped."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

STYLE = """\
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 70em; margin: 2em auto; padding: 0 1em; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2em; }
div { overflow-x: auto; }
table { border-collapse: collapse; font-size: 14px; }
th, td { text-align: left; vertical-align: top; padding: .25em .8em .25em 0; border-bottom: 1px solid #ddd; }
th { border-bottom: 2px solid #888; }
img { max-width: 100%; }"""


@dataclass(frozen=True)
class Section:
    """A heading, paragraphs, and below them a figure and a table, where there are any.

    Attributes:
        title: the heading.
        texts: paragraphs.
        columns: the table's head.
        rows: its cells, one for each column.
        figure: its name among the figures.
    """

    title: str
    texts: Sequence[str] = ()
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    figure: str = ""


def to_markdown(title: str, sections: Sequence[Section], figures: Mapping[str, str]) -> str:
    """Sections as Markdown.

    Args:
        title: of the whole.
        sections: in their order.
        figures: by name, where the image lies, relative to the text; sections show those that are there.
    """
    parts = [f"# {_markdown(title)}"]
    for section in sections:
        parts.append(f"## {_markdown(section.title)}")
        parts += [_markdown(text) for text in section.texts]
        if section.figure in figures:
            parts.append(f"![{_markdown(section.title)}]({figures[section.figure]})")
        if section.rows:
            lines = [section.columns, ["---"] * len(section.columns), *section.rows]
            parts.append("\n".join(f"| {' | '.join(map(_markdown, line))} |" for line in lines))
    return "\n\n".join(parts) + "\n"


def to_html(title: str, sections: Sequence[Section], figures: Mapping[str, bytes]) -> str:
    """Sections as one HTML page that needs nothing else: no scripts, nothing to load.

    Args:
        title: of the whole.
        sections: in their order.
        figures: by name, the bytes of a PNG; sections show those that are there.
    """
    parts = [f"<h1>{escape(title)}</h1>"]
    for section in sections:
        parts.append(f"<h2>{escape(section.title)}</h2>")
        parts += [f"<p>{escape(text)}</p>" for text in section.texts]
        if section.figure in figures:
            image = base64.b64encode(figures[section.figure]).decode("ascii")
            parts.append(f'<p><img src="data:image/png;base64,{image}" alt="{escape(section.title)}"></p>')
        if section.rows:
            lines = [_html_row("th", section.columns), *(_html_row("td", row) for row in section.rows)]
            parts.append("<div><table>\n" + "\n".join(lines) + "\n</table></div>")
    head = f'<meta charset="utf-8">\n<title>{escape(title)}</title>\n<style>\n{STYLE}\n</style>'
    body = "\n".join(parts)
    return f'<!DOCTYPE html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n{body}\n</body>\n</html>\n'


def _html_row(tag: str, cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"


def _markdown(text: str) -> str:
    """Plain text on one line, with what Markdown would take for markup made harmless."""
    text = escape(" ".join(text.split()), quote=False)
    for mark in ("\\", "`", "*", "|"):
        text = text.replace(mark, "\\" + mark)
    return text.replace("](", "]\\(")
