"""The example that measures on a real model: its plan, the choice among candidates, the order of jobs, its table."""

import argparse
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DATA = ROOT / "docs" / "data" / "evidence"


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import evidence_sst2

    return evidence_sst2


@pytest.fixture
def plan(example):
    return example.Plan.read(example.PLAN)


def read(name):
    return [json.loads(line) for line in (DATA / name).read_text().splitlines()]


def test_every_system_of_the_plan_can_be_built_and_has_as_many_candidates(example, plan):
    from evidence.systems import BUILDERS

    assert {system.kind for system in plan.systems} <= set(BUILDERS)
    numbers = {system.name: len(system.candidates) for system in plan.systems if system.kind != "model"}
    assert numbers.pop("SPUL, prefix with fitted keys") == 1  # added later, see the page's changes
    assert set(numbers.values()) == {4}


def test_a_system_of_an_unknown_kind_is_refused(example):
    from evidence.plan import System

    with pytest.raises(ValueError, match="kind='magic'; expected one of model, prompt"):
        System("mine", "magic")


def test_forgetting_is_not_bought_by_retain_beyond_the_margin(plan):
    assert plan.cost(forget=0.2, retain_loss=0.01) == plan.cost(forget=0.2, retain_loss=-0.3) == 0.2
    assert plan.cost(forget=0.0, retain_loss=0.21) == pytest.approx(0.4)


def test_the_choice_is_the_cheapest_candidate_and_the_cheapest_systems_are_attacked(example, plan):
    def trial(system, candidate, cost):
        return {"system": system, "candidate": candidate, "cost": cost, "settings": {"n": candidate}, "scores": {}}

    trials = [trial("ECO", 1, 0.3), trial("ECO", 0, 0.3), trial("ECO", 2, 0.5), trial("IDK, LoRA", 0, 0.1)]
    found = example.choose(plan, trials)
    assert found["systems"]["ECO"]["settings"] == {"n": 0}  # the first of equal ones
    assert found["attacked"] == ["IDK, LoRA", "ECO"]


def test_the_stored_trials_lead_to_the_settings_of_the_stored_scores(example, plan):
    chosen = example.choose(plan, read("sst2-smollm2-trials.jsonl"))["systems"]
    kinds = {system.name: system.kind for system in plan.systems}
    scored = [one for one in read("sst2-smollm2-scores.jsonl") if kinds[one["system"]] in ("prompt", "gated", "lora")]
    assert len(scored) == 8
    for one in scored:
        assert one["settings"] == chosen[one["system"]]["settings"] | {"steps": 200}


def test_a_line_that_breaks_off_is_taken_out_and_lines_of_another_model_are_refused(example, tmp_path):
    path, line = tmp_path / "trials.jsonl", json.dumps({"job": "a", "model": "small"}) + "\n"
    assert example.known_records(path, "x/small") == []
    path.write_text(line + line[:12])
    with pytest.warns(UserWarning, match="line 2 breaks off"):
        assert example.known_records(path, "x/small") == [{"job": "a", "model": "small"}]
    assert path.read_text() == line
    with pytest.raises(SystemExit, match="is of small, not of x/large"):
        example.known_records(path, "x/large")


def test_a_system_with_candidates_is_not_scored_without_a_choice(example, plan, tmp_path):
    args = argparse.Namespace(chosen=None, output_dir=tmp_path, systems=["base", "ECO"])
    with pytest.raises(SystemExit, match="does not exist; run `choose` first"):
        example.choice_of(args, plan)
    (tmp_path / "chosen.json").write_text(json.dumps({"systems": {"IDK, LoRA": {}}, "attacked": []}))
    with pytest.raises(SystemExit, match="has no settings for ECO; run `choose`"):
        example.choice_of(args, plan)
    args.systems = ["base", "IDK, LoRA"]
    assert list(example.choice_of(args, plan)["systems"]) == ["IDK, LoRA"]


def test_nothing_is_scored_before_its_models_are_memorized_and_nothing_tried_before_the_first(example, plan):
    args = argparse.Namespace(stage="choose", systems=None, seeds=None)
    order = list(example.jobs_of(args, plan))
    base = example.Job("memorize", plan.choosing_seed, "base")
    assert order[0] == (base, set())
    assert all(needs == {base.key} for job, needs in order if job.kind == "trial")
    assert {job.seed for job, _ in order if job.kind == "memorize"} == set(plan.seeds)
    scored = list(example.jobs_of(argparse.Namespace(**vars(args) | {"stage": "score"}), plan))
    for job, needs in scored:
        if job.kind == "score":
            assert needs == {example.Job("memorize", job.seed, name).key for name in ("base", "retrained")}
    assert sum(job.kind == "score" for job, _ in scored) == len(plan.systems) * len(plan.seeds)


def test_the_table_of_the_results_page_is_that_of_the_stored_scores(example, plan):
    from evidence import tables

    records = read("sst2-smollm2-scores.jsonl")
    made = tables.table(records, [system.name for system in plan.systems]).splitlines()[2:]
    later = read("sst2-smollm2-fitted-keys.jsonl")  # beside a base of its own, which the text gives
    made += tables.table(later, ["SPUL, prefix with fitted keys"]).splitlines()[2:]
    page = (ROOT / "docs" / "results.md").read_text().split("## On SmolLM2")[1].split("![")[0]
    shown = [line for line in page.splitlines() if line.startswith("| ")][1:]
    assert len(shown) == len(made)

    def numbers(line):
        return re.findall(r"[-+]?\d+\.\d", line.split("|", 3)[3])

    by_seeds = sorted(numbers(line) for line in made)
    for line in shown:
        own = numbers(line)
        match = [one for one in by_seeds if one == own or [one[0], *one[2:]] == own]  # one seed is not repeated
        assert match, line


def test_retain_is_compared_on_the_same_rows_with_an_interval_over_rows_for_one_seed(example):
    from evidence import tables

    def record(seed, values):
        return {"system": "mine", "seed": seed, "scores": {"test_retain": {"accuracy": values}}}

    base = {1: record(1, [1, 1, 1, 0] * 25), 2: record(2, [1, 0, 1, 0] * 25)}
    one, by_seed = tables.paired([record(1, [1, 1, 0, 0] * 25)], base)
    assert by_seed == [-0.25]
    assert one.low < -0.25 < one.high < 0
    two, by_seed = tables.paired([record(1, [1, 1, 0, 0] * 25), record(2, [1, 1, 1, 0] * 25)], base)
    assert by_seed == [-0.25, 0.25]
    assert two.estimate == 0
    assert two.low < -0.25  # two seeds that disagree say little
    with pytest.raises(ValueError, match=r"scored on seeds \[3\], the base was not"):
        tables.paired([record(3, [1])], base)
