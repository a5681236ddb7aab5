"""The pages of the evidence: each table has the numbers of its stored lines."""

import json
import re
from collections import Counter

import numpy as np
import pytest
from stored_evidence import DATA, DOCS, cells_of, read, tables_of

from spul.gates import NameGate

PREFIX, GATED, LORA, REFUSAL = "SPUL, prefix with fitted keys", "SPUL behind a gate", "IDK, LoRA", "gate and refusal"
REWRITTEN = ", rewritten rows"


def attacked():
    """Attacks of three seeds; what stood behind an earlier gate is left out."""
    first = [
        one for one in read("sst2-smollm2-attacks.jsonl") if "gate" not in one["system"] and one["system"] != "ECO"
    ]
    return [*{one["job"]: one for one in first + read("sst2-smollm2-attacks-three-seeds.jsonl")}.values()]


@pytest.fixture
def as_asked(examples):
    """The table of all systems: cells by name."""
    from evidence import tables
    from evidence.plan import Plan

    records = read("sst2-smollm2-scores.jsonl")
    rewritten = {one["job"]: one for one in attacked() if "scores" in one and one["system"].endswith(REWRITTEN)}
    records += [one for one in rewritten.values() if "behind" not in one["system"]]
    gates = [one for one in read("sst2-smollm2-gates.jsonl") if one["gate"] in ("text gate", "text gate, prose")]
    behind = tables.refusals(gates, records)
    planned = [system.name for system in Plan.read(DATA / "sst2-plan.json").systems]
    systems = dict.fromkeys([*planned, *(one["system"] for one in behind)])
    systems |= dict.fromkeys(one["system"] for one in rewritten.values())
    rows = cells_of(tables.table(records + behind, list(systems)))[1:]
    return {row[0]: row[1:] for row in rows}


@pytest.fixture
def under_attack(examples):
    """The tables of forget rows, of retain rows, and of 4 bit and relearning: cells."""
    from evidence import tables

    records, base = attacked(), read("sst2-smollm2-base-attacks.jsonl")
    gates = [one for one in read("sst2-smollm2-gates.jsonl") if one["gate"] == "text gate"]
    records += [one | {"system": REFUSAL} for one in tables.refusals_attacked(gates, base)]
    records.append({"system": tables.BASE, "seed": 1, "inputs": base})
    systems = [name + more for name in (PREFIX, GATED) for more in ("", REWRITTEN)]
    systems += [REFUSAL, "ECO", LORA, LORA + REWRITTEN, tables.BASE]
    made = [tables.attacked(records, systems, side) for side in tables.SIDES] + [tables.undone(records, systems)]
    return list(map(cells_of, made))


def test_the_table_of_all_systems_is_that_of_the_stored_scores(as_asked):
    shown = [row[2:] for row in tables_of("results.md", "On SmolLM2")[0][1:]]
    assert len(shown) == len(as_asked)

    def numbers(cells):
        return re.findall(r"[-+]?\d+\.\d", " ".join(cells))

    made = [numbers(row[1:]) for row in as_asked.values()]
    for row in shown:
        own = numbers(row)
        assert any(one == own or [one[0], *one[2:]] == own for one in made), row  # one seed is not repeated


