"""The page on gates runs as printed, from the first block to the last."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from helpers import build, make_tokenizer

import spul

PAGE = Path(spul.__file__).parents[1] / "docs" / "gates.md"


@pytest.mark.skipif(not PAGE.is_file(), reason="docs/ is not part of an installed package")
def test_the_page_runs_as_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {"model": build("llama").eval(), "tokenizer": make_tokenizer()}
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    printed = capsys.readouterr().out
    assert "[ True False]" in printed
    assert "[ True] Counter({'ValueError': 1})" in printed
    assert sorted(path.name for path in (tmp_path / "out/jane-doe/gate").iterdir()) == ["0", "1", "2", "gate.json"]
    assert names["by_name"].report.recall.share == 1
