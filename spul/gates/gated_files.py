"""The folder of prompts behind gates: adapters, `gate/` in the folder of each, and `spul_gates.json`."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from ..models.compat import CHECKPOINT_PREFIX
from ..prompts.checkpoint import CONFIG_NAME, ENCODER_NAME, WEIGHTS_NAME, folder_of, read
from ..prompts.unlearner import SoftPromptUnlearner
from ..records.card import CARD_NAME, write_gate_section
from ..records.fields import check_format, read_object
from ..records.files import find_file, write_text
from ..records.ledger_events import GATE_FOLDER
from ..records.spul_config import SPUL_CONFIG_NAME
from ..records.weights import file_digest
from .any_gate import load
from .files import SETTINGS_NAME, gate_files, is_texts, remove_files
from .gate import Gate, as_gate

if TYPE_CHECKING:
    from .gated import GatedUnlearner

ROUTING_NAME, FORMAT_VERSION = "spul_gates.json", 1


def prompt_folder(name: str) -> str:
    """PEFT's folder of a prompt, within the one that gated prompts are saved to.

    Raises:
        ValueError: if its name leads out of that.
    """
    if _is_path(name):
        raise ValueError(f"name={name!r} leads out of the folder; expected the name of a prompt in it.")
    return folder_of(name)


def _is_path(name: str) -> bool:
    return name in ("", ".", "..") or "/" in name or "\\" in name


def write_gated(gated: GatedUnlearner, save_directory: str | os.PathLike, **kwargs: Any) -> None:
    """Write prompts, gates and routing; see `GatedUnlearner.save_pretrained`."""
    gated.route([])  # raises, before anything is written, if gates are not the prompts'
    if not gated.gates:
        raise ValueError("there is no prompt to save; load one, or save the base by its own save_pretrained.")
    for gate in gated.gates.values():
        gate.check_savable()
    if "selected_adapters" in kwargs:
        raise TypeError("prompts behind gates are saved together; leave out selected_adapters.")
    folders = {name: Path(save_directory, prompt_folder(name)) for name in gated.unlearner.peft_config}
    before = _saved_in(Path(save_directory)) if kwargs.get("is_main_process", True) else {}
    gated.unlearner.save_pretrained(str(save_directory), **kwargs)
    if not kwargs.get("is_main_process", True):
        return
    for name in set(before) - set(folders):
        _remove_prompt(Path(save_directory, prompt_folder(name)))
    for name in set(folders) - set(gated.gates):  # a combined prompt that had a gate of its own
        if saved_digest := before.get(name, {}).get("gate"):
            remove_files(gate_files(folders[name] / GATE_FOLDER, saved_digest))
    for name, gate in gated.gates.items():
        gate.save(folders[name] / GATE_FOLDER)
        write_gate_section(folders[name], gate.kind, gate.report)
    routing = {
        "format_version": FORMAT_VERSION,
        "prompts": list(gated.unlearner.peft_config),
        "gates": list(gated.gates),
        "precedence": gated.precedence,
        "combined": [{"flagged": sorted(names), "prompt": name} for names, name in gated.combined.items()],
        "sha256": {name: _digests(save_directory, name, name in gated.gates) for name in gated.unlearner.peft_config},
    }
    _write_routing(save_directory, routing)


def _write_routing(save_directory: str | os.PathLike, routing: dict[str, Any]) -> None:
    write_text(Path(save_directory, ROUTING_NAME), json.dumps(routing, indent=2, ensure_ascii=False) + "\n")


def attach_gate(gate: Gate, save_directory: str | os.PathLike, name: str = "default") -> None:
    """Put a gate beside a prompt that is saved already, without its base: the folder is then one of prompts and gates.

    Args:
        gate: the gate; one that is there is replaced.
        save_directory: the folder that `save_pretrained` of the prompt, or of a `GatedUnlearner`, wrote.
        name: name of the prompt; that of the one in the folder itself is `"default"`.

    Raises:
        FileNotFoundError, ValueError: as `check_takes_gate`; a ValueError also if the gate is a plain function, which
            cannot be saved.
    """
    gate = as_gate(gate)
    gate.check_savable()
    folder, routing = check_takes_gate(save_directory, name)
    gate.save(folder / GATE_FOLDER)
    if (folder / CARD_NAME).is_file():  # a prompt of plain PEFT may have none
        write_gate_section(folder, gate.kind, gate.report)
    for field in ("gates", "precedence"):
        routing[field] = list(dict.fromkeys([*routing[field], name]))
    routing["sha256"][name] = _digests(save_directory, name, True)
    _write_routing(save_directory, routing)


def check_takes_gate(save_directory: str | os.PathLike, name: str = "default") -> tuple[Path, dict[str, Any]]:
    """Folder of a saved prompt that can get a gate, and the fields of its `spul_gates.json`, or of a new one.

    Args:
        save_directory, name: as of `attach_gate`.

    Raises:
        FileNotFoundError: if there is no such prompt.
        ValueError: if the prompt is damaged, or another kind of adapter, `spul_gates.json` is damaged or knows no such
            prompt, or there is none and the folder holds other prompts.
    """
    folder = Path(save_directory, prompt_folder(name))
    if missing := [each for each in (CONFIG_NAME, WEIGHTS_NAME) if not (folder / each).is_file()]:
        raise FileNotFoundError(f"{folder} has no {' and no '.join(missing)}; expected the folder of a saved prompt.")
    try:
        read(folder, with_encoder=False)
    except OSError:
        raise
    except (TypeError, ValueError) as error:  # LoRA, say, or a damaged file
        raise ValueError(f"{folder} is no prompt that a gate can turn on: {error}") from error
    path = Path(save_directory, ROUTING_NAME)
    if not path.is_file() and (others := _other_prompts(Path(save_directory), folder)):
        raise ValueError(
            f"{str(save_directory)!r} also holds the prompts {others}, which would be left out where its gates route; "
            "save all of them by GatedUnlearner.save_pretrained, or each in a folder of its own."
        )
    empty: dict[str, Any] = {"prompts": [name], "gates": [], "precedence": [], "combined": [], "sha256": {}}
    routing = _read_routing(path) if path.is_file() else {"format_version": FORMAT_VERSION, **empty}
    if name not in routing["prompts"]:
        raise ValueError(f"{path} knows no prompt {name!r}, only {routing['prompts']}; save it with the others.")
    return folder, routing


def _other_prompts(save_directory: Path, own: Path) -> list[str]:
    """Prompts saved in a folder beside one of them; checkpoints of a training are not meant."""
    folders = [save_directory, *sorted(path for path in save_directory.iterdir() if path.is_dir())]
    found = [path for path in folders if path != own and (path / CONFIG_NAME).is_file()]
    return [
        "default" if path == save_directory else path.name
        for path in found
        if not re.fullmatch(rf"{CHECKPOINT_PREFIX}-\d+", path.name) or path == save_directory
    ]


def _digests(folder: str | os.PathLike, name: str, has_gate: bool, **hub: Any) -> dict[str, str | None]:
    """SHA-256 of a prompt's weights and of its gate's settings, which hold that of the gate's arrays."""
    own = _within(hub, prompt_folder(name))
    paths = {
        "weights": find_file(folder, WEIGHTS_NAME, **own),
        "gate": find_file(folder, SETTINGS_NAME, **_within(own, GATE_FOLDER)) if has_gate else None,
    }
    return {what: None if path is None else file_digest(path) for what, path in paths.items()}


