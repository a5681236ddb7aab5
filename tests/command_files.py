"""A tiny base and files of rows in a folder, as a user of the command line has them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from helpers import CHAT_TEMPLATE, GENERIC, build, layers_on, lora, make_tokenizer, prompted, rows
from small_rivals import KINDS as RIVALS
from small_rivals import rival

from spul.commands import train
from spul.commands.main import commands_of
from spul.commands.options import parse
from spul.gates import GatedUnlearner, NameGate

SETS = {"forget": ("jane", 6), "retain": ("film", 8), "test_forget": ("doe", 3), "test_retain": ("good", 4)}
SHORT = {"max_steps": 3, "num_virtual_tokens": 4, "use_cpu": "true", "disable_tqdm": "true", "save_strategy": "no"}


def write_rows(path: Path, some: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in some))
    return str(path)


def write_base(folder: Path, chat: bool = False) -> str:
    tokenizer = make_tokenizer()
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    build("llama").save_pretrained(folder)
    return str(folder)


def write_prompt(folder: Path) -> str:
    """An untrained prompt of four virtual tokens on that base."""
    prompted(dtype=torch.float32).save_pretrained(str(folder))
    return str(folder)


def write_files(folder: Path) -> dict[str, str]:
    """The base and a file of each of the four sets, by the names of the options."""
    files = {name: write_rows(folder / f"{name}.jsonl", rows(*which)) for name, which in SETS.items()}
    return {"model": write_base(folder / "base"), **files}


def flags(values: dict[str, Any]) -> list[str]:
    """Options by name as flags."""
    found = []
    for name, value in values.items():
        found += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value])]
    return found


def parsed(name: str, values: dict[str, Any], sub: str = "") -> Any:
    """A command's options of flags."""
    return parse(commands_of(name)[sub], ["spul", name], flags(values))


def write_models(folder):
    """The files, and folders of an unlearned model of every kind, by name."""
    found = write_files(folder)
    write_prompt(folder / "adapter")
    GatedUnlearner(prompted(dtype=torch.float32), make_tokenizer(), {"default": NameGate(["jane"])}).save_pretrained(
        folder / "gated"
    )
    for kind in RIVALS:
        rival(kind, build("llama")).save_pretrained(folder / kind)
    layers_on(build("llama")).save_pretrained(folder / "layers")
    lora(build("llama")).save_pretrained(folder / "lora")
    return {**found, **{kind: str(folder / kind) for kind in ("adapter", "gated", *RIVALS, "layers", "lora")}}


def options_for(files, model, folder, **more):
    """Options of a quick `spul evaluate`."""
    sets = {name: files[name] for name in ("forget", "retain", "test_forget", "test_retain")}
    quick = {"measures": ["utility"], "generic": GENERIC, "max_length": 64, **more}
    return {"model": model, **sets, "output_dir": folder, **quick}


def trained(values, folder, **more):
    """Options of a short `spul train`, after it ran."""
    options = parsed("train", {**values, "generic": GENERIC, "output_dir": folder, **SHORT, **more})
    assert train.run(options) is None
    return options
