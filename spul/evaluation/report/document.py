"""Sections of a report, rendered as Markdown and as one HTML page; all text is plain and is escaped."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ...records.templates import render


@dataclass(frozen=True)
class Section:
    """Part of a report: heading, paragraphs, an optional figure and an optional table.

    Attributes:
        title: the heading.
        texts: paragraphs.
        columns: the table's head.
        rows: its cells, one for each column.
        figure: name of the figure.
    """

    title: str
    texts: Sequence[str] = ()
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    figure: str = ""


def to_markdown(title: str, sections: Sequence[Section], figures: Mapping[str, str]) -> str:
    """Render sections as Markdown.

    Args:
        title: of the whole.
        sections: in their order.
        figures: name to the image's path, relative to the text; figures of sections that are not here are skipped.
    """
    return render("evaluation/report/report.md.jinja", title=title, sections=sections, figures=figures)


def to_html(title: str, sections: Sequence[Section], figures: Mapping[str, bytes]) -> str:
    """Render sections as one HTML page without scripts and external files.

    Args:
        title: of the whole.
        sections: in their order.
        figures: name to the bytes of a PNG; figures of sections that are not here are skipped.
    """
    images = {name: base64.b64encode(png).decode("ascii") for name, png in figures.items()}
    return render("evaluation/report/report.html.jinja", title=title, sections=sections, figures=images)
