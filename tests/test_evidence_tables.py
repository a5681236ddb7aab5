"""Tables and figures of the evidence, and the results page that shows them."""

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


def attacked():
    """Attacks of three seeds; what stood behind an earlier gate is left out."""
    first = [
        one for one in read("sst2-smollm2-attacks.jsonl") if "gate" not in one["system"] and one["system"] != "ECO"
    ]
    return [*{one["job"]: one for one in first + read("sst2-smollm2-attacks-three-seeds.jsonl")}.values()]


def test_the_table_of_the_results_page_is_that_of_the_stored_scores(example, plan):
    from evidence import tables

    records = read("sst2-smollm2-scores.jsonl")
    rewritten = {one["job"]: one for one in attacked() if "scores" in one and one["system"].endswith("rewritten rows")}
    records += [one for one in rewritten.values() if "behind" not in one["system"]]
    gates = [one for one in read("sst2-smollm2-gates.jsonl") if one["gate"] in ("text gate", "text gate, prose")]
    behind = tables.refusals(gates, records)
    systems = dict.fromkeys([*(system.name for system in plan.systems), *(one["system"] for one in behind)])
    made = tables.table(records + behind, list(systems)).splitlines()[2:]
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


def test_the_table_of_the_gates_page_is_that_of_the_stored_flags():
    flagged = {}
    for line in read("sst2-smollm2-gates-pieces.jsonl"):
        for side, rows in line["test"].items():
            flagged.setdefault((line["gate"], side), []).extend(rows)
    for line in map(json.loads, (DATA.parent / "results" / "gated-sst2.jsonl").read_text().splitlines()):
        if line["system"] == "states gate, refusal" and line["attack"] == "none":
            num = round(line["flagged"] * line["rows"])
            flagged.setdefault(("states", line["side"]), []).extend([1] * num + [0] * (line["rows"] - num))
    made = [
        (f"{100 * sum(forget) / len(forget):.1f} %", f"{100 * sum(retain) / len(retain):.1f} % of {len(retain):,}")
        for gate, side in flagged
        if side == "forget"
        for forget, retain in [(flagged[gate, "forget"], flagged[gate, "retain"])]
    ]
    page = (ROOT / "docs" / "gates.md").read_text().split("## Measured")[1]
    shown = [line.split(" | ")[2:] for line in page.splitlines() if line.startswith("| `")]
    assert [(recall, alarms.removesuffix(" |")) for recall, alarms in shown] == made
    assert {len(rows) for (_, side), rows in flagged.items() if side == "forget"} == {1095}


def test_the_attacks_of_the_results_page_are_those_of_the_stored_rows(example):
    from evidence import tables

    records, base = attacked(), read("sst2-smollm2-base-attacks.jsonl")
    gates = [one for one in read("sst2-smollm2-gates.jsonl") if one["gate"] == "text gate"]
    records += [one | {"system": "gate and refusal"} for one in tables.refusals_attacked(gates, base)]
    records.append({"system": tables.BASE, "seed": 1, "inputs": base})
    prompts, gated, lora = "SPUL, prefix with fitted keys", "SPUL behind a gate", "IDK, LoRA"
    systems = [name + more for name in (prompts, gated) for more in ("", ", rewritten rows")]
    systems += ["gate and refusal", "ECO", lora, f"{lora}, rewritten rows", tables.BASE]
    made = [tables.attacked(records, systems, side) for side in tables.SIDES] + [tables.undone(records, systems)]
    page = (ROOT / "docs" / "results.md").read_text().split("**Under attack**, 200")[1]
    page = page.split("| trained | parameters")[0]
    shown = re.findall(r"(?:^\|.*\n)+", page, re.MULTILINE)

    def without_names(table):
        head, _, *rows = table.splitlines()
        return [head, *(line.split("|", 2)[2] for line in rows)]

    assert list(map(without_names, shown)) == list(map(without_names, made))


