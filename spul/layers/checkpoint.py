"""Saving and loading of unlearning layers: the files of their folder."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import HfApi
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from ..records.card import CARD_NAME, layers_card
from ..records.fields import is_count, read_object
from ..records.files import atomic_folder, check_hub_arguments, find_file
from ..records.spul_config import SpulConfig, read_spul_config
from ..records.weights import Shapes, read_weights

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
        record.save_with_weights(folder, target, WEIGHTS_NAME)
        parameters = sum(parameter.numel() for parameter in layers.layers.parameters())
        layers_card(record, config, parameters).save(folder / CARD_NAME)
        if layers.gram_matrices and with_gram_matrices:
            _write(layers.gram_matrices, folder / GRAM_MATRICES_NAME)
    if not (layers.gram_matrices and with_gram_matrices):  # those of an earlier save would not belong to these layers
        (target / GRAM_MATRICES_NAME).unlink(missing_ok=True)


def _write(tensors: dict[str, Tensor], path: Path) -> None:
    save_file(on_cpu(tensors), path, metadata={"format": "pt"})


def on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as a file has them: on the CPU, without gradients."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def push(
    layers: UnlearningLayers, repo_id: str, private: bool | None, token: str | None, with_gram_matrices: bool
) -> str:
    """Upload a folder; see `UnlearningLayers.push_to_hub`."""
    api = HfApi(token=token)
    name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    with tempfile.TemporaryDirectory() as folder:
        save(layers, folder, with_gram_matrices)
        layers.spul_config.name = name
        return str(api.upload_folder(repo_id=name, folder_path=folder, commit_message="Upload unlearning layers"))


def read(folder: str | os.PathLike, **hub: Any) -> SavedLayers:
    """Read the files that `save` writes, from a folder or the Hub.

    Args:
        folder: a local folder or a Hub repository's name.
        hub: arguments of `find_file`.

    Raises:
        ValueError: if it holds no unlearning layers, a file is damaged, a field of config or record is out of range,
            or config, record and weights do not belong together.
        TypeError: if an argument is not one of the Hub's.
    """
    check_hub_arguments(hub)
    config_path, weights_path = find_file(folder, CONFIG_NAME, **hub), find_file(folder, WEIGHTS_NAME, **hub)
    if config_path is None or weights_path is None:
        raise ValueError(
            f"{str(folder)!r} holds no unlearning layers: expected {CONFIG_NAME} and {WEIGHTS_NAME}, as "
            "UnlearningLayers.save_pretrained writes them."
        )
    config = read_object(config_path)
    _check_config(config, config_path)
    record = read_spul_config(folder, **hub)
    record.check_weights(weights_path)
    state = read_weights(weights_path)
    grams_path = find_file(folder, GRAM_MATRICES_NAME, **hub)
    grams = {} if grams_path is None else read_weights(grams_path)
    for name, gram in grams.items():
        weight = state.get(f"{name}.weight")
        side = None if weight is None or weight.ndim != 2 else weight.shape[1] + 1
        if gram.shape != (side, side):
            raise ValueError(
                f"{grams_path}: {name!r} has the shape {tuple(gram.shape)}, by the layers' weights {(side, side)} "
                "(None: no such projection). Copy or download the whole folder again, or gather the matrices anew."
            )
    fields = {name: config[name] for name in CONFIG_FIELDS if name in config}  # later versions may write more
    return SavedLayers(
        config=fields, state=state, gram_matrices=grams, num_requests=config.get("num_requests", 1), spul_config=record
    )


def _check_config(config: dict[str, Any], path: Path) -> None:
    """Raise unless the fields of `unlearning_layers.json` have the types of a config."""
    modules = config.get("target_modules")
    are_names = isinstance(modules, list) and all(isinstance(name, str) for name in modules)
    checks = {
        "num_requests": (is_count(config.get("num_requests", 1), least=1), "an integer of at least 1"),
        "activation": (isinstance(config.get("activation", ""), str), "text"),
        "target_modules": (modules is None or are_names, "a list of texts, or null"),
        "init_seed": (is_count(config.get("init_seed", 0), least=-(2**63)), "an integer"),
        "train_down": (isinstance(config.get("train_down", True), bool), "true or false"),
    }
    for name, (is_right, expected) in checks.items():
        if not is_right:
            raise ValueError(f"{path}: {name} is {config[name]!r}; expected {expected}. Correct the field.")


def check_state(state: Mapping[str, Tensor], expected: Shapes) -> None:
    """Raise unless weights have the names and shapes of a base's layers."""
    found = {key: tuple(value.shape) for key, value in state.items()}
    if expected != found:
        differing = sorted(key for key in expected | found if expected.get(key) != found.get(key))
        raise ValueError(
            f"{len(differing)} of {len(expected)} tensors do not fit this base's layers, such as "
            f"{differing[0]!r}: expected {expected.get(differing[0])}, found {found.get(differing[0])}; load them "
            "on the model that they were made for, with their own config."
        )


def check_base(base: PreTrainedModel, record: SpulConfig, folder: str | os.PathLike) -> None:
    """Warn if the base's weights differ from those that the layers were trained on."""
    trained_on = record.base_model_name_or_path or "another model"
    advice = f"Load them on the model they were trained for ({trained_on})."
    record.warn_if_base_differs(base, f"the layers in {str(folder)!r} were", advice)
