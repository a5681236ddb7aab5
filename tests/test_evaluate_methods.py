"""The example that evaluates methods side by side: its table."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from evaluations import measurement, whole

from spul.evaluation.results import Evaluation

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_all_methods_stand_beside_their_controls(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    for name in ("evaluate_methods", "experiment", "reproduce", "runs"):
        sys.modules.pop(name, None)
    from evaluate_methods import table

    other = [measurement("utility", "test_forget", "unlearned", per_row={"accuracy": [1.0] * 7 + [0.0] * 3})]
    lines = table({"SPUL": whole(), "GA": Evaluation({}, other, {})}).splitlines()
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    assert cells[0] == ["", "", "", "SPUL", "GA", "detached", "retrained"]
    assert ["utility", "test forget", "accuracy", "20.0", "70.0", "80.0", "40.0"] in cells
    assert all(len(row) == 7 for row in cells)
    assert all(row[4] == "" for row in cells[2:] if row[:3] != ["utility", "test forget", "accuracy"])
