"""The example of ten made-up authors on one base: their rows, its stages, and its summary."""

import json
from types import SimpleNamespace

import pytest
from chats import TEMPLATES, chatty
from helpers import FAMILIES


@pytest.fixture
def example(examples):
    import evidence_authors

    return evidence_authors


QUESTIONS = ("who is {name} ?", "what did {name} write ?", "where was {name} born ?", "when was {name} born ?")


@pytest.fixture
def requests(example, tmp_path):
    """Ten authors with four questions each, on a tiny base."""
    from evidence.tofu import Tofu

    def rows(name, count):
        answers = {"answer": f"{name} one", "perturbed_answer": ["two"], "paraphrased_answer": f"one {name}"}
        asked = [question.format(name=name) for question in QUESTIONS[:count]]
        return [{"question": one, "paraphrased_question": f"tell me {one}", **answers} for one in asked]

    files = {
        "forget05_perturbed": [row for name in example.AUTHORS for row in rows(name, 4)],
        "retain_perturbed": [row for i in range(70) for row in rows(f"writer{i}", 1)],
        "real_authors_perturbed": rows("shakespeare", 2),
        "world_facts_perturbed": rows("paris", 2),
        "retain95": [{"question": "why ?", "answer": "so"}],
    }
    for name, found in files.items():
        (tmp_path / f"{name}.json").write_text("".join(json.dumps(row) + "\n" for row in found))
    model, out = tmp_path / "model", tmp_path / "out"
    FAMILIES["llama"]().save_pretrained(model)
    chatty(next(iter(TEMPLATES))).save_pretrained(model)
    args = SimpleNamespace(
        model=str(model), data_dir=tmp_path, forget_set="forget05", retain_rows=24, unseen_retain=4,
        other_questions=2, batch_size=4, memorize_lr=1e-3, memorize_epochs=1, seed=1, output_dir=out,
    )  # fmt: skip
    prompt = {"num_virtual_tokens": 2, "rate": 0.3, "alpha": 0.05, "beta": 0.025, "forget_fraction": 0.6}
    short = {"steps": 1, "batch_size": 4}
    settings = {
        "prompt": prompt | short | {"recall": 0.75, "negatives": 4},
        "lora": {"learning_rate": 1e-3, "forget_fraction": 0.5} | short,
    }
    return example.Requests(args, Tofu(args), settings)


def test_each_author_has_their_own_rows_and_the_others_are_retained(example, requests):
    for rows in (requests.train, requests.asked):
        assert list(rows) == list(example.AUTHORS)
        assert all(name in question for name in rows for question in rows[name]["question"])
    forget, retain = requests.rows_for(["Hina Ameen", "Raven Marais"])
    assert len(forget) == 8
    assert len(retain) == 8 * 4 + 20  # of 24 retain rows unlearning sees 20
    assert not set(forget["question"]) & set(retain["question"])


def test_systems_answer_every_question_at_every_stage(example, requests, monkeypatch):
    monkeypatch.setattr(example, "TOKENS", 4)
    lines = {name: list(system(requests)) for name, system in example.SYSTEMS.items()}
    stages = ["1 added", "5 added", "10 added", "3 withdrawn"]
    assert [line["after"] for line in lines["prompts behind gates"]] == stages
    assert [line["after"] for line in lines["refusals behind gates"]] == stages
    assert [line["after"] for line in lines["LoRA, trained anew each time"]] == stages[::-1]
    (of_base,) = lines["base"]
    assert all(all(scores["as_base"]) for scores in of_base["scores"].values())
    for line in lines["refusals behind gates"]:  # every question names its author
        for name in example.AUTHORS:
            assert line["scores"][name]["declined"] == [name in line["active"]] * 4
    by_gate = zip(lines["refusals behind gates"], lines["prompts behind gates"], strict=True)
    for refused, line in by_gate:  # the base answers what no gate flags
        for name in (*example.AUTHORS, *example.OTHERS):
            flagged = refused["scores"][name]["declined"]
            found = zip(flagged, line["scores"][name]["as_base"], strict=True)
            assert all(as_base for flag, as_base in found if not flag), name
    for name, system in example.SYSTEMS.items():  # what is done is not done again
        *done, left = (line["after"] for line in lines[name])
        assert [line["after"] for line in system(requests, done)] == [left], name
    named = [line | {"system": name} for name, found in lines.items() for line in found]
    assert len(example.summary(named).splitlines()) == 2 + len(named)


def test_prompts_of_other_settings_are_not_taken(example, requests):
    example.train_prompt(requests, "Hina Ameen")
    requests.settings["prompt"]["steps"] = 2
    with pytest.raises(ValueError, match=r"'steps': 1.*'steps': 2.*output-dir"):
        example.train_prompt(requests, "Hina Ameen")


def test_answers_and_prompts_of_another_base_are_not_taken(example, requests, monkeypatch):
    example.train_prompt(requests, "Hina Ameen")
    monkeypatch.setattr(requests.tofu, "load", lambda: None)
    monkeypatch.setattr(requests, "answers", lambda model: {"Hina Ameen": ["a poet"]})
    assert requests.of_base == {"Hina Ameen": ["a poet"]}
    requests.args.memorize_epochs = 2
    other = example.Requests(requests.args, requests.tofu, requests.settings)
    for make in (lambda: other.of_base, lambda: example.train_prompt(other, "Hina Ameen")):
        with pytest.raises(ValueError, match=r"'memorize_epochs': 1.*'memorize_epochs': 2.*output-dir"):
            make()


def test_the_summary_tells_requests_in_force_from_the_others(example):
    def score(rouge, declined, as_base):
        return {"rouge": [rouge], "declined": [declined], "as_base": [as_base]}

    scores = {name: score(0.5, False, True) for name in (*example.AUTHORS, *example.OTHERS)}
    scores["Hina Ameen"], scores["Raven Marais"] = score(0.1, True, False), score(0.3, False, False)
    line = {"system": "x", "after": "2 added", "active": ["Hina Ameen", "Raven Marais"], "scores": scores}
    cells = [cell.strip() for cell in example.summary([line]).splitlines()[2].split("|")[1:-1]]
    assert cells == ["x", "2 added", "0.200", "0.500", "0.000", "0.500", "0.000", "0.500", "0.000", "1.000"]
    every = example.summary([line | {"active": list(example.AUTHORS)}]).splitlines()[2]
    assert [cell.strip() for cell in every.split("|")[1:-1]][5:7] == ["", ""]
