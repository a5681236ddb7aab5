"""Model cards of saved prompts and unlearning layers."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .fields import check_fields, plain_metrics, read_object
from .files import write_text
from .spul_config import SPUL_CONFIG_NAME, SpulConfig, without_local_path
from .templates import render

CARD_NAME = "README.md"
TEMPLATE = "records/card.md.jinja"
METRICS_SECTION = re.compile(r"^## Metrics *\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
GATE_SECTION = re.compile(r"^## Gate *\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)

THREAT_MODEL = """\
The prompt does not delete anything from the weights. Whoever runs the base model without it has the model as it was, \
knowledge included. It protects where the operator of the model controls the prompt, as behind an API: users see the \
prompted model only. It is no protection where the weights are handed out, or where users can remove, replace or \
out-train the prompt."""

LAYERS_THREAT_MODEL = """\
The layers do not delete anything from the base's weights. Whoever runs the base model without them has the model as \
it was, knowledge included. They protect where the operator of the model controls what runs, as behind an API. They \
are no protection where the weights are handed out, or where users can remove the layers or train them further."""


def model_card(config: SpulConfig, *, prompt_type: str, num_virtual_tokens: int, num_parameters: int) -> ModelCard:
    """Model card of a prompt: what it forgets, training, metrics, how to load it, threat model.

    Args:
        config: the record that is saved with the prompt.
        prompt_type: PEFT's name of the prompt type, such as `"P_TUNING"`.
        num_virtual_tokens: p.
        num_parameters: number of trained parameters.
    """
    return _card(
        config,
        library="peft",
        tag=prompt_type.lower().replace("_", "-"),
        layers=None,
        prompt_type=prompt_type,
        num_virtual_tokens=num_virtual_tokens,
        num_parameters=num_parameters,
        threat_model=THREAT_MODEL,
    )


def layers_card(config: SpulConfig, layers_config: Mapping[str, Any], num_parameters: int) -> ModelCard:
    """Model card of unlearning layers, with the sections of `model_card`.

    Args:
        config: the record that is saved with the layers.
        layers_config: the content of `unlearning_layers.json`.
        num_parameters: number of the layers' parameters.
    """
    return _card(
        config,
        library="spul",
        tag="unlearning-layers",
        layers=layers_config,
        num_parameters=num_parameters,
        threat_model=LAYERS_THREAT_MODEL,
    )


def write_metrics(
    folder: str | os.PathLike,
    metrics: Mapping[str, Mapping[str, float]],
    lines: Sequence[str] = (),
    results: Sequence[EvalResult] = (),
) -> None:
    """Replace the metrics of a saved adapter, in `spul_config.json` and in its card's section "Metrics".

    All other content stays as it is, fields of later versions and hand-written sections included.

    Args:
        folder: a folder that `save_pretrained` of a prompt or of unlearning layers wrote.
        metrics: split to name to value, as `SpulConfig.metrics`; NumPy's numbers, too.
        lines: what they say in words, above the card's table.
        results: the same in the Hub's form, for the card's `model-index`, whose earlier results they replace; with
            none it stays as it is.

    Raises:
        FileNotFoundError: if the folder has no `spul_config.json` or no model card.
        ValueError: if the card has no section "Metrics", or `metrics` are not numbers by split and name.
    """
    folder = Path(folder)
    check_fields({"metrics": metrics}, "write_metrics")
    metrics = plain_metrics(metrics)
    for name in (SPUL_CONFIG_NAME, CARD_NAME):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{str(folder)!r} has no {name}; pass a folder that save_pretrained of a prompt or of unlearning "
                "layers wrote."
            )
    section = render(TEMPLATE, block="metrics", lines=lines, **_metrics_table(metrics))
    card, count = METRICS_SECTION.subn(lambda _: section, (folder / CARD_NAME).read_text(encoding="utf-8"), count=1)
    if count == 0:
        raise ValueError(
            f"{CARD_NAME} of {str(folder)!r} has no section '## Metrics' to write to; add that line, or save the "
            "adapter again."
        )
    if results:
        parsed = ModelCard(card)
        assert isinstance(parsed.data, ModelCardData)
        parsed.data.model_name, parsed.data.eval_results = folder.resolve().name, list(results)
        card = str(parsed)
    record = read_object(folder / SPUL_CONFIG_NAME) | {"metrics": metrics}
    write_text(folder / SPUL_CONFIG_NAME, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    write_text(folder / CARD_NAME, card.rstrip("\n") + "\n")


def write_gate_section(folder: str | os.PathLike, kind: str, report: Any) -> None:
    """Write the section "Gate" of a saved prompt's card, in place of an earlier one.

    Args:
        folder: a folder that `save_pretrained` of a prompt wrote.
        kind: kind of the gate.
        report: its report, whose text stands in the section; None where nothing was measured.
    """
    path = Path(folder, CARD_NAME)
    lines = None if report is None else str(report).split("\n")
    section = render(TEMPLATE, block="gate", gate=kind, report=lines)
    card = GATE_SECTION.sub("", path.read_text(encoding="utf-8"))
    before, heading, after = card.partition("## How to load it")
    write_text(path, (before + section + heading + after).rstrip("\n") + "\n")


def _card(config: SpulConfig, library: str, tag: str, **values: Any) -> ModelCard:
    base = config.base_model_name_or_path
    load_from = base or "BASE"
    if base and (os.path.isdir(base) or without_local_path(base) != base):
        base = without_local_path(base)
        load_from = f"PATH/TO/{base}"
    tags = ["spul", "unlearning", tag, *([f"base_model:adapter:{base}"] if base else [])]
    data = ModelCardData(library_name=library, pipeline_tag="text-generation", base_model=base, tags=tags)
    loss = config.loss or {}
    names = ("forget", "retain", "kl", *(("lm",) if loss.get("gamma") else ())) if loss else ()
    text = render(
        TEMPLATE,
        config=config,
        base=base,
        gate=None,
        lines=(),
        load_from=load_from,
        terms={name: _term(loss[name]) for name in names},
        **_metrics_table(config.metrics),
        **values,
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")


def _term(term: Mapping[str, Any]) -> str:
    options = ", ".join(f"{key}={value!r}" for key, value in term.items() if key != "type")
    return f"{term['type']}({options})"


def _metrics_table(metrics: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """The variables of the template's block "metrics": a column for every name that some split has."""
    columns = list(dict.fromkeys(name for values in metrics.values() for name in values))
    return {"metrics": metrics, "columns": columns}