def test_the_first_table_has_the_numbers_of_the_others(as_asked, under_attack):
    names = {
        "the base, attacked on one seed": ("base", "base"),
        "**text gate and fixed refusal**, no training": ("refusal behind text gate", REFUSAL),
        "SPUL's loss on LoRA, rewritten rows": (LORA + REWRITTEN,) * 2,
        "SPUL's loss on LoRA": (LORA, LORA),
        "SPUL, prefix with fitted keys, rewritten rows": (PREFIX + REWRITTEN,) * 2,
        "SPUL, prefix with fitted keys": (PREFIX, PREFIX),
        "SPUL, prompt tuning": ("SPUL, prompt tuning", None),
        "SPUL, P-tuning, the paper's": ("SPUL, P-tuning", None),
        "SimNPO+GD on LoRA": ("SimNPO+GD, LoRA", None),
        "retrained without the forget rows": ("retrained", None),
    }
    (head, *rows), *_ = under_attack
    attacks = {row[0]: dict(zip(head, row, strict=True)) for row in rows}
    shown = tables_of("results.md", "In short")[0][1:]
    assert [row[0] for row in shown] == list(names)
    for name, forget, change, *attack in shown:
        asked, under = names[name]
        cells = as_asked[asked]
        assert [forget, change] == [cells[1].split(" (")[0], cells[4]], name
        if under is None:
            assert attack == ["", "", ""]
            continue
        own = attacks[under]
        disguised = [own["misspelled"], *own["look-alike letters, apart, hyphenated"].split(", ")]
        ends = sorted(disguised, key=float)
        assert attack == [f"{ends[0]} to {ends[-1]}", own["all of these before"], own["four turns"]], name


def test_the_tables_under_attack_are_those_of_the_stored_rows(under_attack):
    shown = tables_of("results-tables.md", "SmolLM2 under attack")
    assert [[row[1:] for row in table] for table in shown] == [[row[1:] for row in table] for table in under_attack]


def test_the_table_of_the_gates_page_is_that_of_the_stored_flags():
    flagged = {}
    for line in read("sst2-smollm2-gates-pieces.jsonl"):
        for side, rows in line["test"].items():
            flagged.setdefault((line["gate"], side), []).extend(rows)
    for line in read("../results/gated-sst2.jsonl"):
        if line["system"] == "states gate, refusal" and line["attack"] == "none":
            num = round(line["flagged"] * line["rows"])
            flagged.setdefault(("states", line["side"]), []).extend([1] * num + [0] * (line["rows"] - num))
    made = [
        [f"{100 * sum(forget) / len(forget):.1f} %", f"{100 * sum(retain) / len(retain):.1f} % of {len(retain):,}"]
        for gate, side in flagged
        if side == "forget"
        for forget, retain in [(flagged[gate, "forget"], flagged[gate, "retain"])]
    ]
    assert [row[2:] for row in tables_of("gates.md", "Measured")[0][1:]] == made
    assert {len(rows) for (_, side), rows in flagged.items() if side == "forget"} == {1095}


@pytest.mark.parametrize(
    ("name", "page", "heading"),
    [
        ("sst2-gemma3-scores.jsonl", "results.md", "On Gemma 3"),
        ("sst2-small-lm-scores.jsonl", "results-tables.md", "small-lm by the same plan"),
    ],
)
def test_accuracies_of_other_models_are_those_of_the_stored_scores(name, page, heading):
    shown = [row[1:] for row in tables_of(page, heading)[0][1:]]
    for record in read(name):
        values = (record["scores"][f"test_{side}"]["accuracy"] for side in ("forget", "retain"))
        forget, retain = (f"{100 * sum(one) / len(one):.1f}" for one in values)
        if record["system"] != "vanilla":
            assert any([row[0], row[2]] == [forget, retain] or row[2:] == [forget, retain] for row in shown), record[
                "job"
            ]


def test_the_shapes_are_those_of_the_stored_scores(examples):
    from evidence.plan import Plan

    found = {one["system"]: one["scores"] for one in read("sst2-smollm2-shapes.jsonl") if "scores" in one}
    assert set(found) == {system.name for system in Plan.read(DATA / "sst2-smollm2-shapes-plan.json").systems}

    def shown(scores):
        values = [
            scores["test_forget"]["accuracy"],
            scores["test_retain"]["accuracy"],
            scores["test_retain"]["generic"],
        ]
        forget, retain, generic = (f"{100 * sum(one) / len(one):.1f}" for one in values)
        return f"{forget}, {retain} ({generic})"

    grid, others = tables_of("results-tables.md", "Shapes")
    cells = [cell for table in (grid, others) for row in table[1:] for cell in row[1:]]
    assert sorted(cells) == sorted(map(shown, found.values()))
    (row,) = (row for row in grid if row[0] == "alpha 0.5")
    assert row[1:] == [shown(found[f"alpha 0.5, beta {beta}"]) for beta in ("0", "0.1", "0.5", "1")]