def _saved_in(folder: Path) -> dict[str, dict[str, str | None]]:
    """The prompts that an earlier save wrote to a folder, each with its digests."""
    path = folder / ROUTING_NAME
    routing = _read_routing(path) if path.is_file() else {"prompts": [], "sha256": {}}
    return {name: routing["sha256"].get(name) or {} for name in routing["prompts"]}


def _remove_prompt(folder: Path) -> None:
    """Remove the files of a prompt that was revoked since the last save: gate and card tell what it was for."""
    for name in (CONFIG_NAME, WEIGHTS_NAME, ENCODER_NAME, SPUL_CONFIG_NAME, CARD_NAME):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / GATE_FOLDER, ignore_errors=True)
    with suppress(OSError):  # not empty: the folder of the others, or files of the user
        folder.rmdir()


def gate_of(folder: str | os.PathLike, model: Any, tokenizer: PreTrainedTokenizerBase, **hub: Any) -> Gate:
    """The gate beside a prompt, or beside a refusal, in a folder."""
    return load(folder, model, tokenizer, **_within(hub, GATE_FOLDER))


def read_routing(folder: str | os.PathLike, **hub: Any) -> tuple[Path, dict[str, Any]]:
    """`spul_gates.json` of a saved folder, and its fields, checked: `prompts`, `gates`, `precedence`, `combined`.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is of a later format, or a field is missing or of another type.
    """
    path = find_file(folder, ROUTING_NAME, **hub)
    if path is None:
        raise FileNotFoundError(
            f"{str(folder)!r} has no {ROUTING_NAME}; expected a folder that GatedUnlearner.save_pretrained wrote. A "
            "prompt without a gate is loaded by SoftPromptUnlearner.from_pretrained."
        )
    return path, _read_routing(path)


