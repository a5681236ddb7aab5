"""The example of many requests on one base: whose rows are whose, and which count as forgotten."""

import argparse
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from datasets import Dataset

ROOT = Path(__file__).parents[1]
EXAMPLES, DOCS = ROOT / "examples", ROOT / "docs"


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import evidence_requests

    return evidence_requests


def reviews(*texts):
    return Dataset.from_list([{"text": text, "prompt": f"{text}:", "completion": " positive"} for text in texts])


@pytest.fixture
def requests(example):
    named = reviews("spielberg and sandler", "sandler again", "chan runs", "murphy talks")
    rows = {"train_forget": named, "test_forget": named, "train_retain": reviews("a film", "another")}
    experiment = SimpleNamespace(rows=rows, scored={"test_retain": rows["train_retain"]})
    return example.Requests(argparse.Namespace(seed=1), experiment, {"retain_rows": 2})


def test_a_row_that_names_several_is_the_first_ones(example):
    found = example.by_person(reviews("sandler meets spielberg", "sandler"), ["spielberg", "sandler", "chan"])
    assert {name: rows["text"][:] for name, rows in found.items()} == {
        "spielberg": ["sandler meets spielberg"],
        "sandler": ["sandler"],
        "chan": [],
    }


def test_the_other_people_are_retain_rows_of_a_request(requests):
    rows = requests.rows_for(["sandler"])
    assert rows["forget"]["text"][:] == ["sandler again"]
    assert sorted(rows["retain"]["text"]) == sorted(
        ["spielberg and sandler", "chan runs", "murphy talks", "a film", "another"]
    )


def test_requests_trained_together_are_forget_rows_all(requests):
    rows = requests.rows_for(["sandler", "chan"])
    assert sorted(rows["forget"]["text"]) == ["chan runs", "sandler again"]
    assert sorted(rows["retain"]["text"]) == sorted(["spielberg and sandler", "murphy talks", "a film", "another"])


def test_the_order_is_of_all_people_and_the_withdrawn_are_among_them(example, requests):
    assert sorted(requests.order) == sorted(requests.people)
    assert len(set(requests.withdrawn)) == example.WITHDRAWN
    assert set(requests.withdrawn) < set(requests.people)
    assert requests.left == [name for name in requests.order if name not in requests.withdrawn]


def test_scores_tell_requests_in_force_from_the_others(example, requests, monkeypatch):
    right = {"spielberg and sandler": 0, "sandler again": 1, "chan runs": 1, "murphy talks": 1}

    def row_scores(model, rows, experiment, position):
        return {"accuracy": [right.get(text, 1) for text in rows["text"]]}

    monkeypatch.setattr(example, "row_scores", row_scores)
    requests.people = ["spielberg", "sandler", "chan", "murphy"]  # those with rows
    found = requests.scores(None, "start", ["spielberg", "sandler"])
    assert found == {"forget": 0.5, "worst request": 1.0, "other people": 1.0, "retain": 1.0}
    assert requests.scores(None, "start", requests.people)["other people"] is None


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


def test_the_table_on_smollm2_has_the_numbers_of_its_lines():
    page = (DOCS / "evidence.md").read_text().split("### Ten requests on SmolLM2")[1].split("**Three seeds**")[0]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("|")]
    table = {name: values for name, *values in cells}
    text = (DOCS / "data" / "evidence" / "requests-smollm2.jsonl").read_text()
    found = {(one["seed"], one["system"], one["after"]): one for one in map(json.loads, text.splitlines())}
    for name, key in LINES.items():
        each = [found[(seed, *key)] for seed in (1, 2, 3) if (seed, *key) in found]
        assert len(each) == (1 if "LoRA" in name else 3)
        seeds = [[f"{100 * value:.1f}" if value != "" else "" for value in values_of(one)] for one in each]
        expected = [", ".join(filter(None, values)) for values in zip(*seeds, strict=True)]
        if key[0] == "base":  # no request is in force: its worst row says nothing
            expected[1] = ""
        assert table[name] == expected, name
    base = {one["seed"]: one["retain"] for one in found.values() if one["system"] == "base"}
    alike = [one for one in found.values() if "LoRA" not in one["system"]]
    assert all(one["retain"] == base[one["seed"]] for one in alike)


def test_the_table_of_three_seeds_has_the_means_of_its_lines_and_each():
    page = (DOCS / "evidence.md").read_text().split("**Three seeds**")[1].split("###")[0]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("|")]
    text = (DOCS / "data" / "evidence" / "requests-smollm2-60-steps.jsonl").read_text()
    lines = list(map(json.loads, text.splitlines()))
    systems = {"refusals": "refusals behind gates", "prompts": "prompts behind gates"}
    systems |= {"LoRA merged": "LoRA, merged each time"}
    systems |= {"LoRA, merged each time": "LoRA, merged each time", "LoRA": "LoRA, trained anew each time"}
    for name, *values in cells[2:]:
        after = "3 withdrawn" if "withdrawn" in name else "5 added" if ", 5" in name else "10 added"
        system = "base" if name == "base" else next(full for word, full in systems.items() if name.startswith(word))
        one = [line for line in lines if line["system"] == system and (line["after"] == after or system == "base")]
        assert len(one) == 3
        for value, column in zip(values, ("forget", "worst request", "other people", "retain"), strict=True):
            each = [line[column] for line in one]
            if not value or not value[0].isdigit():
                continue
            mean, _, seeds = value.partition(" (")
            assert float(mean) == pytest.approx(100 * sum(each) / 3, abs=0.051), (name, column)
            if seeds:
                assert seeds.rstrip(")") == ", ".join(f"{100 * number:.1f}" for number in each), (name, column)
    base = {line["seed"]: line["retain"] for line in lines if line["system"] == "base"}
    assert all(line["retain"] == base[line["seed"]] for line in lines if line["system"].endswith("behind gates"))


def values_of(line):
    columns = ("forget", "worst request", "other people", "retain")
    return ["" if line[column] is None else line[column] for column in columns]
