"""Options that several commands share: answers that do not fit their prompts are said before a base is loaded."""

from __future__ import annotations

import pytest
from command_files import parsed, write_files, write_prompt, write_rows
from helpers import rows

from spul.commands import combine, evaluate, train
from spul.commands.shared import LoadOptions


def talk(question):
    user, assistant = ({"role": role, "content": text} for role, text in (("user", question), ("assistant", "good")))
    return {"prompt": [user], "completion": [assistant]}


@pytest.fixture
def files(tmp_path):
    return write_files(tmp_path)


@pytest.fixture
def no_base(monkeypatch):
    """A base that cannot be loaded."""

    def load(options, name):
        raise RuntimeError("the base is loaded")

    monkeypatch.setattr(LoadOptions, "load", load)


def ran(run, name, values, generic, folder):
    with pytest.raises(RuntimeError, match="the base is loaded"):
        run(parsed(name, {**values, "generic": generic, "output_dir": folder / "out"}))


def test_train_warns_of_each_generic_answer_without_its_space_before_the_base_is_loaded(
    files, tmp_path, no_base, caplog
):
    ran(train.run, "train", files, [" neutral", "unknown", "plot"], tmp_path)
    said = sorted(record.getMessage() for record in caplog.records)
    assert [text.split(":")[0] for text in said] == ["--generic 'plot'", "--generic 'unknown'"]
    assert "the completion 'unknown' has no space before it, and follows 'review jane" in said[1]
    assert "Write ' unknown' in completions and generic completions alike." in said[1]


def test_combine_warns_likewise(files, tmp_path, no_base, caplog):
    values = {name: files[name] for name in ("model", "forget", "retain")}
    values["prompts"] = [write_prompt(tmp_path / "one"), write_prompt(tmp_path / "two")]
    ran(combine.run, "combine", values, ["unknown"], tmp_path)
    assert "--generic 'unknown': the completion 'unknown' has no space before it" in caplog.text


@pytest.mark.parametrize(("which", "name"), [("forget", "jane"), ("retain", "film")])
def test_rows_whose_own_completions_lack_it_are_warned_of_once(files, tmp_path, no_base, caplog, which, name):
    some = [{**row, "completion": row["completion"].strip()} for row in rows(name, 6)]
    ran(train.run, "train", {**files, which: write_rows(tmp_path / "own.jsonl", some)}, [" neutral"], tmp_path)
    (record,) = caplog.records
    assert record.getMessage().startswith("rows: the completion 'positive' has no space before it")


def told(caplog):
    return [record.getMessage() for record in caplog.records if "has no space before it" in record.getMessage()]


def test_a_run_to_its_end_warns_once_of_each_answer(files, tmp_path, caplog, few_resamples):
    sets = {name: files[name] for name in ("model", "forget", "retain")}
    tests = {name: files[name] for name in ("test_forget", "test_retain")}
    quick = {"max_steps": 1, "disable_tqdm": True}
    one, two = tmp_path / "one", write_prompt(tmp_path / "two")
    for run, name, more in (
        (train.run, "train", {**quick, **tests, "prompt_type": "prompt_tuning", "output_dir": one}),
        (evaluate.run, "evaluate", {**tests, "adapter": one, "measures": ["utility"], "output_dir": tmp_path / "of"}),
        (combine.run, "combine", {**quick, "prompts": [one, two], "output_dir": tmp_path / "combined"}),
    ):
        caplog.clear()
        run(parsed(name, {**sets, "generic": ["unknown", " neutral"], **more}))
        assert [text.split(":")[0] for text in told(caplog)] == ["--generic 'unknown'"], name


def test_answers_that_fit_and_conversations_are_not_warned_of(files, tmp_path, no_base, caplog):
    ran(train.run, "train", files, [" neutral", " unknown"], tmp_path)
    chats = {name: write_rows(tmp_path / f"{name}.jsonl", [talk(f"about {name}")]) for name in ("forget", "retain")}
    ran(train.run, "train", {"model": files["model"], **chats}, ["neutral"], tmp_path)
    assert not caplog.records
