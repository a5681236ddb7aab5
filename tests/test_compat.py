"""Private and fast-moving APIs of other libraries are read in spul/models/compat*.py only; none is deprecated."""

import ast
import copy
import logging
import warnings
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from datasets import Dataset, concatenate_datasets
from helpers import (
    CONFIGS,
    arguments,
    build,
    build_unlearner,
    make_batch,
    make_collator,
    make_dataset,
    make_trainer,
    prompted,
    rows,
    scored,
    stirred,
)
from torch import nn
from transformers import TrainingArguments
from transformers.utils import ModelOutput
from transformers.utils.deprecation import deprecate_kwarg

import spul.models
from spul import UnlearningTrainer
from spul.losses import UnlearningLoss
from spul.models.compat import adapter_enabled, flattened, is_sharded, uncompiled
from spul.models.compat_cache import CACHE_NAME, cache_argument, expanded_cache, layer_states, returned_cache
from spul.models.compat_shards import by_device

ROOT = Path(spul.models.__file__).parents[1]
PRIVATE = sorted((ROOT / "models").glob("compat*.py"))
FILES = [path for path in sorted(ROOT.rglob("*.py")) if path not in PRIVATE]
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


@contextmanager
def deprecations():
    """The warnings of transformers about deprecated names, also those that it logs once."""
    found: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())
    logger = logging.getLogger("transformers")
    logging.Logger.warning_once.cache_clear()
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield found
    finally:
        logger.removeHandler(handler)
    found += [str(warning.message) for warning in caught if issubclass(warning.category, FutureWarning)]
    found[:] = [message for message in found if "deprecated" in message]


def test_warnings_about_deprecated_names_are_seen():
    @deprecate_kwarg("old", version="99", new_name="new")
    def function(new=None):
        return new

    with deprecations() as found:
        function(old=1)
        logging.getLogger("transformers.utils.generic").warning_once("`past_key_values` are deprecated.")
    assert len(found) == 2


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("prompt_type", CONFIGS)
def test_forward_generate_and_a_training_step_use_no_deprecated_name(family, prompt_type):
    unlearner, batch = build_unlearner(family, prompt_type, loss=UnlearningLoss(beta=1.0)), make_batch()
    plain = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    left = {name: make_batch("left")[name] for name in ("input_ids", "attention_mask")}
    with deprecations() as found:
        unlearner(**batch).loss.backward()
        unlearner(**plain).loss.backward()
        with torch.no_grad():
            for options in ({}, {"use_cache": True}, {"use_cache": False}, {"output_hidden_states": True}):
                unlearner(**plain, **options)
            unlearner(**left)
        for options in ({}, {"num_beams": 2}, {"return_dict_in_generate": True}):
            unlearner.generate(**left, max_new_tokens=3, pad_token_id=0, **options)
    assert found == []


def test_trainer_layers_and_scoring_use_no_deprecated_name(tmp_path):
    names = {field.name for field in fields(TrainingArguments)}
    checkpointing = next(x for x in ("activation_checkpointing", "gradient_checkpointing") if x in names)
    layers, dataset = stirred(build("llama")), make_dataset(4, 4)
    args = arguments(tmp_path / "layers", max_steps=1, **{checkpointing: True})
    trainers = [
        make_trainer(tmp_path / "prompt", max_steps=1, eval_dataset=dataset),
        make_trainer(tmp_path / "prefix", "prefix_tuning", max_steps=1, eval_dataset=dataset),
        UnlearningTrainer(layers, args, make_collator(), dataset, eval_dataset=dataset, loss=UnlearningLoss()),
    ]
    unlearner = prompted()  # PEFT reads a deprecated property when a model is wrapped
    with deprecations() as found:
        for trainer in trainers:
            trainer.train()
            trainer.evaluate()
        scored(unlearner, rows("film", 2))
    assert found == []


def test_the_cache_has_the_name_that_the_forward_takes():
    base, cache = build("llama"), object()
    assert cache_argument(base) == CACHE_NAME
    assert returned_cache(base(torch.tensor([[5, 6]]), use_cache=True)) is not None
    assert returned_cache(base(torch.tensor([[5, 6]]), use_cache=False)) is None

    class OldCode(nn.Module):
        def forward(self, input_ids, past_key_values=None, **kwargs):
            return past_key_values

    class AnyName(nn.Module):
        def forward(self, **kwargs):
            return kwargs[CACHE_NAME]

    assert OldCode()(None, **{cache_argument(OldCode()): cache}) is cache
    assert AnyName()(**{cache_argument(AnyName()): cache}) is cache
    assert returned_cache(ModelOutput()) is None


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
    config = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")
    on_compiled = get_peft_model(torch.compile(build("llama"), backend="eager"), copy.deepcopy(config))
    assert uncompiled(on_compiled) is on_compiled  # although PEFT hands out its base's attributes
    model = get_peft_model(build("llama"), config)
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


@pytest.mark.parametrize(
    ("device", "kind"), [("cpu", "MULTI_CPU"), ("cuda:1", "MULTI_GPU"), ("xpu", "MULTI_XPU"), ("hpu", "MULTI_HPU")]
)
def test_processes_have_the_kind_that_accelerate_names_by_their_device(device, kind):
    assert by_device(torch.device(device)) == kind


def test_a_device_that_accelerate_shares_no_work_on_is_refused():
    with pytest.raises(ValueError, match="MULTI_MPS"):
        by_device(torch.device("mps"))
