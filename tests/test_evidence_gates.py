"""The example of text gates: which lines of earlier calls it takes, and shows in its table."""

import sys
from types import SimpleNamespace

import pytest


@pytest.fixture
def run(examples, monkeypatch, tmp_path):
    """A function of options that runs the command and returns the gates it measures and those in the table."""
    import evidence_gates as example

    measured = []

    def line(args, experiment, key):
        measured.append((key["gate"], key["seed"]))
        return key | {"report": "", "test": {"forget": [1], "retain": [0]}, "inputs": []}

    def experiment(plan, seed, model, data_dir, folder):
        return SimpleNamespace(setup=SimpleNamespace(seed=seed), digest=f"{model} {data_dir} {seed}")

    monkeypatch.setattr(example, "measured", line)
    monkeypatch.setattr(example.Plan, "experiment", experiment)

    def run(*options):
        measured.clear()
        given = ["--model", "m", "--data-dir", "d", "--gates", "text gate", "--output-dir", str(tmp_path), *options]
        monkeypatch.setattr(sys, "argv", ["evidence_gates.py", *given])
        example.main()
        rows = [row.split(" | ") for row in (tmp_path / "table.md").read_text().splitlines()[2:]]
        return [*measured], [(row[0].removeprefix("| "), int(row[1])) for row in rows]

    return run


def test_the_table_has_the_lines_of_earlier_calls_on_the_same_data_and_options(run):
    first, second = ("text gate", 1), ("text gate", 2)
    prose = ("text gate, prose", 2)
    assert run("--seeds", "1") == ([first], [first])
    assert run("--seeds", "2") == ([second], [first, second])
    assert run("--seeds", "2", "--gates", prose[0], "--prose-dir", "p") == ([prose], [first, second, prose])
    assert run("--seeds", "1") == ([], [first, second, prose])
    assert run("--seeds", "1", "--passages", "3") == ([], [first, second])
    more = ("--gates", *(gate for gate, _ in (first, prose)), "--prose-dir", "p", "--passages", "3")
    assert run("--seeds", "2", *more) == ([prose], [first, second, prose])
    assert run("--seeds", "1", "--attacked", "0") == ([first], [first])
    for option in ("--data-dir", "--model"):
        assert run("--seeds", "1", option, "other") == ([first], [first])
