"""Stored lines of the evidence, and the tables of the pages that show them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / "docs"
DATA = DOCS / "data" / "evidence"


def read(name: str) -> list[dict[str, Any]]:
    """The lines of a file of `docs/data/evidence/`."""
    return [json.loads(line) for line in (DATA / name).read_text().splitlines()]


def tables_of(page: str, heading: str) -> list[list[list[str]]]:
    """The tables behind a heading of a page, up to the next heading: cells of each line, the head's first."""
    _, marks, behind = re.split(rf"^(#+) {re.escape(heading)}$", (DOCS / page).read_text(), flags=re.MULTILINE)
    section = re.split(rf"^#{{1,{len(marks)}}} ", behind, flags=re.MULTILINE)[0]
    return [cells_of(table) for table in re.findall(r"(?:^\|.*\n?)+", section, re.MULTILINE)]


def cells_of(table: str) -> list[list[str]]:
    """The cells of a Markdown table, its head first."""
    head, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines())
    return [head, *rows]
