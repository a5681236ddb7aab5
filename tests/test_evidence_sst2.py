"""The example that measures on a real model: its plan, the choice among candidates, the order of jobs, its table."""

import argparse
import contextlib
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
from datasets import Dataset
from stored_evidence import DATA, read


@pytest.fixture
def example(examples):
    import evidence_sst2

    return evidence_sst2


def choose(plan, trials):
    from evidence import plan as module

    return module.choose(plan, trials)


@pytest.fixture
def plan(example):
    return example.Plan.read(example.PLAN)


def test_every_system_of_the_plan_can_be_built_and_has_as_many_candidates(example, plan):
    from evidence.systems import BUILDERS

    assert {system.kind for system in plan.systems} <= set(BUILDERS)
    numbers = {plan.chooses_by(system): len(system.candidates) for system in plan.systems if system.candidates}
    assert set(numbers.values()) == {4}
    assert {plan.chooses_by(system) for system in plan.systems if system.kind != "model"} == set(numbers)


def test_a_system_of_an_unknown_kind_is_refused(example):
    from evidence.plan import System

    with pytest.raises(ValueError, match="kind='magic'; expected one of model, prompt"):
        System("mine", "magic")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"candidates": [{"steps": 5}]}, "a candidate has steps"),
        ({"settings": {"steps": 0}}, "steps=0; expected an integer of at least 1"),
        ({"kind": "refusal", "settings": {"steps": 5}}, "'refusal' is not trained"),
        ({"settings_of": "other", "settings": {"steps": 5}, "candidates": [{}]}, "goes with settings that differ"),
        ({"settings_of": "other"}, "goes with settings that differ and without candidates"),
    ],
)
def test_fields_of_a_system_that_do_not_go_together_are_refused(example, fields, message):
    from evidence.plan import System

    with pytest.raises(ValueError, match=message):
        System(**{"name": "mine", "kind": "lora"} | fields)


def test_a_system_has_the_settings_chosen_for_another_but_its_own_steps(example, plan):
    own = plan.system("SPUL, prefix with fitted keys, 900 steps")
    chosen = {"SPUL, prefix with fitted keys": {"settings": {"rate": 1.0, "batch_size": 32}}}
    short = plan.settings(plan.system(own.settings_of), chosen)
    assert short == plan.system(own.settings_of).settings | {"rate": 1.0, "batch_size": 32, "steps": 300}
    assert plan.settings(own, chosen) == short | {"steps": 900}
    assert plan.settings(plan.system("ECO"), {"ECO": {"settings": {"dims": 1}}}) == {"recall": 0.99, "dims": 1}
    assert "steps" not in plan.system(own.settings_of).candidate(0)


@pytest.mark.parametrize(("of", "kind"), [("nobody", "lora"), ("ECO", "lora"), ("mine", "lora"), ("base", "model")])
def test_settings_of_a_system_that_has_none_chosen_or_is_of_another_kind_are_refused(example, plan, of, kind):
    from evidence.plan import System

    mine = System("mine", kind, {"name": "base"}, settings_of=of)
    with pytest.raises(ValueError, match=f"mine: settings_of='{of}'; expected a system of the plan that has"):
        replace(plan, systems=[*plan.systems, mine])
    with pytest.raises(ValueError, match="in the plan twice"):
        replace(plan, systems=[*plan.systems, plan.systems[0]])


def test_forgetting_is_not_bought_by_retain_beyond_the_margin(plan):
    assert plan.cost(forget=0.2, retain_loss=0.01) == plan.cost(forget=0.2, retain_loss=-0.3) == 0.2
    assert plan.cost(forget=0.0, retain_loss=0.21) == pytest.approx(0.4)


