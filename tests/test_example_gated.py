"""examples/gated.py: what other settings or models measured is measured anew."""

import sys
from types import SimpleNamespace

import pytest
from datasets import Dataset

from spul.gates import NameGate

SIDES = {side: Dataset.from_list([{"prompt": f"{side} film"}]) for side in ("forget", "retain")}


@pytest.fixture
def trained(examples, monkeypatch, tmp_path):
    """Runs the script; returns the folders of the prompts that it trains, and how often it scores."""
    import gated

    experiment = SimpleNamespace(digest="ab12", load=lambda name: name, tokenizer=None)
    encoder = SimpleNamespace(encode=lambda row: SimpleNamespace(prompt_ids=[1]))
    experiment.collator = SimpleNamespace(encoder=encoder)
    found = []

    def prompt(*args):
        found.append(args[-1])

    def scores(model, rows, experiment):
        found.append("scored")
        return {"accuracy": [1], "generic": [0]}

    monkeypatch.setattr(gated, "experiment_of", lambda args, seed: experiment)
    monkeypatch.setattr(gated, "splits_of", lambda args, experiment: (SIDES, SIDES))
    monkeypatch.setattr(gated, "fitted_gates", lambda *args: {"text": NameGate(["jo"])})
    monkeypatch.setattr(gated, "ungated_prompt", prompt)
    monkeypatch.setattr(gated, "gated_prompt", prompt)
    monkeypatch.setattr(gated, "request_texts", lambda tokenizer, requests: ["a film"] * len(requests))
    monkeypatch.setattr(gated, "scores_of", scores)

    def run(*options, digest="ab12"):
        experiment.digest = digest
        found.clear()
        given = ["--data-dir", "d", "--model", "m", "--seeds", "1", "--attacked", "0", "--output-dir", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", ["gated.py", *given, *options])
        gated.main()
        return {one for one in found if one != "scored"}, found.count("scored")

    return run


def test_what_is_behind_a_gate_is_kept_for_its_settings_and_model_alone(trained):
    folders, scored = trained()
    assert scored == 2 * 4
    assert trained() == (folders, 0)  # which are there, in the script
    seen = set(folders)
    for option in ("--turns", "--negatives", "--recall", "--layers", "--steps"):
        folders, scored = trained(option, "1")
        assert scored == 2 * 4, option
        assert not folders & seen, option
        seen |= folders
    folders, scored = trained(digest="cd34")
    assert scored == 2 * 4
    assert not folders & seen
