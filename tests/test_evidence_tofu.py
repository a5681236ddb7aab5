"""The example of TOFU on a chat model: its format, its summary, and its memorized models."""

import json
import sys
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
from chats import TEMPLATES, chatty

from spul.data.formats import REFUSALS

FITTED = "SPUL, prefix with fitted keys"


@pytest.fixture
def example(examples):
    import evidence_tofu

    return evidence_tofu


@pytest.fixture
def tofu(example):
    from evidence import tofu

    return tofu


def test_a_question_stands_where_the_chat_template_puts_it(tofu):
    tokenizer = chatty(next(iter(TEMPLATES)))
    row = tofu.chat_format(tokenizer).row({"question": "who is {jane} ?", "answer": "a poet ."})
    turn = [{"role": "user", "content": "who is {jane} ?"}]
    assert row["prompt"] == tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    assert row["completion"] == "a poet ."


def test_answers_that_are_trained_refusals_count_as_declined(example):
    line = {"system": "x", "answers": {"forget": [REFUSALS[0].strip(), "no"], "retain": ["no"]}}
    line["answers_rouge"] = {"forget": [0.0, 0.5], "retain": [1.0]}
    cells = [cell.strip() for cell in example.summary([line]).splitlines()[2].split("|")[1:-1]]
    assert [cells[0], cells[3], cells[5], cells[7], cells[8]] == ["x", "0.25", "0.50", "1.00", "0.00"]


def test_models_that_learned_other_rows_are_not_taken(tofu, tmp_path):
    names = {"forget_set": "forget01", "retain_rows": 100, "memorize_lr": 1e-3, "memorize_epochs": 12, "batch_size": 8}
    made = tofu.Tofu.__new__(tofu.Tofu)
    made.args = SimpleNamespace(**names, model="here/model", output_dir=tmp_path, seed=1)
    folder = tmp_path / "base-1"
    folder.mkdir()
    (folder / "memorized.json").write_text(json.dumps({"learned_from": made.learned_from}))
    assert made.folder("base") == folder
    made.args.forget_set = "forget05"
    with pytest.raises(ValueError, match=r"forget01.*forget05.*output-dir"):
        made.folder("base")
    (folder / "memorized.json").write_text('{"epochs": 3}')
    with pytest.raises(ValueError, match=r"memorized.json has no settings: an earlier version stored it.*output-dir"):
        made.folder("base")


@pytest.fixture
def run(example, tofu, monkeypatch, tmp_path):
    """A function of options that runs the command and returns what it measures; nothing is trained or loaded."""
    measured = []

    class NoRows(tofu.Tofu):
        def __init__(self, args):
            self.args, self.tokenizer = args, None

        def load(self, name="base"):
            if not self.is_memorized(name):
                self.record(name).parent.mkdir()
                self.record(name).write_text(json.dumps({"learned_from": self.learned_from}))

        def made_in(self, name, settings, make):
            def instead(folder):
                folder.mkdir()
                return {}

            return super().made_in(name, settings, instead)

    def scores(tofu, model):
        measured.append(model)
        return {"answers": {"forget": ["a"], "retain": ["a"]}, "answers_rouge": {"forget": [1.0], "retain": [1.0]}}

    monkeypatch.setattr(example, "Tofu", NoRows)
    monkeypatch.setattr(example, "scores", scores)
    for name in ("SoftPromptUnlearner", "PeftModel", "GatedUnlearner", "load"):
        monkeypatch.setattr(example, name, MagicMock())

    def run(*options):
        files = ["--model", "m", "--data-dir", "d", "--output-dir", str(tmp_path)]
        names = ["--systems", "base", FITTED, example.GATED, example.LORA]
        monkeypatch.setattr(sys, "argv", ["evidence_tofu.py", *files, *names, *options])
        measured.clear()
        example.main()
        lines = (tmp_path / "tofu.jsonl").read_text().splitlines()
        return [json.loads(line)["system"] for line in lines[len(lines) - len(measured) :]]

    return run


def test_what_was_measured_with_other_options_is_measured_anew(example, run):
    everything = ["base", FITTED, example.GATED, example.LORA]
    assert run() == everything
    assert run() == []
    assert run("--lora-lr", "1e-4") == [example.LORA]
    assert run("--recall", "0.9") == [example.GATED]
    for option in ("--other-questions", "--unseen-retain", "--steps"):
        assert run(option, "3") == everything, option
        assert run(option, "3") == [], option
    assert run() == []


def test_what_was_memorized_with_other_options_is_refused_before_anything_is_measured(run, tmp_path):
    run()
    before = (tmp_path / "tofu.jsonl").read_text()
    for option in ("--memorize-lr", "--memorize-epochs", "--retain-rows", "--batch-size"):
        with pytest.raises(ValueError, match=r"base-1 was made with .*take another --output-dir"):
            run("--systems", "vanilla", "base", option, "3")
    assert (tmp_path / "tofu.jsonl").read_text() == before