def test_the_choice_is_the_cheapest_candidate_and_the_cheapest_systems_are_attacked(example, plan):
    def trial(system, candidate, cost):
        return {"system": system, "candidate": candidate, "cost": cost, "settings": {"n": candidate}, "scores": {}}

    trials = [trial("ECO", 1, 0.3), trial("ECO", 0, 0.3), trial("ECO", 2, 0.5), trial("IDK, LoRA", 0, 0.1)]
    found = choose(plan, trials)
    assert found["systems"]["ECO"]["settings"] == {"n": 0}  # the first of equal ones
    assert found["attacked"] == ["IDK, LoRA", "ECO"]


def test_the_stored_trials_lead_to_the_settings_of_the_stored_scores(example, plan):
    chosen = choose(plan, read("sst2-smollm2-trials.jsonl"))["systems"]
    kinds = {system.name: system.kind for system in plan.systems}
    scored = [one for one in read("sst2-smollm2-scores.jsonl") if kinds[one["system"]] in ("prompt", "gated", "lora")]
    assert len(scored) == 27
    for one in scored:
        assert one["settings"] == plan.settings(plan.system(one["system"]), chosen)
    later = read("sst2-smollm2-fitted-keys.jsonl")[0]
    system = plan.system(later["system"])
    assert later["settings"] == plan.settings(system, {system.name: {"settings": system.candidate(0)}})


def test_the_stored_choice_is_that_of_the_stored_trials_and_of_the_scored_gate(example, plan):
    stored = json.loads((DATA / "sst2-smollm2-chosen.json").read_text())
    found = choose(plan, read("sst2-smollm2-trials.jsonl"))["systems"]
    refusal = stored["systems"].pop("gate and refusal")
    assert stored["systems"] == found
    assert refusal["cost"] == found[refusal["held_out_of"]]["cost"]
    assert refusal["settings"]["recall"] == found[refusal["held_out_of"]]["settings"]["recall"]
    scored = [one["settings"] for one in read("sst2-smollm2-scores.jsonl") if one["system"] == "gate and refusal"]
    assert scored == 3 * [refusal["settings"]]


def test_a_line_that_breaks_off_is_taken_out_and_lines_of_another_model_are_refused(example, tmp_path):
    path, line = tmp_path / "trials.jsonl", json.dumps({"job": "a", "model": "small"}) + "\n"
    facts = {"model": "small"}
    assert example.known_records(path, facts) == []
    path.write_text(line + line[:12])
    with pytest.warns(UserWarning, match="line 2 breaks off"):
        assert example.known_records(path, facts) == [{"job": "a", "model": "small"}]
    assert path.read_text() == line
    with pytest.raises(SystemExit, match="has lines of model 'small', not 'large'; take another --output-dir"):
        example.known_records(path, {"model": "large"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tf32": True}, "has lines of tf32 False, not True"),
        ({"attacked": 200}, "has lines of attacked 60, not 200"),
        ({"data_dir": "other"}, "has lines of other data, another model or another `setup`"),
        ({"penalty": 3.0}, "has lines of rule .*'penalty': 2"),
    ],
)
def test_lines_that_another_command_measured_are_refused(example, plan, monkeypatch, tmp_path, change, message):
    monkeypatch.setattr(example, "experiment_of", lambda args, seed: SimpleNamespace(digest=args.data_dir))
    given = {"output_dir": tmp_path, "model": "x/small", "tf32": False, "attacked": 60, "data_dir": "mine"}
    facts = {"model": "small", "tf32": False, "seed": 1, "experiment": "mine", "job": "a"}
    lines = {"trials": facts | {"rule": plan.rule}, "scores": facts | {"attacked": 60}}
    for name, one in lines.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(one) + "\n")
    assert example.Files(command(**given), plan).known == [*lines.values()]
    for unattacked in ({"attacked": 0}, {"stage": "choose", "attacked": 200}):
        assert example.Files(command(**given | unattacked), plan).known
    plan = replace(plan, penalty=change.pop("penalty", plan.penalty))
    with pytest.raises(SystemExit, match=message):
        example.Files(command(**given | change), plan)


