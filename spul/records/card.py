"""The model card that goes with a saved prompt."""

from __future__ import annotations

import os
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from .spul_config import DataSummary, SpulConfig

THREAT_MODEL = """\
The prompt does not delete anything from the weights. Whoever runs the base model without it has the model as it was, \
knowledge included. It protects where the operator of the model controls the prompt, as behind an API: users see the \
prompted model only. It is no protection where the weights are handed out, or where users can remove, replace or \
out-train the prompt."""


LAYERS_THREAT_MODEL = """\
The layers do not delete anything from the base's weights. Whoever runs the base model without them has the model as \
it was, knowledge included. They protect where the operator of the model controls what runs, as behind an API. They \
are no protection where the weights are handed out, or where users can take the layers off or train them further."""


def model_card(config: SpulConfig, *, prompt_type: str, num_virtual_tokens: int, num_parameters: int) -> ModelCard:
    """The card of a prompt: what it forgets, how it was trained, what it scored, how to load it, what it cannot do.

    Args:
        config: the content of `spul_config.json`.
        prompt_type: PEFT's name of the prompt type.
        num_virtual_tokens: p.
        num_parameters: trained parameters.
    """
    base = config.base_model_name_or_path
    tags = ["spul", "unlearning", prompt_type.lower().replace("_", "-")]
    load_from = base or "BASE"
    if base and os.path.isdir(base):
        base = os.path.basename(os.path.abspath(base))  # where a folder lay is nobody's business
        load_from = f"PATH/TO/{base}"
    if base:
        tags.append(f"base_model:adapter:{base}")
    data = ModelCardData(library_name="peft", pipeline_tag="text-generation", base_model=base, tags=tags)
    shown_base = base or "the base model"
    sections = [
        "# Unlearning prompt",
        f"A soft prompt that makes `{shown_base}` give a generic response on a *forget* set, trained to "
        "leave it as it was on everything else. The base's weights are untouched. Made with spul (Soft "
        "Prompting for UnLearning).",
        "## What it forgets\n\n" + _data_lines(config),
        f"## How it was trained\n\n- prompt: {prompt_type}, {num_virtual_tokens} virtual tokens, {num_parameters:,} "
        "parameters\n" + _training_lines(config),
        "## Metrics\n\n" + _metrics_table(config),
        "## How to load it\n\nWith spul:\n\n```python\nfrom spul import SoftPromptUnlearner\n\n"
        f'model = SoftPromptUnlearner.from_pretrained("{load_from}", "THIS_ADAPTER")\n```\n\n'
        "With PEFT alone (pad batches on the right, or generate one row at a time):\n\n```python\n"
        "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
        f'base = AutoModelForCausalLM.from_pretrained("{load_from}")\n'
        'model = PeftModel.from_pretrained(base, "THIS_ADAPTER")\n```',
        "## What it does and does not protect against\n\n" + THREAT_MODEL,
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n")


def layers_card(config: SpulConfig, layers_config: dict[str, Any], num_parameters: int) -> ModelCard:
    """The card of unlearning layers: as `model_card`.

    Args:
        config: the content of `spul_config.json`.
        layers_config: the content of `unlearning_layers.json`.
        num_parameters: of the layers.
    """
    base = config.base_model_name_or_path
    load_from = base or "BASE"
    if base and os.path.isdir(base):
        base = os.path.basename(os.path.abspath(base))
        load_from = f"PATH/TO/{base}"
    tags = ["spul", "unlearning", "unlearning-layers", *([f"base_model:adapter:{base}"] if base else [])]
    data = ModelCardData(library_name="spul", pipeline_tag="text-generation", base_model=base, tags=tags)
    shape = f"reduction {layers_config['reduction']}, {num_parameters:,} parameters, {layers_config['activation']}"
    requests = layers_config["num_requests"]
    fused = f"\n- fused from the layers of {requests} requests" if requests > 1 else ""
    sections = [
        "# Unlearning layers",
        f"Small layers after the feed-forward blocks of `{base or 'the base model'}`, whose own weights are "
        "untouched, that make it forget a *forget* set (EUL, arXiv 2310.20150). Made with spul.",
        "## What they forget\n\n" + _data_lines(config),
        f"## How they were trained\n\n- layers: {shape}{fused}\n" + _training_lines(config),
        "## Metrics\n\n" + _metrics_table(config),
        "## How to load them\n\n```python\nfrom transformers import AutoModelForCausalLM\n\n"
        "from spul import UnlearningLayers\n\n"
        f'base = AutoModelForCausalLM.from_pretrained("{load_from}")\n'
        'model = UnlearningLayers.from_pretrained(base, "THESE_LAYERS")\n```',
        "## What they do and do not protect against\n\n" + LAYERS_THREAT_MODEL,
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n")


def _data_lines(config: SpulConfig) -> str:
    def line(name: str, summary: DataSummary | None) -> str:
        if summary is None:
            return f"- {name} set: not recorded"
        return f"- {name} set: {summary.rows:,} rows, SHA-256 `{summary.digest}`"

    lines = [line("forget", config.forget), line("retain", config.retain)]
    if config.combined_from is not None:
        lines.append(f"- made of {len(config.combined_from)} requests that were trained apart:")
        lines += [f"    {line(f'request {i}, forget', part)}" for i, part in enumerate(config.combined_from, start=1)]
    return "\n".join([*lines, "", "The rows are not part of this card."])


def _training_lines(config: SpulConfig) -> str:
    lines = []
    if config.loss is not None:
        loss = config.loss
        names = ("forget", "retain", "kl", *(("lm",) if loss.get("gamma") else ()))
        lines.append(
            f"- loss: L_f + {loss['alpha']} L_r + {loss['beta']} L_kl"
            + (f" + {loss['gamma']} L_lm, with " if loss.get("gamma") else ", with ")
            + ", ".join(f"{name} = {_term(loss[name])}" for name in names)
        )
    if config.generic_completions is not None:
        lines.append("- generic responses: " + ", ".join(f"`{text.strip()}`" for text in config.generic_completions))
    if config.base_fingerprint is not None:
        lines.append(f"- fingerprint of the base's weights: `{config.base_fingerprint}`")
    if config.versions:
        lines.append("- " + ", ".join(f"{name} {number}" for name, number in config.versions.items()))
    return "\n".join(lines)


def _term(term: dict) -> str:
    options = ", ".join(f"{key}={value!r}" for key, value in term.items() if key != "type")
    return f"{term['type']}({options})"


def _metrics_table(config: SpulConfig) -> str:
    if not config.metrics:
        return "None were recorded."
    names = list(dict.fromkeys(name for split in config.metrics.values() for name in split))
    lines = ["| split | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for split, values in config.metrics.items():
        cells = [f"{values[name]:.4f}" if name in values else "" for name in names]
        name = split.replace("|", r"\|")  # attacks are named by their users
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