def test_the_costs_of_rewritten_rows_are_those_of_the_stored_trainings():
    def tokens(system):
        found = {one["seed"]: one["training"] for one in attacked() if one["system"] == system and "training" in one}
        found |= {one["seed"]: one["training"] for one in read("sst2-smollm2-scores.jsonl") if one["system"] == system}
        return [found[seed]["forward_tokens"] for seed in (1, 2, 3)]

    ratios = [more / less for more, less in zip(tokens(PREFIX + REWRITTEN), tokens(PREFIX), strict=True)]
    assert [round(one) for one in ratios] == [3, 3, 3]
    assert "twice the steps and\n  three times the forward tokens" in (DOCS / "results.md").read_text()


def test_the_systems_that_were_attacked_are_the_best_by_cost_and_the_protocol_says_what_they_lose(examples):
    from evidence.plan import Plan

    plan, trials = Plan.read(DATA / "sst2-plan.json"), read("sst2-smollm2-trials.jsonl")
    assert (plan.margin, plan.penalty) == (0.01, 2)
    (base,) = {one["base_retain"] for one in trials}
    chosen = json.loads((DATA / "sst2-smollm2-chosen.json").read_text())
    retain = [chosen["systems"][name]["held_out"]["retain"]["accuracy"] for name in chosen["attacked"]]
    within = [one["scores"] for one in trials if base - one["scores"]["retain"]["accuracy"] <= plan.margin + 1e-9]
    forget = sorted(100 * one["forget"]["accuracy"] for one in within)
    page = " ".join((DOCS / "evidence.md").read_text().split())
    lost = sorted(100 * (base - one) for one in retain)
    assert f"that were attacked lose {lost[0]:.1f} to {lost[-1]:.1f} points of held-out retain" in page
    assert f"({100 * min(retain):.1f} and {100 * max(retain):.1f} of {100 * base:.1f} %)" in page
    assert len(within) == 3
    assert f"three trials, which forgot nothing ({forget[0]:.0f} to {forget[-1]:.0f} % of forget)" in page


# ---- ten requests ----

COLUMNS = ("forget", "worst request", "other people", "retain")
LINES = {
    "base": ("base", "none"),
    "prompts behind gates, 1 request": ("prompts behind gates", "1 added"),
    "prompts, 5": ("prompts behind gates", "5 added"),
    "prompts, 10": ("prompts behind gates", "10 added"),
    "prompts, 10, of which 3 withdrawn": ("prompts behind gates", "3 withdrawn"),
    "refusals behind the same gates, 1 request": ("refusals behind gates", "1 added"),
    "refusals, 5": ("refusals behind gates", "5 added"),
    "refusals, 10": ("refusals behind gates", "10 added"),
    "refusals, 10, of which 3 withdrawn": ("refusals behind gates", "3 withdrawn"),
    "one prompt and gate for all 10": ("one prompt for all", "10 added"),
    "the loss on LoRA, merged each time, 1 request": ("LoRA, merged each time", "1 added"),
    "LoRA, 5": ("LoRA, merged each time", "5 added"),
    "LoRA, 10": ("LoRA, merged each time", "10 added"),
    "LoRA, 10, of which 3 withdrawn, which cannot be undone": ("LoRA, merged each time", "3 withdrawn"),
}