@pytest.mark.parametrize(
    ("name", "page", "heading"),
    [
        ("sst2-gemma3-scores.jsonl", "results.md", "## On Gemma 3"),
        ("sst2-small-lm-scores.jsonl", "evidence.md", "On small-lm, whose base"),
    ],
)
def test_accuracies_of_other_models_are_those_of_the_stored_scores(name, page, heading):
    text = (ROOT / "docs" / page).read_text().split(heading)[1]
    rows = [line.split("|")[2:-1] for line in text.split("|---|")[1].split("\n\n")[0].splitlines()[1:]]
    shown = [[cell.strip() for cell in row] for row in rows]
    for record in read(name):
        values = (record["scores"][f"test_{side}"]["accuracy"] for side in ("forget", "retain"))
        forget, retain = (f"{100 * sum(one) / len(one):.1f}" for one in values)
        if record["system"] != "vanilla":
            assert any([row[0], row[2]] == [forget, retain] or row[2:] == [forget, retain] for row in shown), record[
                "job"
            ]


def test_a_refusal_behind_a_gate_is_right_where_the_base_is_and_nothing_is_flagged(example):
    from evidence import tables

    base = [{"seed": 1, "side": "forget", "attack": "none", "accuracy": [1, 1, 0]}]
    inputs = [{"side": "forget", "attack": "none", "flagged": [1, 0, 0]}]
    gates = [{"gate": "g", "seed": seed, "inputs": inputs} for seed in (1, 2)]
    (found,) = tables.refusals_attacked(gates, base)
    assert found["inputs"][0]["accuracy"] == [0, 1, 0]


def test_the_figure_of_sizes_has_a_point_for_each_seed_at_its_models_size(example):
    from evidence import tables

    def record(system, model, seed, forget, retain):
        scores = {"test_forget": {"accuracy": forget}, "test_retain": {"accuracy": retain}}
        return {"system": system, "model": model, "seed": seed, "scores": scores}

    both = [1, 1, 1, 0], [1, 1, 1, 1]
    records = [record("base", model, seed, *both) for model, seed in (("smollm2", 1), ("smollm2", 2), ("gemma3", 1))]
    records += [record("mine", "smollm2", seed, [0, 0, 0, seed - 1], [1, 1, 1, 0]) for seed in (1, 2)]
    records.append(record("mine", "gemma3", 1, [1, 1, 0, 0], [1, 1, 0, 0]))
    forget, retain = tables.scales(records, ["mine"]).axes
    for axes, means, points in ((forget, [12.5, 50], [0, 25, 50]), (retain, [-25, -50], [-25, -25, -50])):
        assert axes.lines[0].get_xdata().tolist() == [134.5, 268.1]
        assert axes.lines[0].get_ydata().tolist() == means
        assert [float(y) for one in axes.collections for y in one.get_offsets()[:, 1]] == points
    with pytest.raises(ValueError, match="another"):
        tables.scales([record("mine", "another", 1, *both)], ["mine"])


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


def test_the_shapes_of_the_results_page_are_those_of_the_stored_scores(example):
    found = {one["system"]: one["scores"] for one in read("sst2-smollm2-shapes.jsonl") if "scores" in one}
    planned = example.Plan.read(DATA / "sst2-smollm2-shapes-plan.json").systems
    assert set(found) == {system.name for system in planned}

    def shown(scores):
        values = [
            scores["test_forget"]["accuracy"],
            scores["test_retain"]["accuracy"],
            scores["test_retain"]["generic"],
        ]
        forget, retain, generic = (f"{100 * sum(one) / len(one):.1f}" for one in values)
        return f"{forget}, {retain} ({generic})"

    page = (ROOT / "docs" / "results.md").read_text().split("### Shapes")[1].split("## On Gemma 3")[0]
    cells = re.findall(r"\| (\d+\.\d, \d+\.\d \(\d+\.\d\))(?= \|)", page)
    assert sorted(cells) == sorted(map(shown, found.values()))
    row = next(line for line in page.splitlines() if line.startswith("| alpha 0.5 "))
    betas = ("0", "0.1", "0.5", "1")
    assert [cell.strip() for cell in row.split("|")[2:-1]] == [shown(found[f"alpha 0.5, beta {b}"]) for b in betas]
