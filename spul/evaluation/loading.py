"""An unlearned model of any kind from its folder: prompts, gates, rivals, layers, LoRA, weights."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from peft import PeftModel

from ..gates.files import SETTINGS_NAME
from ..gates.gated import GatedUnlearner
from ..gates.gated_files import GATE_FOLDER, ROUTING_NAME
from ..layers.checkpoint import CONFIG_NAME as LAYERS_NAME
from ..layers.unlearning_layers import UnlearningLayers
from ..models.loading import load_causal_lm, load_tokenizer
from ..prompts.checkpoint import CONFIG_NAME as ADAPTER_NAME
from ..prompts.unlearner import SoftPromptUnlearner
from ..records.fields import read_object
from ..records.files import find_file
from ..records.messages import warn
from ..records.spul_config import SPUL_CONFIG_NAME, read_spul_config
from ..rivals.corruption import EmbeddingCorruption
from ..rivals.examples import InContextUnlearning
from ..rivals.files import RIVAL_NAME, read_rival
from ..rivals.guardrail import GuardrailPrompt
from ..rivals.refusal import FixedRefusal
from ..rivals.rival import Rival

# Of each kind of saved model the file by which it is told, and its name in words.
KINDS = {
    "gated": (ROUTING_NAME, "prompts behind gates"),
    "rival": (RIVAL_NAME, "a method without training, such as a fixed refusal behind a gate"),
    "layers": (LAYERS_NAME, "unlearning layers"),
    "adapter": (ADAPTER_NAME, "a prompt or another adapter of PEFT"),
    "model": ("config.json", "a whole model"),
}
RIVALS: dict[str, type[Rival]] = {
    one.kind: one for one in (FixedRefusal, GuardrailPrompt, InContextUnlearning, EmbeddingCorruption)
}


class Loaded(NamedTuple):
    """A model, its tokenizer, and its kind: one of `KINDS`."""

    model: Any
    tokenizer: Any
    kind: str


def kind_of(folder: str | os.PathLike[str]) -> str:
    """The kind of a saved model, one of `KINDS`, by the files in its folder.

    Args:
        folder: local folder or Hub name.

    Raises:
        FileNotFoundError: if it has none of the files of `KINDS`.
        ValueError: if it has those of a rival and of another model.
    """
    found = {kind: name for kind, (name, _) in KINDS.items() if find_file(folder, name) is not None}
    if "rival" in found and len(found) > 1:
        raise ValueError(
            f"{str(folder)!r} holds {' and '.join(found.values())}, of different models; save each into a folder of "
            "its own."
        )
    if not found:
        expected = "; ".join(f"{words} ({name})" for name, words in KINDS.values())
        raise FileNotFoundError(f"{str(folder)!r} holds no model; expected one of: {expected}.")
    return next(iter(found))


def no_base_error(folder: str | os.PathLike[str]) -> ValueError:
    """The error where an adapter's base is not given: nothing is loaded by the name in an adapter's record."""
    path = find_file(folder, ADAPTER_NAME)
    name = read_object(path).get("base_model_name_or_path") if path is not None else None
    if not name and find_file(folder, SPUL_CONFIG_NAME) is not None:  # a rival has no record
        name = read_spul_config(folder).base_model_name_or_path
    recorded = f"its record says {name!r}, which nothing is loaded by" if isinstance(name, str) and name else ""
    return ValueError(
        f"{str(folder)!r} holds no base, and none is given; expected the base, by name or folder"
        + (f" ({recorded})." if recorded else ".")
    )


def load_unlearned(
    folder: str | os.PathLike[str],
    base: str | os.PathLike[str] | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    load: Callable[[str | os.PathLike[str]], Any] = load_causal_lm,
    trust_remote_code: bool = False,
) -> Loaded:
    """Load an unlearned model of any kind, in evaluation mode.

    Args:
        folder: folder or Hub name: prompts, behind gates or not, a rival, unlearning layers, LoRA, or whole
            weights.
        base: folder or Hub name of the base, which an adapter needs: no base is loaded by the name in an adapter's
            record. Of whole weights it is not read here.
        tokenizer: folder or Hub name of the tokenizer; the base's, or the whole model's, unless given.
        load: from a name to a causal LM.
        trust_remote_code: whether code beside the tokenizer may run; of the model's code `load` decides.

    Raises:
        FileNotFoundError: if the folder holds no model.
        OSError: if the base cannot be found.
        ValueError: if the base of an adapter is not given, files are damaged, or adapter and base do not fit.
    """
    kind = kind_of(folder)
    name = folder if kind == "model" else base
    if name is None:
        raise no_base_error(folder)
    rival = _rival_class(folder) if kind == "rival" else None
    words = load_tokenizer(tokenizer or name, trust_remote_code)
    model = load(name)
    if kind == "gated":
        model = GatedUnlearner.from_pretrained(model, folder, words)
    elif rival is not None:
        model = rival.from_pretrained(model, folder, words)
    elif kind == "layers":
        model = UnlearningLayers.from_pretrained(model, folder)
    elif kind == "adapter":
        model = _with_adapter(model, folder)
        if Path(folder, GATE_FOLDER, SETTINGS_NAME).is_file():
            warn(
                f"{str(folder)!r} has a gate in {GATE_FOLDER}/, and no {ROUTING_NAME} that puts it in front of the "
                "prompt, which is evaluated always on: spul serve asks the gate. To evaluate both, attach the gate "
                "(spul gate fit, or attach_gate in Python).",
            )
    return Loaded(model.eval(), words, kind)


def _rival_class(folder: str | os.PathLike[str]) -> type[Rival]:
    """The class of a saved rival."""
    saved = read_rival(folder)
    if saved.kind not in RIVALS:
        raise ValueError(
            f"{saved.path}: kind is {saved.kind!r}; expected one of {', '.join(RIVALS)}. Load one of your own by its "
            "from_pretrained, and pass it to spul.evaluate."
        )
    return RIVALS[saved.kind]


def _with_adapter(base: Any, folder: str | os.PathLike[str]) -> Any:
    path = find_file(folder, ADAPTER_NAME)
    assert path is not None
    config = read_object(path)
    # A prompt's config says how long it is; the type on disk may be spul's own, see prompts/position.py.
    if "num_virtual_tokens" in config:
        return SoftPromptUnlearner.from_pretrained(base, folder)
    return PeftModel.from_pretrained(base, os.fspath(folder))
