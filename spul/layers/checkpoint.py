"""Saving and loading of unlearning layers: the files of their folder."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from ..records.card import CARD_NAME, layers_card
from ..records.files import HUB_ARGUMENTS, atomic_folder, find_file
from ..records.spul_config import SpulConfig, read_spul_config

if TYPE_CHECKING:
    from .unlearning_layers import UnlearningLayers


CONFIG_NAME = "unlearning_layers.json"
WEIGHTS_NAME = "unlearning_layers.safetensors"
GRAM_MATRICES_NAME = "gram_matrices.safetensors"
CONFIG_FIELDS = ("reduction", "activation", "target_modules", "init_seed", "train_down")


@dataclass
class SavedLayers:
    """The content of a folder of unlearning layers; `state` and `gram_matrices` by the projections' names."""

    config: dict[str, Any]
    state: dict[str, Tensor]
    gram_matrices: dict[str, Tensor]
    num_requests: int
    spul_config: SpulConfig


def save(layers: UnlearningLayers, save_directory: str | os.PathLike, with_gram_matrices: bool = True) -> None:
    """Write a folder; see `UnlearningLayers.save_pretrained`."""
    target = Path(save_directory)
    record = layers.spul_config
    record.set_base(layers.get_base_model())
    with atomic_folder(target) as folder:
        _write(layers.layers_state(), folder / WEIGHTS_NAME)
        config = {**layers.layers_config.to_dict(), "num_requests": layers.num_requests}
        (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        record.save(folder)
        parameters = sum(parameter.numel() for parameter in layers.layers.parameters())
        layers_card(record, config, parameters).save(folder / CARD_NAME)
        if layers.gram_matrices and with_gram_matrices:
            _write(layers.gram_matrices, folder / GRAM_MATRICES_NAME)
    if not (layers.gram_matrices and with_gram_matrices):  # those of an earlier save would not belong to these layers
        (target / GRAM_MATRICES_NAME).unlink(missing_ok=True)


def _write(tensors: dict[str, Tensor], path: Path) -> None:
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(on_cpu, path, metadata={"format": "pt"})


def push(
    layers: UnlearningLayers, repo_id: str, private: bool | None, token: str | None, with_gram_matrices: bool
) -> str:
    """Upload a folder; see `UnlearningLayers.push_to_hub`."""
    api = HfApi(token=token)
    name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    with tempfile.TemporaryDirectory() as folder:
        save(layers, folder, with_gram_matrices)
        return str(api.upload_folder(repo_id=name, folder_path=folder, commit_message="Upload unlearning layers"))


def read(folder: str | os.PathLike, **hub: Any) -> SavedLayers:
    """Read the files that `save` writes, from a folder or the Hub.

    Raises:
        ValueError: if it holds no unlearning layers.
        TypeError: if an argument is not one of the Hub's.
    """
    if unknown := sorted(set(hub) - set(HUB_ARGUMENTS)):
        raise TypeError(f"unknown arguments {unknown}; expected the Hub's: {', '.join(HUB_ARGUMENTS)}.")
    config_path, weights_path = find_file(folder, CONFIG_NAME, **hub), find_file(folder, WEIGHTS_NAME, **hub)
    if config_path is None or weights_path is None:
        raise ValueError(
            f"{str(folder)!r} holds no unlearning layers: expected {CONFIG_NAME} and {WEIGHTS_NAME}, as "
            "UnlearningLayers.save_pretrained writes them."
        )
    config = json.loads(config_path.read_text(encoding="utf-8"))
    grams = find_file(folder, GRAM_MATRICES_NAME, **hub)
    return SavedLayers(
        num_requests=config.get("num_requests", 1),
        config={
            name: config[name] for name in CONFIG_FIELDS if name in config
        },  # later versions may write more fields
        state=load_file(weights_path),
        gram_matrices={} if grams is None else load_file(grams),
        spul_config=read_spul_config(folder, **hub),
    )


def check_base(base: PreTrainedModel, record: SpulConfig, folder: str | os.PathLike) -> None:
    """Warn if the base's weights differ from those that the layers were trained on."""
    trained_on = record.base_model_name_or_path or "another model"
    advice = f"Load them on the model they were trained for ({trained_on})."
    record.warn_if_base_differs(base, f"the layers in {str(folder)!r} were", advice, stacklevel=3)