def test_a_line_of_other_settings_than_the_plan_and_the_choice_have_now_is_refused(example, plan):
    trial, score = example.Job("trial", 1, "ECO", 3), example.Job("score", 1, "ECO")
    choice = {"systems": {"ECO": {"settings": {"n": 7}, "cost": 0.2}}}
    for job, settings in ((trial, plan.system("ECO").candidate(3)), (score, {"recall": 0.99, "n": 7})):
        one = line(job) | {"settings": settings}
        assert example.Schedule(plan, "all", {"ECO": [1]}, choice=choice, known=[one]).done == {job.key}
        for stale in (one | {"settings": {"n": 8}}, *([one | {"candidate": 4}] if job is trial else [])):
            with pytest.raises(ValueError, match=r"was done with .*; by the plan and the choice it has .*output-dir"):
                example.Schedule(plan, "all", {"ECO": [1]}, choice=choice, known=[stale])


def command(**given):
    return argparse.Namespace(**{"chosen": None, "systems": None, "seeds": None, "stage": "score"} | given)


def test_a_system_with_candidates_is_not_scored_without_a_choice(example, plan, tmp_path):
    args = command(output_dir=tmp_path, systems=["base", "ECO"])
    with pytest.raises(SystemExit, match="has no settings for ECO; run `choose`"):
        example.earlier_choice(args, plan, example.wanted_systems(args, plan))
    (tmp_path / "chosen.json").write_text(json.dumps({"systems": {"IDK, LoRA": {}}, "attacked": []}))
    with pytest.raises(SystemExit, match="has no settings for ECO; run `choose`"):
        example.earlier_choice(args, plan, {"ECO": [1]})
    assert example.earlier_choice(args, plan, {"base": [1], "IDK, LoRA": [1]}) == {"systems": {"IDK, LoRA": {}}}
    with pytest.raises(SystemExit, match="has no settings for SPUL, prefix with fitted keys;"):
        example.earlier_choice(args, plan, {"SPUL, prefix with fitted keys, 900 steps": [1]})
    args.chosen = tmp_path / "other.json"
    args.chosen.write_text(json.dumps({"systems": {"IDK, LoRA": {"settings": {"n": 1}}}}))
    with pytest.raises(SystemExit, match=r"other.json and .*chosen.json differ in IDK, LoRA; take another"):
        example.earlier_choice(args, plan, {"base": [1]})
    args.chosen = tmp_path / "missing.json"
    with pytest.raises(SystemExit, match=r"--chosen .*missing.json does not exist"):
        example.earlier_choice(args, plan, {"base": [1]})


def test_systems_of_a_command_may_have_seeds_of_their_own(example, plan):
    args = command(systems=["base", "NPO+GD, LoRA@2", "ECO@3,1"], seeds=[1, 2])
    assert example.wanted_systems(args, plan) == {"base": [1, 2], "NPO+GD, LoRA": [2], "ECO": [3, 1]}
    assert list(example.wanted_systems(command(), plan)) == [system.name for system in plan.systems]
    for wrong in ("ECO@a", "ECO@1,", "eco"):
        with pytest.raises(SystemExit, match="expected NAME or NAME@SEED,SEED"):
            example.wanted_systems(command(systems=[wrong]), plan)


LONG, SHORT = "SPUL, prefix with fitted keys, 900 steps", "SPUL, prefix with fitted keys"


def line(job, cost=0.5):
    """The line of a job's record, as far as a schedule reads it."""
    found = {"job": job.key, "system": job.system}
    if job.kind == "trial":
        found |= {"candidate": job.part, "settings": {"n": job.part}, "scores": {}, "cost": cost + job.part}
    return found


