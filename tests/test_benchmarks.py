"""The benchmarks compare like with like, and run."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from helpers import build

from spul.models.causal_lm import zero_dropout

FOLDER = Path(__file__).parents[1] / "examples" / "benchmarks"


@pytest.fixture(autouse=True)
def on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("prompt", ["prompt-tuning", "p-tuning"])
def test_spul_and_the_plain_algorithm_take_the_same_steps(family, prompt):
    import common
    import steps

    shape = common.Shape(batch_size=6, max_tokens=20, response_tokens=3, forget_rows=2)
    losses = {}
    for name in ("spul", "plain", "spul, live reference"):
        base = build(family)
        zero_dropout(base)
        torch.manual_seed(1)
        step = steps.STEPS[name](base, common.prompt_config(prompt, 4), shape)
        losses[name] = [step() for _ in range(3)]
    assert losses["spul"] == pytest.approx(losses["plain"], rel=1e-4)
    assert losses["spul"] == pytest.approx(losses["spul, live reference"], rel=1e-5)
    assert losses["spul"][0] != losses["spul"][2]


def test_the_floor_sends_a_gradient_to_the_embeddings():
    import common
    import steps

    base = build("llama")
    step = steps.floor_step(base, None, common.Shape(4, 20, 1, 1))
    assert (step().abs().sum(dim=-1) > 0).sum() > 20  # of the 4 rows' tokens
    assert all(parameter.grad is None for parameter in base.parameters())


@pytest.mark.parametrize(
    ("script", "options", "expected"),
    [
        ("step_time.py", ["--shapes", "sst2", "--steps", "spul", "plain", "floor"], {"spul", "plain", "floor"}),
        ("prompt_length.py", ["--lengths", "5", "10", "--steps", "spul"], {5, 10}),
        ("inference.py", ["--new-tokens", "2"], {"base", "PEFT", "PEFT, last logits", "spul"}),
        ("reference.py", ["--rows", "40"], {"hidden states (spul)", "logits"}),
    ],
)
def test_the_scripts_run_and_write_what_they_measured(script, options, expected, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out.json"
    argv = [script, "--model", "tiny", "--device", "cpu", "--rounds", "1", "--json", str(out), *options]
    monkeypatch.setattr(sys, "argv", argv)
    runpy.run_path(str(FOLDER / script), run_name="__main__")
    written = json.loads(out.read_text())
    found = {record.get("step", record.get("model", record.get("reference"))) for record in written["records"]}
    found |= {record["p"] for record in written["records"] if "p" in record}
    assert expected <= found
    assert written["where"]["model"] == "tiny"
    assert "| " in capsys.readouterr().out


def test_a_4_bit_base_of_random_weights_trains():
    pytest.importorskip("bitsandbytes")
    import common
    import steps

    config = common._llama(64, 2, 2, 128, vocab=200)
    base = common.build_nf4(config, "cpu")
    assert {type(base.model.layers[0].mlp.up_proj).__name__, type(base.lm_head).__name__} == {"Linear4bit", "Linear"}
    step = steps.spul_step(base, common.prompt_config("p-tuning", 4), common.Shape(4, 20, 1, 1))
    losses = [step() for _ in range(2)]
    assert losses[0] != losses[1]
    assert all(torch.isfinite(torch.tensor(losses)))