def read_gated(
    model: Any,
    folder: str | os.PathLike,
    tokenizer: PreTrainedTokenizerBase,
    adapter_name: str | None = None,
    **hub: Any,
) -> tuple[SoftPromptUnlearner, dict[str, Gate], list[str], dict[tuple[str, ...], str]]:
    """Prompts, gates, precedence and combined prompts of a saved folder; see `GatedUnlearner.from_pretrained`."""
    if not isinstance(folder, (str, os.PathLike)):
        raise TypeError(
            f"folder is a {type(folder).__name__}; expected one folder or Hub name. Of prompts in folders of their "
            "own, load the first with adapter_name=..., the others by load_adapter(folder, name)."
        )
    path, routing = read_routing(folder, **hub)
    prompts: list[str] = routing["prompts"]
    if adapter_name is not None and len(prompts) != 1:
        raise ValueError(
            f"adapter_name={adapter_name!r}, but {str(folder)!r} has the prompts {prompts}, each with its name; leave "
            "adapter_name out."
        )
    named = {name: name if adapter_name is None else adapter_name for name in prompts}
    unlearner: Any = None
    for name in prompts:
        where = _within(hub, prompt_folder(name))
        if unlearner is None:
            unlearner = SoftPromptUnlearner.from_pretrained(model, folder, adapter_name=named[name], **where)
        else:
            unlearner.load_adapter(folder, name, **where)
    for name in prompts:
        _check_together(folder, path, routing, name, **hub)
    gates = {
        named.get(name, name): gate_of(folder, unlearner, tokenizer, **_within(hub, prompt_folder(name)))
        for name in routing["gates"]
    }
    combined = {tuple(one["flagged"]): one["prompt"] for one in routing["combined"]}
    return unlearner, gates, [named.get(name, name) for name in routing["precedence"]], combined


def check_saved_together(folder: str | os.PathLike) -> None:
    """Raise if a folder's prompt and gate are not those that a `spul_gates.json` names, where it is in one.

    That is the one in the folder, or, of one prompt of several, the one in the folder above.

    Args:
        folder: a local folder.

    Raises:
        ValueError: if not, or the file is damaged.
    """
    own = Path(folder).resolve()
    for where, name in ((own, "default"), (own.parent, own.name)):
        path = where / ROUTING_NAME
        if where / folder_of(name) == own and path.is_file() and name in (routing := _read_routing(path))["prompts"]:
            _check_together(where, path, routing, name)
            return


def _check_together(folder: str | os.PathLike, path: Path, routing: dict[str, Any], name: str, **hub: Any) -> None:
    if _digests(folder, name, name in routing["gates"], **hub) != routing["sha256"].get(name):
        of_several = "" if name == "default" else f" --adapter-name {shlex.quote(name)}"
        raise ValueError(
            f"{path}: prompt and gate of {name!r} are not those that were saved together, as after an interrupted "
            "save, or one of the prompt alone. Save the GatedUnlearner again, or fit the gate to this prompt again "
            f"(spul gate fit --adapter {shlex.quote(str(folder))}{of_several})."
        )


def _within(hub: dict[str, Any], folder: str) -> dict[str, Any]:
    """Arguments of `find_file` for a folder within the one that they name."""
    return {**hub, "subfolder": "/".join(part for part in (hub.get("subfolder"), folder) if part)}


def _read_routing(path: Path) -> dict[str, Any]:
    """The fields of `spul_gates.json`, checked; see `read_routing`."""
    routing = read_object(path)
    check_format(routing.get("format_version"), FORMAT_VERSION, path)
    for name in ("prompts", "gates", "precedence"):
        if not is_texts(routing.get(name)) or any(_is_path(each) for each in routing[name]):
            raise ValueError(
                f"{path}: {name} is {routing.get(name)!r:.80}; expected a list of the prompts' names. Save again."
            )
    if not isinstance(routing.get("sha256"), dict):
        raise ValueError(f"{path}: sha256 is {routing.get('sha256')!r:.80}; expected digests by prompt. Save again.")
    combined = routing.get("combined")
    if not isinstance(combined, list) or not all(
        isinstance(one, dict) and is_texts(one.get("flagged")) and isinstance(one.get("prompt"), str)
        for one in combined
    ):
        raise ValueError(f"{path}: combined is {combined!r:.80}; expected sets of names with a prompt. Save again.")
    return routing
