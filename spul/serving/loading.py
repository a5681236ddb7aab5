"""Prompts and refusals loaded behind their gates; checks of names, gates and bases refuse what is unclear."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft import PromptTuningConfig
from transformers import PreTrainedTokenizerBase

from ..gates.files import SETTINGS_NAME
from ..gates.gate import Gate, as_gate
from ..gates.gated import GatedUnlearner
from ..gates.gated_files import GATE_FOLDER, ROUTING_NAME, check_saved_together, gate_of
from ..prompts.checkpoint import CONFIG_NAME
from ..prompts.unlearner import SoftPromptUnlearner
from ..records.digests import fingerprint
from ..records.ledger_events import name_fault
from ..records.spul_config import SpulConfig, read_spul_config, without_local_path
from ..rivals.files import RIVAL_NAME, SavedRival, read_rival
from ..rivals.refusal import FixedRefusal

ALWAYS = "always"  # the kind of the gate that flags every request


def always(texts: list[str]) -> list[bool]:
    """The gate that flags every request: its prompt is always on."""
    return [True] * len(texts)


def load_prompts(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    folders: Mapping[str, str | os.PathLike],
    always_on: Sequence[str] = (),
    allow_other_base: bool = False,
) -> GatedUnlearner:
    """Prompts of one base, each behind the gate in its folder; all of them, or an error.

    Args:
        model: the base.
        tokenizer: its tokenizer.
        folders: of each prompt, by its name; the first is first where several gates flag a request.
        always_on: names of prompts that every request gets, whatever gate is in their folders.
        allow_other_base: whether prompts whose record does not name this base's weights are served all the same.

    Raises:
        FileNotFoundError: if a folder or a gate is missing.
        ValueError: if there is no prompt, or one does not fit the base.
    """
    check_folders(folders, always_on)
    if refusing := [name for name, folder in folders.items() if is_rival(folder)]:
        raise ValueError(
            f"{refusing} are fixed refusals; expected prompts. ServedPrompts.from_folders takes both, in any order."
        )
    base = fingerprint(model)
    for folder in folders.values():
        check_fits(read_spul_config(folder), base, allow_other_base, str(folder))
    unlearner: Any = None
    for name, folder in folders.items():
        if unlearner is None:
            unlearner = SoftPromptUnlearner.from_pretrained(model, folder, adapter_name=name)
        else:
            unlearner.load_adapter(folder, name)
    gates = {name: _gate(folder, name in always_on, unlearner, tokenizer) for name, folder in folders.items()}
    return GatedUnlearner(unlearner, tokenizer, gates).eval()


def load_gated(
    model: Any, tokenizer: PreTrainedTokenizerBase, folder: str | os.PathLike, allow_other_base: bool = False
) -> GatedUnlearner:
    """Prompts and gates of a folder that `GatedUnlearner.save_pretrained` wrote; arguments as in `load_prompts`.

    Raises:
        FileNotFoundError: if the folder has no gates.
        ValueError: if there is no prompt, or one does not fit the base.
    """
    gated, base = GatedUnlearner.from_pretrained(model, folder, tokenizer), fingerprint(model)
    for name, record in gated.unlearner.spul_configs.items():
        check_fits(record, base, allow_other_base, f"{folder} ({name})")
    return gated


def without_prompts(model: Any, tokenizer: PreTrainedTokenizerBase) -> GatedUnlearner:
    """A base without a prompt, onto which prompts can be loaded; arguments as in `load_prompts`."""
    unlearner = SoftPromptUnlearner(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=1))
    unlearner.delete_adapter(unlearner.active_adapter)
    return GatedUnlearner(unlearner, tokenizer, {}).eval()


def is_rival(folder: str | os.PathLike) -> bool:
    """Whether a folder holds a method that trains nothing, such as a fixed refusal, in place of a prompt."""
    return Path(folder, RIVAL_NAME).is_file()


def read_refusal(folder: str | os.PathLike) -> SavedRival:
    """The file of a saved fixed refusal, checked.

    Args:
        folder: a local folder that `FixedRefusal.save_pretrained` wrote.

    Raises:
        ValueError: if it is of another method, or damaged, or the folder also holds a prompt.
    """
    saved = read_rival(folder)
    if found := [name for name in (CONFIG_NAME, ROUTING_NAME) if Path(folder, name).is_file()]:
        raise ValueError(
            f"{str(folder)!r} holds a prompt ({found[0]}) and the method {saved.kind!r} ({RIVAL_NAME}); expected one "
            "of them. Save each to a folder of its own."
        )
    if saved.kind != FixedRefusal.kind:
        raise ValueError(
            f"{str(folder)!r} holds the method {saved.kind!r}, which is not served; expected a prompt or a "
            f"{FixedRefusal.kind}. Run this one in a program of your own, by spul.rivals."
        )
    saved.check(FixedRefusal.fields_saved)
    return saved


def load_refusal(
    model: Any, tokenizer: PreTrainedTokenizerBase, folder: str | os.PathLike, is_always: bool = False
) -> FixedRefusal:
    """A saved fixed refusal behind its gate.

    Args:
        model: the base.
        tokenizer: its tokenizer.
        folder: a local folder that `FixedRefusal.save_pretrained` wrote.
        is_always: whether every request is refused, whatever gate is in the folder.

    Raises:
        FileNotFoundError: if its gate is missing.
        ValueError: as `read_refusal`; also if the gate is damaged, another one, or does not fit the base.
    """
    saved = read_refusal(folder)
    if not is_always:
        return FixedRefusal.from_pretrained(model, folder, tokenizer)
    found = FixedRefusal.restored(model, tokenizer, saved.fields, always)
    found.name = without_local_path(os.fspath(folder))
    return found


def check_folders(folders: Mapping[str, str | os.PathLike], always_on: Sequence[str] = ()) -> None:
    """Raise unless each prompt or refusal has name and gate, as far as is seen without the base; as `load_prompts`."""
    if not folders:
        raise ValueError("there is no prompt to serve, and the base alone is not served; name a prompt's folder.")
    if unknown := sorted(set(always_on) - set(folders)):
        raise ValueError(f"{unknown} are to be always on and are no prompts; the prompts are {list(folders)}.")
    for name, folder in folders.items():
        check_name(name)
        saved = read_refusal(folder) if is_rival(folder) else None
        if name not in always_on:
            check_gate(folder) if saved is None else saved.check_gate()
    names = list(folders)
    first = next((i for i, name in enumerate(names) if name in always_on), len(names))
    if behind := names[first + 1 :]:
        raise ValueError(
            f"{names[first]!r} is always on, so that {behind}, which stand behind it, would never be; name it last."
        )


def check_name(name: Any) -> None:
    """Raise unless a prompt may be called so.

    Raises:
        ValueError: if not.
    """
    if (fault := name_fault(name)) is not None:
        raise ValueError(f"no prompt can be served by this name: {fault}.")


def check_gate(folder: str | os.PathLike) -> None:
    """Raise unless a prompt's folder has a gate, the one that was saved with the prompt as far as is noted there.

    Raises:
        FileNotFoundError: if it has none.
        ValueError: if prompt and gate are not those that were saved together.
    """
    if not Path(folder, GATE_FOLDER, SETTINGS_NAME).is_file():
        is_gated = Path(folder, ROUTING_NAME).is_file()
        raise FileNotFoundError(
            f"{str(folder)!r} has no {GATE_FOLDER}/{SETTINGS_NAME}, so nothing would turn its prompt on"
            + ("; it holds several prompts: pass it alone, without a name." if is_gated else ".")
            + f" Fit a gate (spul gate fit --adapter FOLDER, or gate.save({GATE_FOLDER!r}) within the folder), or "
            "have the prompt always on (--always NAME)."
        )
    check_saved_together(folder)


def check_fits(record: SpulConfig, base: str | None, allow_other_base: bool, where: str) -> None:
    """Raise unless a prompt was trained on the weights that are served.

    Args:
        record: the prompt's.
        base: the fingerprint of the base.
        allow_other_base: whether to take it all the same.
        where: the prompt, in messages.

    Raises:
        ValueError: if not, also where the record does not say.
    """
    if allow_other_base or (base is not None and record.base_fingerprint == base):
        return
    trained = "does not say" if record.base_fingerprint is None else f"is {record.base_fingerprint[:12]}"
    raise ValueError(
        f"the prompt in {where} may neither forget nor retain on this base: the fingerprint that it was trained on "
        f"{trained}, and this base's is {str(base)[:12]}. Take the base that it was trained on; if it is the same "
        "checkpoint in another precision, evaluate it there, and then allow another base: --allow-other-base."
    )


def _gate(folder: str | os.PathLike, is_always: bool, model: Any, tokenizer: Any) -> Gate:
    return as_gate(always) if is_always else gate_of(folder, model, tokenizer)