def test_the_table_of_40_steps_has_the_numbers_of_its_lines():
    table = {name: values for name, *values in tables_of("results-tables.md", "Ten requests, shorter training")[0]}
    found = {(one["seed"], one["system"], one["after"]): one for one in read("requests-smollm2.jsonl")}
    for name, key in LINES.items():
        each = [found[(seed, *key)] for seed in (1, 2, 3) if (seed, *key) in found]
        assert len(each) == (1 if "LoRA" in name else 3)
        seeds = [["" if one[c] is None else f"{100 * one[c]:.1f}" for c in COLUMNS] for one in each]
        expected = [", ".join(filter(None, values)) for values in zip(*seeds, strict=True)]
        if key[0] == "base":  # no request is in force: its worst row says nothing
            expected[1] = ""
        assert table[name] == expected, name
    base = {one["seed"]: one["retain"] for one in found.values() if one["system"] == "base"}
    alike = [one for one in found.values() if "LoRA" not in one["system"]]
    assert all(one["retain"] == base[one["seed"]] for one in alike)


def test_the_table_of_ten_requests_has_the_means_of_its_lines_and_each():
    lines = read("requests-smollm2-60-steps.jsonl")
    systems = {"refusals": "refusals behind gates", "prompts": "prompts behind gates"}
    systems |= {"LoRA merged": "LoRA, merged each time"}
    systems |= {"LoRA, merged each time": "LoRA, merged each time", "LoRA": "LoRA, trained anew each time"}
    for name, *values in tables_of("results.md", "Ten requests")[0][1:]:
        after = "3 withdrawn" if "withdrawn" in name else "5 added" if ", 5" in name else "10 added"
        system = "base" if name == "base" else next(full for word, full in systems.items() if name.startswith(word))
        one = [line for line in lines if line["system"] == system and (line["after"] == after or system == "base")]
        assert len(one) == 3
        for value, column in zip(values, COLUMNS, strict=True):
            each = [line[column] for line in one]
            if not value or not value[0].isdigit():
                continue
            mean, _, seeds = value.partition(" (")
            assert float(mean) == pytest.approx(100 * sum(each) / 3, abs=0.051), (name, column)
            if seeds:
                assert seeds.rstrip(")") == ", ".join(f"{100 * number:.1f}" for number in each), (name, column)
    base = {line["seed"]: line["retain"] for line in lines if line["system"] == "base"}
    assert all(line["retain"] == base[line["seed"]] for line in lines if line["system"].endswith("behind gates"))


@pytest.mark.parametrize(
    ("name", "page"),
    [("requests-smollm2-60-steps.jsonl", "results.md"), ("requests-smollm2.jsonl", "results-tables.md")],
)
def test_the_milliseconds_of_a_request_are_those_of_its_lines(name, page):
    found = sorted(one["add_ms"] for one in read(name) if "add_ms" in one and one["after"] == "10 added")
    assert len(found) == 3
    assert f"{found[0]:.0f} to {found[-1]:.0f} ms to add" in " ".join((DOCS / page).read_text().split())


def test_the_table_of_ten_authors_has_the_numbers_of_its_lines(examples):
    from evidence_authors import AUTHORS, summary

    lines, second = read("authors-smollm2.jsonl"), read("authors-smollm2-40-steps.jsonl")
    first_run = [one | {"system": "prompts of a first run"} for one in lines if one["system"].startswith("prompts")]
    lines = [one for one in lines if not one["system"].startswith("prompts")]
    shown = cells_of(summary([*lines, *first_run, *second]))[1:]
    found = {(name, after): numbers for name, after, *numbers in shown}
    stages = {"5": "5 added", "10": "10 added", "10, of which 3 withdrawn": "3 withdrawn"}
    rows = tables_of("results.md", "Ten authors")[0][1:]
    for name, *values in rows:
        full, _, stage = name.replace(" requests", "").partition(", ")
        full = f"{full} behind gates" if full in ("refusals", "prompts") else full
        if full == "LoRA":
            full, stage = "LoRA, trained anew each time", stage.removeprefix("trained anew each time, ")
        assert values == found[full, stages.get(stage, "none")], name
    assert len(rows) == 11

    def not_declined(line):
        return [
            (name, answer)
            for name in AUTHORS
            for answer, declined in zip(line["answers"][name], line["scores"][name]["declined"], strict=True)
            if not declined
        ]

    (ten,) = (one for one in lines if one["system"] == "refusals behind gates" and one["after"] == "10 added")
    passed = not_declined(ten)
    assert len(passed) == 10
    assert sum(name in answer for name, answer in passed) == 5
    assert NameGate(AUTHORS).flags([answer for _, answer in passed]).sum() == 6

    ten, trained = (one for one in second if one["after"] == "10 added")
    assert sum(one not in passed for one in not_declined(ten)) == 190 - 177
    shares = {name: np.mean(trained["scores"][name]["declined"]) for name in ("real_authors", "world_facts", "retain")}
    assert shares == {"real_authors": 1, "world_facts": 0.6, "retain": 0.3}


