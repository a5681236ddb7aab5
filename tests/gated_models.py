"""Prompts behind gates on the small evaluations' base, alone and saved."""

from __future__ import annotations

import torch
from helpers import CONFIGS, make_tokenizer
from small_evaluations import make_model

from spul.gates import AnyGate, GatedUnlearner, NameGate, TextGate

GREEDY = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "eos_token_id": 2, "pad_token_id": 0}


def prompts(*names):
    """The small evaluations' prompt, and further ones of other lengths."""
    model = make_model("prompt_tuning")
    for i, name in enumerate(names):
        torch.manual_seed(i)
        model.add_adapter(name, CONFIGS["prompt_tuning"](6 + i))
        with torch.no_grad():
            model.prompt_encoder[name].embedding.weight.normal_(0, 0.5)
    return model.eval()


def gated(*names, **options):
    words = {"default": "jane", "other": "doe", "both": "jane doe"}
    gates = {name: NameGate([words[name]]) for name in ("default", *names)}
    return GatedUnlearner(prompts(*names, *options.pop("more", ())), make_tokenizer(), gates, **options).eval()


def tokens(tokenizer, texts, side="left"):
    tokenizer.padding_side, tokenizer.pad_token = side, "<pad>"
    return tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False)


TEXTS = ["about jane is the film good", "the film is good", "text about doe", "jane is neutral"]
NAMES = ["default", "__base__", "other", "default"]


def text_gate():
    forget = [f"text about jane {word}" for word in ("film", "plot", "good", "bad", "doe", "is", "of", "the")]
    retain = [f"review of the {word}" for word in ("film", "plot", "good", "bad", "text", "is", "of", "negative")]
    return TextGate.fit(forget, retain, recall=0.75)


def saved(tmp_path):
    model = gated("other", more=["joint"], combined={("default", "other"): "joint"}, precedence=["other", "default"])
    model.gates["other"] = AnyGate([NameGate(["doe"]), text_gate()])
    model.save_pretrained(tmp_path)
    return model
