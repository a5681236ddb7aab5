"""`spul evaluate`: the answers that count as generic, given, recorded, or of a fixed refusal."""

from __future__ import annotations

import shutil

import pytest
from command_files import options_for, parsed, write_models
from helpers import GENERIC

from spul.commands.evaluate import run
from spul.evaluation.results import Evaluation
from spul.gates import NameGate
from spul.records.spul_config import read_spul_config
from spul.rivals.refusal import write_refusal


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("files"))


@pytest.fixture
def recorded(files, tmp_path):
    """Folders of a prompt, and of it behind a gate, whose record has generic completions."""
    for name, inner in (("adapter", "."), ("gated", ".")):
        shutil.copytree(files[name], tmp_path / name)
        record = read_spul_config(tmp_path / name / inner)
        record.generic_completions = GENERIC
        record.save(tmp_path / name / inner)
    return tmp_path


@pytest.mark.parametrize("name", ["adapter", "gated"])
def test_generic_answers_are_those_of_the_record_unless_others_are_given_which_is_warned_of(
    files, recorded, caplog, few_resamples, name
):
    for given, expected, warned in ((None, GENERIC, 0), (GENERIC[::-1], GENERIC[::-1], 0), ([" good"], [" good"], 1)):
        caplog.clear()
        out = recorded / f"out-{name}-{given}"
        values = options_for(files, str(recorded / name), out, base=files["model"])
        values = {**values, "generic": given} if given else {k: v for k, v in values.items() if k != "generic"}
        assert run(parsed("evaluate", values)) is None
        assert Evaluation.load(out).settings["generic_completions"] == expected
        said = [record.getMessage() for record in caplog.records if "the record says" in record.getMessage()]
        assert len(said) == warned


@pytest.mark.parametrize("name", ["adapter", "gated", "lora", "model", "guardrail"])
def test_generic_answers_are_required_of_what_has_no_record_of_them(files, tmp_path, name):
    values = options_for(files, files[name], tmp_path / "out", **({} if name == "model" else {"base": files["model"]}))
    del values["generic"]
    with pytest.raises(ValueError, match=r"has no record of the answers .*: --generic ' neutral' ' unknown'"):
        run(parsed("evaluate", values))


@pytest.mark.parametrize(
    ("given", "expected", "warned"),
    [
        (None, [" unknown"], 0),
        ([" neutral", "unknown "], [" neutral", "unknown "], 0),
        ([" neutral"], [" neutral"], 1),
    ],
)
def test_the_text_of_a_fixed_refusal_is_generic_unless_told_otherwise(
    files, tmp_path, few_resamples, caplog, given, expected, warned
):
    values = options_for(files, files["refusal"], tmp_path, base=files["model"], generic=given)
    values = {name: value for name, value in values.items() if value is not None}
    assert run(parsed("evaluate", values)) is None
    assert Evaluation.load(tmp_path).settings["generic_completions"] == expected
    said = [record.getMessage() for record in caplog.records if "the fixed refusal" in record.getMessage()]
    assert said == ["--generic [' neutral']: the fixed refusal ' unknown' is none of these."] * warned


def test_a_refusal_that_does_not_fit_where_prompts_end_is_warned_of_by_its_folder(
    files, tmp_path, few_resamples, caplog
):
    write_refusal(tmp_path / "refusal", NameGate(["jane"]), "unknown")
    values = options_for(files, tmp_path / "refusal", tmp_path / "out", base=files["model"])
    del values["generic"]
    assert run(parsed("evaluate", values)) is None
    assert f"{tmp_path / 'refusal'}, its answer 'unknown': the completion 'unknown' has no space before" in caplog.text
    assert "--generic" not in caplog.text
