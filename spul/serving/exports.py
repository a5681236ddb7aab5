"""Parts of every export: the prompt as input embeddings, and facts about it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from ..prompts.configs import holds_states
from ..prompts.unlearner import SoftPromptUnlearner
from ..records.digests import fingerprint
from ..records.spul_config import library_versions, without_local_path


def prompt_embeddings(unlearner: SoftPromptUnlearner) -> Tensor:
    """The active prompt as input embeddings (p, d), on the CPU, in the type in which the base reads them.

    Args:
        unlearner: the base and its prompt.

    Raises:
        TypeError: if it is no `SoftPromptUnlearner`.
        ValueError: for prefix tuning and cartridges, which have no input embeddings.
    """
    if not isinstance(unlearner, SoftPromptUnlearner):
        raise TypeError(
            f"unlearner is a {type(unlearner).__name__}; expected a SoftPromptUnlearner, as "
            "SoftPromptUnlearner.from_pretrained(model, adapter) gives it."
        )
    name, config = unlearner.active_adapter, unlearner.active_peft_config
    if holds_states(config):
        raise ValueError(
            f"the prompt {name!r} is a {type(config).__name__}: keys and values for every layer, which an engine "
            "takes from nobody. Train one that is input embeddings, PromptTuningConfig or PromptEncoderConfig "
            "(`spul train --prompt-type prompt_tuning` or `p_tuning`), which forgets less without a gate, or serve "
            "this one by `spul serve` with the engine `transformers`."
        )
    own = unlearner.get_prompt_embedding_to_save(name).detach().cpu()
    return own.to(unlearner.get_base_model().get_input_embeddings().weight.dtype)


def facts_of(unlearner: SoftPromptUnlearner, kind: str) -> dict[str, Any]:
    """The facts that an exported folder states: prompt and base, by digest, where the prompt stands, and versions."""
    record, base, config = unlearner.spul_config, unlearner.get_base_model(), unlearner.active_peft_config
    name = getattr(base, "name_or_path", None)
    is_saved = config.inference_mode  # a prompt that trains may not be the one that was saved last
    return {
        "format_version": 1,
        "kind": kind,
        "base_model_name_or_path": without_local_path(name) if name else None,
        "base_fingerprint": fingerprint(base),
        "adapter": record.name if is_saved else None,
        "adapter_sha256": record.weights_sha256 if is_saved else None,
        "num_virtual_tokens": config.num_virtual_tokens,
        "prompt_position": record.prompt_position,
        "versions": library_versions(),
    }


def write_facts(path: Path, facts: dict[str, Any]) -> None:
    """Write facts as JSON."""
    path.write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