def done_in_order(schedule, workers, failing=()):
    """The jobs in the order in which they begin, `workers` at a time, each as long as the others."""
    order, running = [], []
    while True:
        for job in schedule.ready()[: workers - len(running)]:
            schedule.begin(job)
            running.append(job)
            order.append(job)
        if not running:
            return order
        job = running.pop(0)
        schedule.end(job, None if job in failing else line(job))


def test_nothing_is_tried_or_scored_before_its_model_is_memorized_and_its_settings_are_chosen(example, plan):
    wanted = {system.name: plan.seeds for system in plan.systems}
    schedule = example.Schedule(plan, "all", wanted)
    order = done_in_order(schedule, 1)
    assert not schedule.waiting()
    place = {job: i for i, job in enumerate(order)}
    assert order[:3] == [example.Job("memorize", seed, "base") for seed in plan.seeds]
    assert sum(job.kind == "score" for job in order) == len(plan.systems) * len(plan.seeds)
    for job in order:
        if job.kind in ("trial", "score") and job.system not in ("vanilla", "retrained"):
            assert place[example.Job("memorize", job.seed, "base")] < place[job]
        if job.system == "retrained" and job.kind == "score":
            assert place[example.Job("memorize", job.seed, "retrained")] < place[job]
        if job.kind == "score" and (chooses := plan.chooses_by(plan.system(job.system))) is not None:
            assert all(place[one] < place[job] for one in place if one.kind == "trial" and one.system == chooses)


def test_a_system_is_scored_before_others_are_chosen_the_longest_runs_first(example, plan):
    schedule = example.Schedule(plan, "all", dict.fromkeys(("GA+GD, LoRA", "ECO", SHORT, LONG), plan.seeds))
    order = [(job.kind, job.system) for job in done_in_order(schedule, 1)]
    tried = [("trial", SHORT)] * 4 + [("score", LONG)] * 3 + [("score", SHORT)] * 3
    tried += [("trial", "ECO")] * 4 + [("score", "ECO")] * 3  # needs no training
    tried += [("trial", "GA+GD, LoRA")] * 4 + [("score", "GA+GD, LoRA")] * 3
    assert order == [("memorize", "base")] * 3 + tried


def test_a_stored_choice_needs_no_trials_and_a_made_one_holds(example, plan):
    stored = {"systems": {"ECO": {"settings": {"n": 7}, "cost": 0.2}}}
    schedule = example.Schedule(plan, "all", {"ECO": [3]}, choice=stored)
    assert [job.kind for job in done_in_order(schedule, 1)] == ["memorize", "score"]
    assert schedule.settings(example.Job("score", 3, "ECO")) == {"recall": 0.99, "n": 7}


def test_one_failed_trial_leaves_the_others_to_choose_among_and_all_failed_leave_nothing_to_score(example, plan):
    trials = [example.Job("trial", 1, "ECO", i) for i in range(4)]
    schedule = example.Schedule(plan, "all", {"ECO": [1]})
    done_in_order(schedule, 2, failing=trials[:1])
    assert schedule.choice["systems"]["ECO"]["settings"] == {"n": 1}
    assert schedule.choice["systems"]["ECO"]["tried"] == [1, 2, 3]
    assert schedule.failed == {trials[0].key}
    assert not schedule.waiting()
    schedule = example.Schedule(plan, "all", {"ECO": [1]})
    done_in_order(schedule, 2, failing=trials)
    assert schedule.waiting() == [example.Job("score", 1, "ECO")]


