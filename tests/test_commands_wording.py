"""Messages of the library in the words of the command line, and as they are for who calls it in Python."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
from command_files import flags, parsed, write_files, write_prompt
from helpers import GENERIC, build, make_collator
from small_evaluations import measured

from spul.commands.evaluate import EvaluateOptions, run
from spul.commands.main import commands_of, main
from spul.commands.wording import in_options, messages_in_options
from spul.data.unlearning_data import SPLITS
from spul.evaluation.attack_settings import AttackSettings
from spul.evaluation.results import Evaluation

pytestmark = pytest.mark.usefixtures("few_resamples")


def evaluated(tmp_path, **more):
    files = write_files(tmp_path)
    sets = {name: files[name] for name in ("forget", "retain", "test_forget", "test_retain")}
    values = {"model": write_prompt(tmp_path / "prompt"), "base": files["model"], **sets, "generic": GENERIC, **more}
    given = {name: value for name, value in values.items() if value is not None}
    with messages_in_options(EvaluateOptions):
        assert run(parsed("evaluate", {**given, "output_dir": tmp_path / "out"})) is None


def test_an_attack_that_is_cut_off_names_the_option_and_in_python_the_collator(tmp_path):
    more = {"measures": ["input-attack"], "attacks": ["jailbreak 5 before"], "max_length": 40}
    with pytest.warns(UserWarning, match=r"part of the text or of the attack is cut off\. Raise --max-length\."):
        evaluated(tmp_path, **more)
    attacks = AttackSettings(only=("jailbreak 5 before",))
    with pytest.warns(UserWarning, match=r"is cut off\. Raise the collator's max_length\."):
        measured(build("llama"), "input attack", attacks=attacks, collator=make_collator(max_length=40))


def test_an_adapter_without_its_base_is_told_both_options(tmp_path):
    with pytest.raises(ValueError, match=r"none is given; expected --model BASE --adapter FOLDER\."):
        evaluated(tmp_path, base=None)


def test_rows_that_do_not_fit_the_model_name_the_option(tmp_path):
    with pytest.raises(ValueError, match=r"^--max-length 95 and .* 96 positions; expected --max-length 92 at most"):
        evaluated(tmp_path, max_length=95)


def test_the_report_names_options_and_the_files_that_python_reads_arguments(tmp_path):
    with pytest.warns(UserWarning, match="Raise --max-length"):
        evaluated(tmp_path, measures=["input-attack", "utility"], attack_rows=2, max_length=80)
    report = (tmp_path / "out" / "report.md").read_text()
    skipped = Evaluation.load(tmp_path / "out").skipped
    for option, argument in (
        ("give --names", "give AttackSettings(names=...)"),
        ("give --text-field", "give the collator a text_field"),
        ("give --retrained", "give retrained="),
        ("call spul.evaluate in Python with AttackSettings(paraphrase=...)", "give AttackSettings(paraphrase=...)"),
    ):
        assert option in report
        assert any(argument in why for why in skipped.values())
        assert argument not in report


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        (
            "hold_out",
            0.01,
            "--hold-out 0.01 of the 6 different forget prompt(s) leaves a part empty; expected at least one prompt in "
            "each.",
        ),
        ("resume", True, "--resume true, but '{}' holds no complete checkpoint; leave it out to start anew."),
    ],
)
def test_errors_of_a_training_name_its_options(tmp_path, capsys, option, value, message):
    files = {name: path for name, path in write_files(tmp_path).items() if name in ("model", "forget", "retain")}
    given = {**files, "generic": GENERIC, "output_dir": tmp_path / "out", "num_virtual_tokens": 2, "use_cpu": True}
    given |= {"start": "random", option: value}
    assert main(["train", *flags(given)]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"spul train: {message.format(tmp_path / 'out')}"


def test_what_only_an_evaluation_takes_is_not_named_by_other_commands():
    text = "give base=, or AttackSettings(names=...); expected the base, by name or folder."
    assert in_options(text, commands_of("train")[""].options) == text


def test_other_messages_and_errors_are_left_as_they_are():
    with pytest.warns(DeprecationWarning, match="^as it was$"), messages_in_options(EvaluateOptions):
        warnings.warn("as it was", DeprecationWarning, stacklevel=1)
    error = FileNotFoundError("give base=")
    with pytest.raises(FileNotFoundError) as found, messages_in_options(EvaluateOptions):
        raise error
    assert found.value is error
    for text in (
        "the base, its names and the seed stay as they are",  # words of English that are names of options, too
        "it has test_forget.accuracy and test_retain.accuracy",
        "/home/me/output_dir/max_length holds 'output_dir'",
        "give AttackSettings",
    ):
        assert in_options(text, EvaluateOptions) == text


@pytest.mark.parametrize("name", sorted({field.name for field in dataclasses.fields(EvaluateOptions)} - set(SPLITS)))
def test_every_option_is_named_where_a_message_names_its_argument(name):
    flag = f"--{name.replace('_', '-')}"
    for text, worded in (
        (f"give {name}=, another one", f"give {flag}, another one"),
        (f"leave out {name}=", f"leave out {flag}"),
        (f"{name}=-3: expected 1", f"{flag} -3: expected 1"),
        (f"the collator's {name}=0.5.", f"{flag} 0.5."),
        (f"{name}='a b'; expected another, or {name}=\"'\".", f"{flag} 'a b'; expected another, or {flag} \"'\"."),
        (f"give AttackSettings({name}=...); without", f"give {flag}; without"),
    ):
        assert in_options(text, EvaluateOptions) == worded


@pytest.mark.parametrize(
    ("text", "worded"),
    [
        ("give the collator a text_field, the column", "give --text-field, the column"),
        ("give the collator a smaller max_length.", "give a smaller --max-length."),
        ("Raise the collator's max_length.", "Raise --max-length."),
        ("generic=[' a', ' b']: expected one", "--generic [' a', ' b']: expected one"),
        ("the collator has generic=[]; give some", "the collator has --generic []; give some"),
        ("give another output_dir", "give another --output-dir"),
        ("such as evaluate(batch_size=8, seed=1)", "such as evaluate(batch_size=8, seed=1)"),
        ("give neighbors=, sets of rows", "call spul.evaluate in Python with neighbors=, sets of rows"),
        (
            "give AttackSettings(gradient_norm=True); it takes long",
            "call spul.evaluate in Python with AttackSettings(gradient_norm=True); it takes long",
        ),
    ],
)
def test_messages_about_the_collator_and_about_what_has_no_option_are_worded(text, worded):
    assert in_options(text, EvaluateOptions) == worded
