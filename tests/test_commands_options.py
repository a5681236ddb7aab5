"""Options of commands: from flags, and from files."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from spul.commands.command import Command
from spul.commands.main import commands_of, main
from spul.commands.options import parse
from spul.commands.shared import option


@dataclass(kw_only=True)
class Options:
    model: str = option("the base", ...)
    files: list[str] | None = option("files")
    rate: float = option("a rate", 0.5)
    steps: int | None = option("steps")
    quiet: bool = option("whether to be quiet", False)
    loud: bool = option("whether to be loud", True)
    kind: str = field(default="a", metadata={"help": "kind", "choices": ["a", "b"]})


def read(*arguments: str) -> Options:
    command = Command(Options, lambda options: None, "spul toy --model M", "A toy.")
    return parse(command, ["spul", "toy"], list(arguments))


def test_flags_are_read_with_underscores_or_hyphens(tmp_path):
    found = read("--model", "m", "--files", "a", "b", "--rate", "1e-3", "--quiet", "--no-loud")
    assert found == Options(model="m", files=["a", "b"], rate=1e-3, quiet=True, loud=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "the following arguments are required: --model"),
        (("--model", "m", "--rte", "1"), r"unknown option or value '--rte'; did you mean rate\?$"),
        (("--model", "m", "--zzzzzz", "1"), r"spul toy --help lists the options\.$"),
        (("--model", "m", "--mod", "x"), "unknown option or value '--mod'"),
        (("--model", "m", "--rate", "much"), "argument --rate: invalid float value: 'much'"),
        (("--model", "m", "--kind", "c"), "invalid choice: 'c'"),
        (("--model", "m", "--config"), "argument --config: expected one argument"),
        (("--model", "m", "--files", "a", "--files", "b"), "--files is given twice; .*: --files A B"),
        (("--model", "m", "--model=n"), "--model is given twice"),
        (("--model", "m", "--loud", "--no_loud"), "--loud and --no_loud are one"),
    ],
)
def test_flags_that_cannot_be_read_are_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        read(*arguments)


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_a_file_of_options_is_read_as_its_flags_would_be(tmp_path):
    text = "model: m\nfiles: [' a', -b]\nrate: 1e-3\nsteps: 3\nquiet: true\nloud: false\nkind: b\n"
    found = read("--config", write(tmp_path / "c.yaml", text))
    expected = Options(model="m", files=[" a", "-b"], rate=1e-3, steps=3, quiet=True, loud=False, kind="b")
    assert found == expected


def test_values_in_a_file_are_taken_as_they_are_written(tmp_path):
    """YAML itself makes booleans of yes and no, and numbers of 017 and 12:30."""
    text = "model: 017\nfiles: [no, yes, 12:30, 2026-03-01, 1e3, 'null', ~x]\nsteps: 1_000\n"
    found = read("--config", write(tmp_path / "é c.yaml", "\ufeff" + text))
    assert found.model == "017"
    assert found.files == ["no", "yes", "12:30", "2026-03-01", "1e3", "null", "~x"]
    assert found.steps == 1000


def test_flags_win_over_the_file_and_a_later_file_over_an_earlier(tmp_path):
    first = write(tmp_path / "1.yaml", "model: one\nrate: 1\nsteps: null\n")
    second = write(tmp_path / "2.yaml", "model: two\nfiles: x\n")
    found = read("--rate", "3", "--config", first, "--config", second)
    assert found == Options(model="two", files=["x"], rate=3.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modle: m", r"unknown option 'modle'; did you mean model\?$"),
        ("help: true", "unknown option 'help'"),
        ("rate: much", "rate is 'much'; could not convert string to float"),
        ("rate: [1, 2]", "expected a single value"),
        ("kind: c", "expected one of a, b"),
        ("quiet: perhaps", "quiet is 'perhaps'"),
        ("[1, 2]", "holds a sequence; expected options by name"),
        ("", "holds nothing; expected options by name"),
        ("files: [a, null]", "expected a value, not null"),
        ("files: [[a]]", "expected a single value"),
        ("files: a\nfiles: b", "files is given twice"),
        ("steps: 1.5", "steps is '1.5'"),
        ("steps: {[a]: b}", "steps is a mapping"),
        ("model: !!python/name:os.system {}", "model is a mapping; could not determine a constructor"),
        ("a: b: c", "is not YAML"),
    ],
)
def test_keys_and_values_of_a_file_that_are_none_are_errors(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read("--model", "m", "--config", write(tmp_path / "c.yaml", text))


def test_a_file_of_options_that_is_missing_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.yaml does not exist; its folder has nothing in it"):
        read("--config", str(tmp_path / "none.yaml"))
    with pytest.raises(FileNotFoundError, match="is a folder; expected a file"):
        read("--config", str(tmp_path))


def test_options_of_training_arguments_are_read_and_left_out_of_help(tmp_path, capsys):
    one = commands_of("train")[""]
    base = ["--model", "m", "--forget", "f", "--retain", "r", "--output-dir", str(tmp_path), "--use-cpu", "true"]
    settings = write(tmp_path / "c.yaml", "adam_beta2: 0.9\nlr_scheduler_kwargs: {num_cycles: 2}\n")
    found = parse(one, ["spul", "train"], [*base, "--config", settings, "--weight-decay", "0.01"])
    assert (found.adam_beta2, found.weight_decay) == (0.9, 0.01)
    assert found.lr_scheduler_kwargs == {"num_cycles": 2}
    assert found.learning_rate is None
    for shows_all in (False, True):
        with pytest.raises(SystemExit):
            parse(one, ["spul", "train"], ["--help-all" if shows_all else "--help"])
        said = capsys.readouterr().out
        assert ("--adam_beta2" in said) is shows_all
        assert "--forget_fraction" in said


def test_a_mistyped_flag_that_is_required_is_named_with_those_of_a_near_name(capsys):
    assert main(["train", "--model", "m", "--foget", "f.jsonl", "--retain", "r.jsonl", "--output-dir", "out"]) == 2
    assert "unknown option or value '--foget'; did you mean forget or test_forget?\n" in capsys.readouterr().err
