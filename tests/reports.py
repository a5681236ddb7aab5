"""Parts of a report in Markdown, and words that several tests expect in it."""

from __future__ import annotations

import re

from evaluations import whole


def section(markdown: str, title: str) -> str:
    found = re.search(rf"^## {re.escape(title)}\n\n(.*?)(?=\n## |\Z)", markdown, flags=re.MULTILINE | re.DOTALL)
    assert found is not None, title
    return found[1].strip()


def cells(text: str) -> list[list[str]]:
    return [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]


def verdict() -> str:
    return whole().metric("membership", "train_forget", "auc_difference", attack="loss").note
