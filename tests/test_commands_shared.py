"""Options that several commands share: answers that do not fit their prompts are said before a base is loaded."""

from __future__ import annotations

import pytest
from command_files import parsed, write_files, write_prompt, write_rows
from helpers import rows

from spul.commands import combine, evaluate, gate, train
from spul.commands.shared import LoadOptions
from spul.data import RowEncoder


def talk(question):
    user, assistant = ({"role": role, "content": text} for role, text in (("user", question), ("assistant", "good")))
    return {"prompt": [user], "completion": [assistant]}


@pytest.fixture
def files(tmp_path):
    return write_files(tmp_path)


@pytest.mark.parametrize("command", ["train", "combine", "evaluate", "gate"])
def test_a_file_of_rows_to_forget_is_none_of_rows_that_stay_and_is_given_once(files, tmp_path, command):
    link = tmp_path / "link.jsonl"
    link.symlink_to(files["forget"])
    values = {**files, "generic": [" unknown"], "output_dir": tmp_path / "out"}
    run, sub, own, few = {
        "train": (train.run, "", {}, ()),
        "combine": (combine.run, "", {"prompts": ["a", "b"]}, ("test_forget", "test_retain")),
        "evaluate": (evaluate.run, "", {}, ()),
        "gate": (gate.fit, "fit", {"adapter": tmp_path, "kind": "text"}, (*list(files)[2:], "generic", "output_dir")),
    }[command]
    values = {name: value for name, value in {**values, **own}.items() if name not in few}
    with pytest.raises(ValueError, match=r"link\.jsonl is given to --forget and to --retain; expected rows to forget"):
        run(parsed(command, {**values, "retain": link}, sub))
    if command != "gate":
        with pytest.raises(ValueError, match=r"--forget has .*link\.jsonl twice, whose rows would count twice"):
            run(parsed(command, {**values, "forget": [files["forget"], link]}, sub))
    for name in {"test_forget", "test_retain"} & values.keys():
        other, opposite = ("--retain", files["retain"]) if name == "test_forget" else ("--forget", files["forget"])
        with pytest.raises(ValueError, match=f"is given to {other} and to --{name.replace('_', '-')}"):
            run(parsed(command, {**values, name: opposite}, sub))


@pytest.fixture
def no_base(monkeypatch):
    """A base that cannot be loaded."""

    def load(options, name):
        raise RuntimeError("the base is loaded")

    monkeypatch.setattr(LoadOptions, "load", load)


def ran(run, name, values, generic, folder):
    with pytest.raises(RuntimeError, match="the base is loaded"):
        run(parsed(name, {**values, "generic": generic, "output_dir": folder / "out"}))


@pytest.mark.parametrize(
    ("command", "name"),
    [
        *((command, name) for command in ("train", "combine", "evaluate", "gate") for name in ("forget", "retain")),
        *((command, name) for command in ("train", "evaluate") for name in ("test_forget", "test_retain")),
    ],
)
def test_rows_that_say_they_are_of_the_other_set_are_refused_by_every_command(files, tmp_path, no_base, command, name):
    flag, folder = name.endswith("forget"), write_prompt(tmp_path / "adapter")
    mixed = [{**row, "is_forget": flag == (i > 1)} for i, row in enumerate(rows("mixed", 5))]
    sets = {**files, name: write_rows(tmp_path / "mixed.jsonl", mixed)}
    values = {"generic": [" unknown"], "output_dir": tmp_path / "out", **sets}
    run, sub, own = {
        "train": (train.run, "", {}),
        "combine": (combine.run, "", {"prompts": [folder, folder]}),
        "evaluate": (evaluate.run, "", {"adapter": folder}),
        "gate": (gate.fit, "fit", {"adapter": folder, "kind": "text"}),
    }[command]
    if command == "gate":
        values = {one: path for one, path in sets.items() if one in ("forget", "retain")}
    if command == "combine":
        values = {one: path for one, path in values.items() if not one.startswith("test_")}
    with pytest.raises(ValueError, match=rf"^2 row\(s\) of .*mixed\.jsonl have is_forget={not flag}; expected {flag}"):
        run(parsed(command, {**values, **own}, sub))


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
    assert record.getMessage().startswith(f"--{which}: the completion 'positive' has no space before it")


def write_stripped(path, name, num, first=0):
    """Rows whose completions lack their space, those before `first` aside."""
    some = [
        {**row, "completion": row["completion"].strip() if i >= first else row["completion"]}
        for i, row in enumerate(rows(name, num))
    ]
    return write_rows(path, some)


def test_a_fault_of_a_generic_answer_silences_none_of_rows_that_come_late(files, tmp_path, no_base, caplog):
    late = write_stripped(tmp_path / "late.jsonl", "film", 90, 80)
    ran(train.run, "train", {**files, "retain": late}, ["unknown"], tmp_path)
    assert [text.split(":")[0] for text in told(caplog)] == ["--generic 'unknown'", "--retain"]


def test_evaluate_warns_of_each_set_and_of_generic_answers_after_each_once(files, tmp_path, caplog, few_resamples):
    own = {name: write_stripped(tmp_path / f"{name}.jsonl", "doe", 3) for name in ("test_forget", "retain", "unseen")}
    values = {**files, **own, "adapter": write_prompt(tmp_path / "one"), "measures": ["utility", "input-attack"]}
    values |= {"attacks": ["capitals"], "max_length": 64, "generic": ["neutral", " unknown"]}
    evaluate.run(parsed("evaluate", {**values, "output_dir": tmp_path / "out"}))
    assert [text.split(":")[0] for text in told(caplog)] == [
        "--generic 'neutral'",
        "--retain",
        "--test-forget",
        "--unseen",
    ]


def test_what_was_not_said_the_encoder_says(tokenizer, caplog, tmp_path):
    options = parsed(
        "evaluate",
        {
            **dict.fromkeys(("forget", "retain", "test_forget", "test_retain"), "f"),
            "model": "m",
            "output_dir": tmp_path,
            "generic": ["unknown"],
        },
    )
    said = options.warn_of_boundaries(tokenizer, {"forget": rows("jane", 3)})
    assert said == {"unknown"}
    caplog.clear()
    encoder = RowEncoder(tokenizer, 64)
    encoder.said_completions = said
    for one in (encoder, encoder.with_max_length(32)):
        one.encode({"prompt": "sentiment:", "completion": "unknown"})
    assert not caplog.records
    encoder.encode({"prompt": "sentiment:", "completion": "positive"})
    assert len(told(caplog)) == 1


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


@pytest.mark.parametrize("name", ["no-such-base", "./no/such/base"])
def test_a_base_that_is_not_there_is_named_and_said_to_be_no_folder(files, tmp_path, name):
    with pytest.raises(OSError, match=f"'{name}' is no folder here, and the Hub gave no tokenizer of this name: "):
        train.run(parsed("train", {**files, "model": name, "generic": [" unknown"], "output_dir": tmp_path / "out"}))
    with pytest.raises(OSError, match=f"'{name}' is no folder here, and the Hub gave no model of this name: "):
        LoadOptions().load(name)


def test_a_folder_without_a_model_is_named_as_what_cannot_be_loaded(tmp_path):
    with pytest.raises(ValueError, match=rf"the tokenizer in '{tmp_path}' cannot be loaded: "):
        LoadOptions().load_tokenizer(str(tmp_path))
    with pytest.raises((ValueError, OSError), match=rf"the model in '{tmp_path}' cannot be loaded: "):
        LoadOptions().load(str(tmp_path))
