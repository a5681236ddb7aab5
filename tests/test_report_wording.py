"""Wording of the report: it speaks of what was evaluated, a prompt, a gate and its refusal, LoRA, and so on."""

from __future__ import annotations

import re

import pytest
from evaluations import utility, whole
from helpers import make_tokenizer
from small_evaluations import learned, make_model, measured
from small_rivals import KINDS, rival

from spul.evaluation.attack_settings import AttackSettings
from spul.evaluation.report import evaluation_markdown
from spul.evaluation.results import Evaluation, join
from spul.gates import GatedUnlearner, NameGate

pytestmark = pytest.mark.usefixtures("few_resamples")

SYSTEMS = {
    "prompted": "the prompt",
    "gated": "the prompt behind its gate",
    "refusal": "the gate and its refusal",
    "guardrail": "the guardrail's instruction",
    "examples": "the examples in context",
    "corruption": "the gate and its corruption",
    "layers": "the unlearning layers",
    "lora": "LoRA",
    "full": "the trained weights",
}


def system(kind):
    if kind == "gated":
        return GatedUnlearner(make_model("prompt_tuning"), make_tokenizer(), {"default": NameGate(["jane"])})
    return rival(kind) if kind in KINDS else make_model("prompt_tuning" if kind == "prompted" else kind)


@pytest.mark.parametrize("kind", SYSTEMS)
def test_a_report_speaks_of_what_was_evaluated_and_of_a_prompt_only_where_there_is_one(kind):
    options = {"attacks": AttackSettings(only=("capitals",))}
    if kind == "full":
        options["base"] = learned()
    found = measured(system(kind), "utility", "input attack", **options)
    text = evaluation_markdown(found)
    assert f"unlearned: the model with {SYSTEMS[kind]}; detached: without {SYSTEMS[kind]}" in text
    assert f"| Without {SYSTEMS[kind]} |" in text
    lines = [line for line in text.split("\n") if "text_field" not in line]  # of a row's prompt
    own = [line for line in lines if re.search("the (trained )?prompt", line)]
    assert bool(own) is (kind in ("prompted", "gated"))
    gated = kind in ("gated", "refusal", "corruption")
    assert ("A request that no gate flags gets the base's own answer" in text) is gated
    assert ("right, though flagged" in text) is gated
    trained = kind in ("prompted", "gated", "layers", "lora", "full")
    assert ("SHA-256 of the adapter's weights" in text) is trained


def test_seeds_of_several_methods_and_earlier_evaluations_speak_of_the_method():
    of = [Evaluation({}, utility(), {}, facts={"method": name}) for name in ("LoRA", "the prompt", "LoRA")]
    assert "the model with LoRA;" in evaluation_markdown(join([of[0], of[2]]))
    assert "the model with the method;" in evaluation_markdown(join(of[:2]))
    assert "the model is the base with the method." in evaluation_markdown(whole())
