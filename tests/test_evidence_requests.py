"""The example of many requests on one base: whose rows are whose, and which count as forgotten."""

import argparse
from types import SimpleNamespace

import pytest
from datasets import Dataset


@pytest.fixture
def example(examples):
    import evidence_requests

    return evidence_requests


def reviews(*texts):
    return Dataset.from_list([{"text": text, "prompt": f"{text}:", "completion": " positive"} for text in texts])


@pytest.fixture
def requests(example):
    named = reviews("spielberg and sandler", "sandler again", "chan runs", "murphy talks")
    rows = {"train_forget": named, "test_forget": named, "train_retain": reviews("a film", "another")}
    experiment = SimpleNamespace(rows=rows, scored={"test_retain": rows["train_retain"]}, digest="ab12")
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


def test_the_order_is_of_all_people_and_the_withdrawn_are_among_them(requests):
    order = requests.order
    assert sorted(order.added) == sorted(requests.people)
    assert len(set(order.withdrawn)) == 3
    assert set(order.withdrawn) < set(requests.people)
    assert order.left == [name for name in order.added if name not in order.withdrawn]
    assert order.stages == {
        "1 added": order.added[:1],
        "5 added": order.added[:5],
        "10 added": order.added,
        "3 withdrawn": order.left,
    }


def test_prompts_of_other_settings_or_another_base_are_not_taken(example, requests, monkeypatch, tmp_path):
    def build(kind, experiment, rows, settings, folder):
        folder.mkdir(parents=True)
        return None, {"seconds": 1.0}

    monkeypatch.setattr(example, "build", build)
    requests.args.output_dir = tmp_path
    made = example.train_prompt(requests, "sandler", {}, {"steps": 1})
    assert example.train_prompt(requests, "sandler", {}, {"steps": 1}) == made  # not built again
    with pytest.raises(ValueError, match=r"'steps': 1.*'steps': 2.*output-dir"):
        example.train_prompt(requests, "sandler", {}, {"steps": 2})
    requests.experiment.digest = "cd34"
    with pytest.raises(ValueError, match=r"ab12.*cd34.*output-dir"):
        example.train_prompt(requests, "sandler", {}, {"steps": 1})


def test_scores_tell_requests_in_force_from_the_others(example, requests, monkeypatch):
    right = {"spielberg and sandler": 0, "sandler again": 1, "chan runs": 1, "murphy talks": 1}

    def row_scores(model, rows, experiment, position):
        return {"accuracy": [right.get(text, 1) for text in rows["text"]]}

    monkeypatch.setattr(example, "row_scores", row_scores)
    requests.people = ["spielberg", "sandler", "chan", "murphy"]  # those with rows
    found = requests.scores(None, "start", ["spielberg", "sandler"])
    assert found == {"forget": 0.5, "worst request": 1.0, "other people": 1.0, "retain": 1.0}
    assert requests.scores(None, "start", requests.people)["other people"] is None
