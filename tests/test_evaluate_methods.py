"""The example that evaluates methods side by side: its table, its reports, and controls that are measured once."""

from __future__ import annotations

import argparse
import dataclasses
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from evaluations import measurement, whole
from helpers import make_collator, rows
from small_evaluations import ATTACKS, SEED, counted, learned, make_model, make_splits

from spul.evaluation.aggregation import Key
from spul.evaluation.results import Evaluation, read_measurements, write_measurements
from spul.evaluation.settings import digests_of_model
from spul.records.digests import fingerprint

EXAMPLES = Path(__file__).parents[1] / "examples"
MEASURES = ("utility", "kl", "relearning", "sampling")


@pytest.fixture
def example(monkeypatch, few_resamples) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import evaluate_methods

    return evaluate_methods


def test_all_methods_stand_beside_their_controls(example):
    other = [measurement("utility", "test_forget", "unlearned", per_row={"accuracy": [1.0] * 7 + [0.0] * 3})]
    lines = example.table({"SPUL": whole(), "GA": Evaluation({}, other, {})}).splitlines()
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    assert cells[0] == ["", "", "", "SPUL", "GA", "detached", "retrained"]
    assert ["utility", "test forget", "accuracy", "20.0", "70.0", "80.0", "40.0"] in cells
    assert all(len(row) == 7 for row in cells)
    assert all(row[4] == "" for row in cells[2:] if row[:3] != ["utility", "test forget", "accuracy"])


def test_a_report_that_is_missing_is_written_and_one_that_is_there_is_left(example, tmp_path):
    whole().save(tmp_path)
    args: Any = argparse.Namespace()
    found = example.evaluated(args, None, None, tmp_path)
    assert found.measurements == whole().measurements
    assert "detached" in (tmp_path / "report.md").read_text()
    (tmp_path / "report.md").write_text("mine")
    example.evaluated(args, None, None, tmp_path)
    assert (tmp_path / "report.md").read_text() == "mine"


# ---- controls ----


def once(example: ModuleType, folder: Path, trainable: str, **changes: Any) -> Evaluation:
    """The evaluation of a model on that trainable, beside the same retrained one."""
    given = {"splits": make_splits(), "collator": make_collator(), "retrained": learned(0.1, 1), "seed": SEED}
    given |= {"attacks": ATTACKS, "measures": MEASURES, "base": learned() if trainable == "whole" else None}
    return example.evaluated_once(folder, model=make_model(trainable), **given | changes)


def mark(folder: Path) -> None:
    """Change what was measured of the controls, so that it is known again."""
    path = folder / "measurements.jsonl"
    found = [
        one if one.model == "unlearned" else dataclasses.replace(one, overall={**one.overall, "mark": 7.0})
        for one in read_measurements(path)
    ]
    write_measurements(path, found)


def controls(found: Evaluation) -> list[Any]:
    return [one for one in found.measurements if one.model != "unlearned"]


@pytest.mark.parametrize("trainable", ["prefix_tuning", "layers", "lora", "whole"])
def test_controls_are_measured_once_for_all_methods(example, tmp_path, monkeypatch, trainable):
    whole_anew = once(example, tmp_path / "elsewhere" / "second", trainable)
    once(example, tmp_path / "first", "prompt_tuning")
    mark(tmp_path / "first")
    first = read_measurements(tmp_path / "first" / "measurements.jsonl")
    done = counted(monkeypatch)
    second = once(example, tmp_path / "second", trainable)
    assert done
    assert all(" unlearned" in task for task in done)
    assert controls(second) == [one for one in first if one.model != "unlearned"]
    assert {one.overall["mark"] for one in controls(second)} == {7.0}
    mine = [one for one in second.measurements if one.model == "unlearned"]
    assert mine == [one for one in whole_anew.measurements if one.model == "unlearned"]
    assert mine != [one for one in first if one.model == "unlearned"]
    # but for the marks they are what would have been measured
    for one, anew in zip(controls(second), controls(whole_anew), strict=True):
        assert (one.key, one.per_row) == (anew.key, anew.per_row)
        assert {name: value for name, value in one.overall.items() if name != "mark"} == anew.overall


def test_another_rate_of_relearning_the_prompt_is_no_other_control(example, tmp_path, monkeypatch):
    once(example, tmp_path / "first", "prompt_tuning")
    done = counted(monkeypatch)
    once(example, tmp_path / "second", "prompt_tuning", attacks=dataclasses.replace(ATTACKS, relearn_lr=0.5))
    assert all(" unlearned" in task for task in done)


def test_what_was_not_measured_before_is_measured_now(example, tmp_path, monkeypatch):
    once(example, tmp_path / "first", "prompt_tuning", measures=("sampling",))
    mark(tmp_path / "first")
    done = counted(monkeypatch)
    second = once(example, tmp_path / "second", "layers", measures=("sampling", "kl"))
    assert {one.key for one in second.measurements if one.measure == "kl"} == {
        Key("kl", f"{split}_retain", model) for split in ("train", "test") for model in ("unlearned", "retrained")
    }
    assert sum(task.startswith("kl") for task in done) == 2  # both models in one pass of the base, a split each
    assert {one.model for one in second.measurements if "mark" in one.overall} == {"detached", "retrained"}


@pytest.mark.parametrize(
    "change",
    [
        {"retrained": lambda: learned(0.1, 2)},
        {"retrained": lambda: None},
        {"base": lambda: learned(0.1, 2)},
        {"splits": lambda: make_splits(test_forget=rows("doe", 6))},
        {"seed": lambda: 6},
        {"attacks": lambda: dataclasses.replace(ATTACKS, relearn_model_lr=0.004)},
        {"collator": lambda: make_collator(append_eos=True)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_controls_of_other_settings_are_measured_anew(example, tmp_path, change):
    once(example, tmp_path / "first", "prompt_tuning")
    mark(tmp_path / "first")
    second = once(example, tmp_path / "second", "whole", **{name: make() for name, make in change.items()})
    assert controls(second)
    assert not any("mark" in one.overall for one in second.measurements)


def test_controls_of_an_evaluation_that_was_not_finished_are_not_taken(example, tmp_path):
    once(example, tmp_path / "first", "prompt_tuning")
    mark(tmp_path / "first")
    (tmp_path / "first" / "evaluation.json").unlink()
    assert not any("mark" in one.overall for one in once(example, tmp_path / "second", "layers").measurements)


@pytest.mark.parametrize("known", [(True, True), (False, True), (True, False)])
def test_weights_that_are_not_in_memory_are_not_taken_for_the_same(example, tmp_path, known):
    found = once(example, tmp_path / "elsewhere" / "first", "prompt_tuning", measures=("sampling",))
    detached = fingerprint(learned()) if known[0] else None
    retrained = learned(0.1)
    if not known[1]:  # offloaded
        retrained.lm_head.weight = torch.nn.Parameter(retrained.lm_head.weight.to("meta"))
    models = {**found.settings["models"], "retrained": digests_of_model(retrained)}
    for name in ("first", "second"):
        example.reuse_controls(tmp_path / name, {**found.settings, "models": models}, detached)
        taken = read_measurements(tmp_path / name / "measurements.jsonl")
        found.save(tmp_path / name)
    assert bool(taken) == all(known)
