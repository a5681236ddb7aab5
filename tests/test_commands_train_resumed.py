"""`spul train --resume`: folders in which a run goes on, and those that are refused."""

from __future__ import annotations

import json
import re
import shutil

import pytest
from command_files import trained, write_files

from spul.prompts import DiscriminativeStart
from spul.records import Ledger, LedgerEvent


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("files"))


def test_a_resumed_training_fits_no_keys_and_ends_as_if_it_were_never_interrupted(
    files, tmp_path, monkeypatch, capsys
):
    more = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    trained(files, tmp_path, **more)
    whole = (tmp_path / "adapter_model.safetensors").read_bytes()
    for step in (2, 3):
        shutil.rmtree(tmp_path / f"checkpoint-{step}")

    def fit(*args):
        raise AssertionError("keys are fitted")

    monkeypatch.setattr(DiscriminativeStart, "keys_and_values", fit)
    capsys.readouterr()
    trained(files, tmp_path, resume="true", **more)
    assert capsys.readouterr().out.startswith("start: the prompt of the checkpoint\n")
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == whole


def test_a_training_is_not_resumed_for_a_request_that_is_revoked(files, tmp_path):
    """It may have begun before, and would make it a request again."""
    more = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1, "request": "1"}
    ledger = Ledger(tmp_path / "ledger.jsonl")
    trained(files, tmp_path / "out", ledger=ledger.path, **more)
    ledger.append(LedgerEvent("revoked", "1"))
    with pytest.raises(
        ValueError, match=r"'1' was revoked on 2.* that is to be resumed.*--event received --request 1"
    ):
        trained(files, tmp_path / "out", ledger=ledger.path, resume="true", **{**more, "model": "no-base"})
    ledger.append(LedgerEvent("received", "1"))
    trained(files, tmp_path / "out", ledger=ledger.path, resume="true", **more)
    assert [entry.event for entry in ledger.entries()] == ["trained", "revoked", "received", "trained"]


def test_a_resumed_training_goes_on_from_its_checkpoint(files, tmp_path):
    more = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "logging_steps": 1}
    trained(files, tmp_path / "whole", **more)
    trained(files, tmp_path / "parts", **{**more, "max_steps": 2, "lr_scheduler_type": "constant", "warmup_steps": 0})
    with pytest.raises(ValueError, match="no complete checkpoint"):
        trained(files, tmp_path / "empty", resume="true", model="no-base", **more)
    trained(files, tmp_path / "parts", resume="true", **more)
    state = json.loads((tmp_path / "parts" / "checkpoint-4" / "trainer_state.json").read_text())
    assert [one["step"] for one in state["log_history"] if "loss" in one] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("passed", "expected"),
    [
        ({"alpha": 0.5}, "loss.alpha: 4.0 saved, 0.5 passed"),
        ({"method": "GA+GD", "generic": None}, "loss.forget.type: CrossEntropy saved, GradientAscent passed"),
        ({"hold_out": 0.34}, "rows.forget: 6 saved, 4 passed; rows.retain: 8 saved, 5 passed"),
        ({"max_length": 64}, "max_length: 92 saved, 64 passed"),
        ({"forget_fraction": 0}, "forget_fraction: 0.5 saved, none passed"),
    ],
)
def test_a_run_is_not_resumed_with_other_rows_or_loss(files, tmp_path, passed, expected):
    more = {"save_strategy": "steps", "save_steps": 3}
    trained(files, tmp_path, **more)
    with pytest.raises(ValueError, match=re.escape(expected)):
        trained(files, tmp_path, resume="true", **more, **passed)


def test_a_folder_with_a_saved_prompt_is_refused_unless_the_run_goes_on_in_it(files, tmp_path):
    trained(files, tmp_path, save_strategy="steps", save_steps=1)
    before = (tmp_path / "adapter_model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match="holds a saved prompt, which may be served; name another folder"):
        trained(files, tmp_path, model="no-base")
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == before
    trained(files, tmp_path, resume=True)


def test_a_folder_with_a_checkpoint_is_refused_unless_the_run_goes_on_from_it(files, tmp_path):
    trained(files, tmp_path, save_strategy="steps", save_steps=3)
    (tmp_path / "adapter_config.json").unlink()  # killed before the end
    with pytest.raises(FileExistsError, match=r"checkpoint-3' is of a run that has not ended; .* --resume true"):
        trained(files, tmp_path, model="no-base")
    (tmp_path / "checkpoint-3" / "trainer_state.json").unlink()  # killed while it saved: nothing to go on from
    trained(files, tmp_path)