# ---- TOFU ----

# Columns of the summary, by those of the pages behind the seeds.
SHORT = [3, 5, 1, 7, 8, 9, 10]
FURTHER = [2, 4, 7, 6, 11, 12]


@pytest.mark.parametrize(
    ("page", "heading", "order"),
    [("results.md", "TOFU on SmolLM2", SHORT), ("results-tables.md", "TOFU, further measures", FURTHER)],
)
@pytest.mark.parametrize("forget_set", ["forget01", "forget05"])
def test_the_tables_of_tofu_have_the_numbers_of_their_lines(examples, page, heading, order, forget_set):
    from evidence_tofu import summary

    runs = [*read("tofu-smollm2-400-rows.jsonl"), *read("tofu-smollm2-400-rows-mean.jsonl")]
    runs = [one for one in runs if one["system"] != REFUSAL]
    runs += [one | {"system": f"gate of {one['recall']}"} for one in read("tofu-smollm2-gates.jsonl")]
    first = {(one["system"], one["seed"], one["forget_set"]): one for one in reversed(runs)}
    lines = [line for line in first.values() if line["forget_set"] == forget_set]
    shown = {"base": "base", "retrained": "retrained", "**SPUL": "SPUL, prefix, mean forget loss"}
    shown |= {"the same": PREFIX, "SPUL behind a text gate of recall 99 %": GATED}
    shown |= {"text gate of recall 99 % and fixed refusal": "gate of 0.99", "**the same": "gate of 0.95"}
    shown["SPUL's loss on LoRA (IDK)"] = LORA
    by_system = {system: [] for system in shown.values()}
    for seed in sorted({line["seed"] for line in lines}):
        for system, *cells in cells_of(summary([one for one in lines if one["seed"] == seed]))[1:]:
            by_system[system].append([float(cells[i - 1] or "nan") for i in order])
    (table,) = (table for table in tables_of(page, heading) if table[0][0] == forget_set)
    assert {row[0].split(",")[0] for row in table[1:]} == set(shown)
    for name, num, *values in table[1:]:
        found = by_system[shown[name.split(",")[0]]]
        assert int(num) == len(found)
        known = np.ma.masked_invalid(found)  # the retrained model of forget05 has one seed
        expected = known.mean(axis=0).filled(np.nan)
        numbers = [float(value.split("(")[0] or "nan") for value in values]
        assert numbers == pytest.approx(expected, abs=0.011, nan_ok=True), name


def test_the_answers_that_were_read_are_those_of_their_lines_and_counted_as_they_were_read():
    lines = read("tofu-smollm2-400-rows-mean.jsonl")
    answers = {
        (one["forget_set"], one["seed"]): one["answers"]["forget"]
        for one in lines
        if one["system"] == "SPUL, prefix, mean forget loss"
    }
    found = read("tofu-smollm2-read.jsonl")
    for one in found:
        assert one["answer"] == answers[one["forget_set"], one["seed"]][one["question"]]
    assert Counter(one["forget_set"] for one in found) == {"forget01": 25, "forget05": 25}
    assert Counter(one["read"] for one in found) == {"declines": 43, "declines oddly": 1, "answers": 6}
    assert {one["forget_set"] for one in found if one["read"] == "answers"} == {"forget05"}
    page = (DOCS / "results.md").read_text()
    assert re.search(r"of 50 answers .{0,200}, 43 decline .{0,200}and six, all of forget05, answer", page, re.DOTALL)
