"""A base in 4 bit is sharded over two processes: a prompt trains, saves, resumes and reloads as over the whole one."""

import sys
from pathlib import Path

import pytest
import torch
from helpers import CONFIGS, assert_same, build
from peft import LoraConfig, get_peft_model
from processes import finish, launched, start_one_of_two
from sharded_steps import FSDP, assert_loads, assert_steps, refused, steps
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import spul.models.sharding
from spul import SoftPromptUnlearner, UnlearningLoss
from spul.models import shard_layers
from spul.models.compat_shards import layers_in_4bit
from spul.models.noise import zero_dropout
from spul.records.digests import fingerprint

# The types that bitsandbytes stores weights as, one of them with scales that are quantized, too.
STORED = {
    "prompt_tuning": {"bnb_4bit_quant_storage": torch.uint8},
    "p_tuning": {"bnb_4bit_quant_storage": torch.bfloat16, "bnb_4bit_use_double_quant": True},
    "prefix_tuning": {"bnb_4bit_quant_storage": torch.float32},
}
THREE = {"max_steps": 3}


def quantized(folder, **settings):
    """The base that the folder holds, in 4 bit unless settings say otherwise."""
    settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32} | settings
    config = BitsAndBytesConfig(**settings)
    return AutoModelForCausalLM.from_pretrained(folder / "base", quantization_config=config, dtype=torch.float32)


def unlearner(folder, prompt_type):
    base = quantized(folder, **STORED[prompt_type])
    torch.manual_seed(3)
    return SoftPromptUnlearner(base, CONFIGS[prompt_type](4))


def lora(folder):
    base = quantized(folder)
    torch.manual_seed(3)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "up_proj"]))
    zero_dropout(model)
    return model


def shares_of_4bit(model):
    """The bytes of weights in 4 bit that this process holds, and those that the whole base has."""
    weights = [layer.weight for layer in layers_in_4bit(model)]
    return sum(weight.to_local().nbytes for weight in weights), sum(weight.nbytes for weight in weights)


def main(folder):
    """All of the work, in one of the processes; its results go to a file."""
    state, folder, results = start_one_of_two(), Path(folder), {}
    for prompt_type in CONFIGS:
        model = unlearner(folder, prompt_type)
        results[prompt_type] = steps(model, folder / prompt_type, 2, **THREE, **FSDP)
        results[f"bytes {prompt_type}"] = shares_of_4bit(model)
        first = str(folder / prompt_type / "out" / "checkpoint-1")
        resumed = steps(unlearner(folder, prompt_type), folder / prompt_type, 2, first, **THREE, **FSDP)
        results[f"resumed {prompt_type}"] = resumed["state"]
        checkpointed = {"gradient_checkpointing": True, **THREE, **FSDP}
        path = folder / f"checkpointed-{prompt_type}"
        results[f"checkpointed {prompt_type}"] = steps(unlearner(folder, prompt_type), path, 2, **checkpointed)
    results["lora"] = steps(lora(folder), folder / "lora", 2, loss=UnlearningLoss(), **THREE, **FSDP)
    in_8bit = quantized(folder, load_in_4bit=False, load_in_8bit=True)
    results["8 bit"] = refused(lambda: shard_layers(in_8bit))
    otherwise = build("llama").requires_grad_(False)
    otherwise.is_quantized = True  # by a library that keeps weights in buffers
    results["otherwise"] = refused(lambda: shard_layers(otherwise))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spul.models.sharding, "shards_bytes", lambda: False)
        results["old torch"] = refused(lambda: shard_layers(quantized(folder)))
    finish(state, results, folder)


@pytest.fixture(scope="module")
def launch(tmp_path_factory):
    """The folder of what two processes did, and the results of each of them."""
    folder = tmp_path_factory.mktemp("sharding_4bit")
    build("llama", hidden_size=128).save_pretrained(folder / "base")  # 4 bit goes by blocks of 64
    return folder, launched(__file__, folder)


@pytest.mark.parametrize("prompt_type", CONFIGS)
def test_2_processes_with_a_sharded_base_in_4_bit_make_the_steps_of_one(launch, tmp_path, prompt_type):
    folder, found = launch
    one = steps(unlearner(folder, prompt_type), tmp_path, 1, **THREE)
    for results in found:
        assert_steps(one, results[prompt_type])
        assert_steps(one, results[f"checkpointed {prompt_type}"])
        assert_same(results[prompt_type]["state"], results[f"resumed {prompt_type}"], rtol=0, atol=0)
        held, whole = results[f"bytes {prompt_type}"]
        assert 0 < held == whole / 2


@pytest.mark.parametrize("prompt_type", CONFIGS)
def test_a_prompt_trained_on_a_sharded_base_in_4_bit_loads_onto_a_whole_one(launch, prompt_type):
    folder, results = launch
    saved = folder / prompt_type / "out" / "checkpoint-3"
    base = quantized(folder, **STORED[prompt_type])
    assert_loads(base, saved, results[0][prompt_type])


def test_lora_beside_a_sharded_base_in_4_bit_makes_the_steps_of_one(launch, tmp_path):
    folder, found = launch
    one = steps(lora(folder), tmp_path, 1, loss=UnlearningLoss(), **THREE)
    for results in found:
        assert_steps(one, results["lora"])


def test_a_base_that_is_quantized_otherwise_is_refused(launch):
    for results in launch[1]:
        assert "LlamaForCausalLM is quantized, with weights of type Int8Params" in results["8 bit"]
        assert "LlamaForCausalLM is quantized, and cannot" in results["otherwise"]
        assert "load_in_4bit=True" in results["8 bit"]


def test_a_torch_that_shards_no_bytes_is_named(launch):
    for results in launch[1]:
        assert "use torch 2.13 or later" in results["old torch"]


def test_a_base_in_4_bit_has_one_fingerprint_whatever_type_it_is_stored_as(launch):
    kinds = (torch.uint8, torch.bfloat16, torch.float32)
    assert len({fingerprint(quantized(launch[0], bnb_4bit_quant_storage=kind)) for kind in kinds}) == 1
    assert fingerprint(quantized(launch[0], bnb_4bit_quant_type="fp4")) != fingerprint(quantized(launch[0]))


if __name__ == "__main__":
    main(sys.argv[1])