def test_the_best_are_attacked_last_once_all_are_chosen_and_scored_where_their_adapters_come_from(example, plan):
    stored = {"systems": {"IDK, LoRA": {"settings": {}, "cost": 0.1}, "gate and refusal": {"settings": {}}}}
    wanted = {"base": [1], "ECO": [1, 2], "GA+GD, LoRA": [1]}
    schedule = example.Schedule(plan, "all", wanted, attacked_seeds=[1], choice=stored)
    order = done_in_order(schedule, 3)
    attacks = [(job.system, job.part) for job in order if job.kind == "attack"]
    assert schedule.choice["attacked"] == ["IDK, LoRA", "ECO", "GA+GD, LoRA"]  # by cost; without one there is no rank
    assert {name: [part for own, part in attacks if own == name] for name, _ in attacks} == {
        "ECO": ["inputs", "four_bit"],  # nothing to train
        "IDK, LoRA": ["inputs", "four_bit", "relearning"],
        "GA+GD, LoRA": ["inputs", "four_bit", "relearning"],
    }
    late = example.Job("score", 1, "IDK, LoRA")  # of no seed that was asked for: only the attacks need it
    assert {job.kind for job in order[order.index(late) + 1 :]} == {"attack"}
    first = next(i for i, job in enumerate(order) if job.kind == "attack")
    assert all(job in order[:first] for job in order if job.kind == "score" and job.system in wanted)
    schedule = example.Schedule(plan, "all", {"base": [1]}, attacked_seeds=[1], choice=stored)
    base, other = example.Job("memorize", 1, "base"), example.Job("score", 1, "base")
    schedule.begin(base)
    schedule.end(base, line(base))
    schedule.begin(other)
    assert schedule.ready() == []  # a worker waits while others do what was asked for
    schedule.end(other, None)
    assert schedule.ready() == [late]
    assert not any(job.kind == "attack" for job in example.Schedule(plan, "choose", wanted, [1]).jobs())


def test_a_repeated_command_goes_on(example, plan):
    wanted, half = {SHORT: [1], LONG: [1], "ECO": [1]}, []
    schedule = example.Schedule(plan, "all", wanted)
    while len(half) < 6:  # memorized, four trials, a score
        job = schedule.ready()[0]
        schedule.begin(job)
        schedule.end(job, line(job))
        half.append(job)
    settings = {job: plan.system(job.system).candidate(job.part) for job in half if job.kind == "trial"}
    known = [line(job) | ({"settings": settings[job]} if job in settings else {}) for job in half]
    again = example.Schedule(plan, "all", wanted, known=known)
    best = again.choice["systems"][SHORT]
    assert best["settings"] == plan.system(SHORT).candidate(0)
    assert schedule.choice["systems"][SHORT] == best | {"settings": {"n": 0}}
    assert [job.key for job in done_in_order(again, 1)] == [job.key for job in done_in_order(schedule, 1)]
    assert half[5] == example.Job("score", 1, LONG)


@pytest.mark.parametrize(("kind", "share"), [("prompt", 0), ("prompt", 1.5), ("lora", 0.5)])
def test_a_share_of_forget_rows_is_a_share_of_those_that_a_prompt_trains_on(example, kind, share):
    from evidence.plan import System

    System("mine", "prompt", {"forget_size": 0.5})
    with pytest.raises(ValueError, match="forget_size"):
        System("mine", kind, {"forget_size": share})


@pytest.mark.parametrize("tests_alone", [False, True])
def test_a_plan_of_test_rows_alone_scores_nothing_else(example, monkeypatch, tmp_path, tests_alone):
    from evidence import jobs
    from evidence.plan import System

    class Prompted:
        disable_adapter = contextlib.nullcontext

    sides = {side: Dataset.from_dict({"prompt": ["a", "b"]}) for side in ("forget", "retain")}
    monkeypatch.setattr(jobs, "split_rows", lambda experiment, held_out: (sides, sides))
    monkeypatch.setattr(jobs, "build", lambda *args: (Prompted(), {}))
    monkeypatch.setattr(jobs, "row_scores", lambda model, rows, *rest: {"accuracy": [1] * len(rows)})
    record = jobs.scores(None, System("SPUL", "prompt"), {"steps": 1}, tmp_path, tests_alone)
    assert {"test_forget", "test_retain"} <= set(record["scores"])
    assert ("train_forget" in record["scores"]) is not tests_alone
    assert ("detached" in record) is not tests_alone
