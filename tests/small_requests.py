"""Unlearning requests on a tiny model, three steps each, for tests of the examples."""

from __future__ import annotations

from pathlib import Path

from helpers import GENERIC, build, make_tokenizer, rows

from spul.layers import UnlearningLayersConfig
from spul.training.methods import unlearning_method


def small_requests(folder: Path, names: tuple[str, ...] = ("jane", "doe")):
    """One request a name. `retrained_on` lists the prompts of each retraining."""
    from sequence import Requests

    retrained_on = []

    def retrain(kept):
        retrained_on.append(kept["prompt"])
        return build("llama")

    requests = Requests(
        base=lambda: build("llama"),
        tokenizer=make_tokenizer(),
        generic=GENERIC,
        train=[rows(name, 4) for name in names],
        test=[rows(f"{name} film", 3) for name in names],
        retain=rows("film", 6),
        test_retain=rows("plot", 4),
        retrain=retrain,
        folder=folder,
        settings="tiny",
        seed=0,
        steps={"prompt": 3, "layers": 3, "wide": 3, "distill": 2},
        rates=dict.fromkeys(("prompt", "layers", "wide", "distill"), 1e-2),
        layers=unlearning_method("EUL"),
        generic_layers=unlearning_method("SPUL", trainable="layers"),
        prompt=unlearning_method("SPUL"),
        num_virtual_tokens=3,
        layers_config=UnlearningLayersConfig(reduction=4),
        batch_size=4,
        max_length=32,
    )
    requests.retrained_on = retrained_on
    return requests
