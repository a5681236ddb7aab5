"""Private and fast-moving APIs of other libraries are read in spul/models/compat.py only."""

import ast
from pathlib import Path

import pytest
import torch
from datasets import Dataset, concatenate_datasets
from helpers import build
from torch import nn

import spul.models
from spul.models.compat import (
    adapter_enabled,
    expanded_cache,
    flattened,
    is_sharded,
    layer_states,
    uncompiled,
)

ROOT = Path(spul.models.__file__).parents[1]
FILES = [path for path in sorted(ROOT.rglob("*.py")) if path != ROOT / "models" / "compat.py"]
# Modules whose names change between versions.
MODULES = (
    "accelerate.utils",
    "bitsandbytes",
    "peft.tuners",
    "peft.utils",
    "torch._dynamo",
    "torch.distributed.tensor",
    "transformers.cache_utils",
    "transformers.modeling_utils",
    "transformers.trainer",
    "transformers.trainer_pt_utils",
    "transformers.trainer_utils",
)
LIBRARIES = ("accelerate", "bitsandbytes", "peft", "torch", "transformers")
ATTRIBUTES = [
    "_adapters_disabled",
    "_dynamo",
    "_fingerprint",
    "_forward_hooks",
    "_indices",
    "_orig_mod",
    "_version",
    "cumulative_length",
    "disable_adapters",
    "ds_id",
    "gradient_checkpointing",
    "lazy_initialization",
    "slice_logits_to_keep",
]


def uses_of_private_apis(source):
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").split(".")[0] in LIBRARIES:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            names = []
        found += [
            name
            for name in names
            if any(f"{name}.".startswith(f"{module}.") for module in MODULES)
            or (name.split(".")[0] in LIBRARIES and any(part.startswith("_") for part in name.split(".")))
        ]
        name = getattr(node, "attr", None) if isinstance(node, ast.Attribute) else getattr(node, "value", None)
        if isinstance(name, str) and (name in ATTRIBUTES or name.startswith("torch._")):
            found.append(name)
    return found


def test_the_check_finds_private_names():
    assert uses_of_private_apis("from peft.utils import ModulesToSaveWrapper") == ["peft.utils.ModulesToSaveWrapper"]
    assert uses_of_private_apis("from accelerate import utils, PartialState") == ["accelerate.utils"]
    assert uses_of_private_apis("import bitsandbytes") == ["bitsandbytes"]
    assert uses_of_private_apis("from torch.nn.modules.dropout import _DropoutNd")
    assert uses_of_private_apis("getattr(model, '_orig_mod', model)") == ["_orig_mod"]
    assert uses_of_private_apis("model._adapters_disabled = True") == ["_adapters_disabled"]
    assert not uses_of_private_apis("from peft import PeftModel\nfrom .trainer import x\nself._loss")
    assert uses_of_private_apis((ROOT / "models" / "compat.py").read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_private_apis_stand_in_compat_only(path):
    assert uses_of_private_apis(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_an_expanded_cache_is_that_of_rows_which_all_hold_the_prompt(family):
    base, ids = build(family).double(), torch.randint(5, 100, (1, 9))
    with torch.no_grad():
        one = layer_states(base(ids, use_cache=True).past_key_values)
        other = base(ids.repeat(3, 1), use_cache=True).past_key_values
    cache = expanded_cache(one, base, 3)
    assert cache.get_seq_length() == other.get_seq_length() == 9
    for layer, expected in zip(cache.layers, other.layers, strict=True):
        assert type(layer) is type(expected)
        assert layer.get_seq_length() == expected.get_seq_length()
        torch.testing.assert_close(layer.keys, expected.keys)
        torch.testing.assert_close(layer.values, expected.values)
        assert layer.keys.stride(0) == 0, "rows share the prompt's memory"


def test_what_is_not_a_plain_cache_has_no_layer_states():
    assert layer_states(None) is None
    assert layer_states(((torch.ones(1), torch.ones(1)),)) is None


def test_compiled_sharded_and_disabled_models_are_recognized():
    from peft import LoraConfig, get_peft_model

    linear = nn.Linear(2, 2)
    assert uncompiled(torch.compile(linear)) is linear
    assert uncompiled(linear) is linear
    assert not is_sharded(linear)
    linear.weight.ds_id = 0
    assert is_sharded(linear)
    model = get_peft_model(build("llama"), LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    assert adapter_enabled(model)
    with model.disable_adapter():
        assert not adapter_enabled(model)
    model.base_model.disable_adapter_layers()
    assert not adapter_enabled(model)


def selected_rows(kind, tmp_path):
    columns = {"text": [f"é {i}" for i in range(9)], "messages": [[{"role": "user", "n": i}] for i in range(9)]}
    rows = Dataset.from_dict(columns)
    if kind == "two tables":
        rows = concatenate_datasets([rows, rows.select(range(4))])
    if kind == "on disk":
        rows.save_to_disk(tmp_path / "rows")
        rows = Dataset.load_from_disk(tmp_path / "rows")
    rows = rows.select([5, 2, 2, 8, 0])
    if kind == "formatted":
        rows = rows.with_format("numpy", columns=["text"], output_all_columns=True)
    if kind == "transformed":
        rows = rows.with_transform(lambda batch: {"text": [text.upper() for text in batch["text"]]})
    return rows


@pytest.mark.parametrize("kind", ["plain", "two tables", "on disk", "formatted", "transformed"])
def test_selected_rows_are_flattened_as_datasets_does(kind, tmp_path, monkeypatch):
    monkeypatch.setattr("spul.models.compat.ROWS_TAKEN", 2)
    rows = selected_rows(kind, tmp_path)
    # The function is called once; datasets cannot flatten messages that a format made arrays of.
    expected = rows.flatten_indices() if kind == "transformed" else rows.with_format(None).flatten_indices()
    flat = flattened(rows)
    assert flat.format == rows.format
    assert flat.features == expected.features
    assert flat.with_format(None).to_list() == expected.with_format(None).to_list()
    whole = flat.add_column("number", list(range(5)))  # which needs a flat table
    assert whole.with_format(None)["number"][:] == [0, 1, 2, 3, 4]


def test_rows_that_are_flat_stay_the_same_object():
    rows = Dataset.from_dict({"text": ["a", "b"]})
    assert flattened(rows) is rows
