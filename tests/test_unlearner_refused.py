"""SoftPromptUnlearner: models, configs and batches that it refuses, and what it says."""

import re

import pytest
import torch
from helpers import CONFIGS, build, build_unlearner, make_batch
from peft import LoraConfig, MultitaskPromptTuningConfig, PromptTuningConfig, get_peft_model

from spul import SoftPromptUnlearner
from spul.losses import GradientAscent


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(task_type="CAUSAL_LM"),
        MultitaskPromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, num_tasks=2),
    ],
)
def test_other_configs_are_refused_and_the_three_are_named(config):
    with pytest.raises(TypeError, match=r"PromptTuningConfig, PromptEncoderConfig, PrefixTuningConfig"):
        SoftPromptUnlearner(build("llama"), config)


def test_other_task_types_and_losses_are_refused():
    with pytest.raises(ValueError, match="expected 'CAUSAL_LM'"):
        SoftPromptUnlearner(build("llama"), PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3))
    with pytest.raises(TypeError, match="expected an UnlearningLoss"):
        SoftPromptUnlearner(build("llama"), CONFIGS["prompt_tuning"](), loss=GradientAscent())


def test_models_with_an_adapter_and_names_are_refused():
    tuned = get_peft_model(build("llama"), LoraConfig(task_type="CAUSAL_LM"))
    for model in (tuned, "facebook/opt-1.3b"):
        with pytest.raises(TypeError, match=r"expected a causal LM.*merge_and_unload"):
            SoftPromptUnlearner(model, CONFIGS["prompt_tuning"]())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"labels": None}, ValueError, "needs input_ids and labels"),
        ({"is_forget": torch.ones(3)}, ValueError, "shapes do not match"),
        ({"is_forget": torch.tensor([0, 1, 2, 1, 0])}, ValueError, r"is_forget=\[0, 1, 2, 1, 0\]; expected \(B,\) of"),
        ({"labels": torch.full((5, 12), -100)}, ValueError, "no response token to predict"),
        ({"output_attentions": True}, TypeError, "takes no output_attentions"),
    ],
)
def test_bad_batches_say_what_is_wrong(change, error, message):
    with pytest.raises(error, match=message):
        build_unlearner()(**{**make_batch(), **change})


@pytest.mark.parametrize("counts", [[2.0, 3.0], torch.tensor(5.0), torch.ones(3)], ids=repr)
def test_group_counts_that_are_not_two_numbers_are_refused(counts):
    with pytest.raises(ValueError, match=r"group_counts=.*; expected a tensor of two numbers, of the forget and"):
        build_unlearner()(**make_batch(), group_counts=counts)


def test_rows_beyond_the_models_positions_raise():
    unlearner = build_unlearner(p=90)
    with pytest.raises(ValueError, match=r"exceed the model's 96 positions; collate with max_length of at most 6"):
        unlearner(**make_batch())


def test_left_padded_plain_forward_refuses_what_it_would_misplace():
    batch = make_batch("left")
    with pytest.raises(ValueError, match="take no logits_to_keep; pad on the right"):
        build_unlearner()(batch["input_ids"], batch["attention_mask"], logits_to_keep=1)


@pytest.mark.parametrize(
    "name",
    [
        *("", "2026.017", "..", "a/b", "/a", "a\\b", " a", "a\n", " ", "a\0b", "a\x85b", "a\udcffb"),
        *("__base__", "gate", "train", "training"),
    ],
)
def test_names_that_a_prompt_cannot_have_are_refused(name, tmp_path):
    unlearner = build_unlearner()
    unlearner.save_pretrained(str(tmp_path))
    message = re.escape(f"adapter_name={name!r}: expected a name that is not empty, has no dot")
    with pytest.raises(ValueError, match=message):
        unlearner.add_adapter(name, CONFIGS["prompt_tuning"]())
    with pytest.raises(ValueError, match=message):
        unlearner.load_adapter(tmp_path, name)
    with pytest.raises(ValueError, match=message):
        SoftPromptUnlearner(build("llama"), CONFIGS["prompt_tuning"](), adapter_name=name)
    with pytest.raises(TypeError, match="adapter_name is a int"):
        unlearner.add_adapter(5, CONFIGS["prompt_tuning"]())
    assert list(unlearner.peft_config) == ["default"]


@pytest.mark.parametrize("name", ["Zo\xeb", "\u738b \u5c0f\u660e", "\u0645\u06cc\u200c\u062e", "a\xa0b", "a:b"])
def test_a_name_of_other_letters_is_that_of_a_folder_too(name, tmp_path):
    SoftPromptUnlearner(build("llama"), CONFIGS["prompt_tuning"](), adapter_name=name).save_pretrained(str(tmp_path))
    assert SoftPromptUnlearner.from_pretrained(build("llama"), str(tmp_path / name), adapter_name=name).peft_config


@pytest.mark.parametrize(
    "name", ["merge_and_unload", "unload", "merge_adapter", "unmerge_adapter", "add_weighted_adapter"]
)
def test_methods_of_adapters_that_change_weights_say_what_there_is_instead(name):
    unlearner = build_unlearner()
    with pytest.raises(AttributeError, match=f"no change of weights, so there is no {name}.*export_checkpoint"):
        getattr(unlearner, name)
    assert not hasattr(unlearner, name)


def test_prompts_that_there_are_not_are_refused_with_those_that_there_are(tmp_path):
    unlearner = build_unlearner()
    for act in (unlearner.set_adapter, unlearner.delete_adapter):
        with pytest.raises(ValueError, match=r"there is no prompt 'other'; there are \['default'\]"):
            act("other")
        with pytest.raises(ValueError, match=r"'__base__'.*runs inside disable_adapter\(\)"):
            act("__base__")
        with pytest.raises(TypeError, match=r"adapter_name is a list; expected the name of one prompt"):
            act(["default"])
    with pytest.raises(ValueError, match="there is no prompt 'other'"):
        unlearner.save_pretrained(str(tmp_path), selected_adapters=["other"])
    with pytest.raises(TypeError, match="selected_adapters is 'default'; expected a list"):
        unlearner.save_pretrained(str(tmp_path), selected_adapters="default")
    assert not list(tmp_path.iterdir())
    assert unlearner.active_adapter == "default"
