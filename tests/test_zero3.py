"""A base that DeepSpeed's ZeRO-3 shards over two processes trains, saves, resumes and evaluates as in one.

DeepSpeed is in a folder of its own, which `SPUL_DEEPSPEED` names: installed beside transformers and accelerate, it
would be imported by all other tests. Without one these tests are skipped. See `.ci/run`.
"""

import os
import sys
from pathlib import Path

import pytest
import torch
from helpers import (
    CONFIGS,
    arguments,
    assert_same,
    build,
    make_answers,
    make_collator,
    make_tokenizer,
    make_unlearner,
    trainable_model,
)
from processes import finish, launched, start_one_of_two
from sharded_steps import (
    SGD,
    assert_evaluation,
    assert_loads,
    assert_steps,
    evaluation,
    lora,
    refused,
    steps,
    uneven_steps,
)
from small_evaluations import make_model
from transformers import AutoModelForCausalLM

from spul import SoftPromptUnlearner, UnlearningLoss, UnlearningTrainer
from spul.gates import StateGate
from spul.models import partition_layers
from spul.models.compat import gathers_weights
from spul.models.compat_shards import precision_settings
from spul.training.methods import unlearning_method

FOLDER = os.environ.get("SPUL_DEEPSPEED")
pytestmark = pytest.mark.skipif(not FOLDER, reason="SPUL_DEEPSPEED names no folder with DeepSpeed")

# What is put on a base that is loaded in shards.
LOADED = ("prompt_tuning", "p_tuning", "lora")

# Nothing is kept whole, or longer than a module needs it.
ZERO = {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0}
ZERO |= {"stage3_max_reuse_distance": 0}


def zero3(**more):
    """Options of a training with ZeRO-3."""
    sizes = {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto"}
    return {"deepspeed": {"zero_optimization": ZERO, "gradient_clipping": "auto", **sizes, **more}}


# As `accelerate launch` says it to its processes.
LAUNCHED = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}


# What its engine would carry out, and what DeepSpeed does not know.
IGNORED = {
    "quantized": {"zero_optimization": ZERO | {"zero_quantized_weights": True}},
    "misspelled": {"zero_optimization": ZERO | {"stage3_max_live_parameter": 0}},
    "scaler": {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}},
}


def offloaded():
    return zero3(zero_optimization=ZERO | {"offload_param": {"device": "cpu"}, "stage3_max_live_parameters": 10**9})


def loaded(folder, prompt_type, **options):
    """A prompt, LoRA, or nothing (None) on the base that the folder holds, read while training arguments are at hand,
    whose base transformers then loads in shards; with them."""
    args = arguments(folder / "arguments", **options)
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    torch.manual_seed(3)
    if prompt_type == "lora":
        return unlearning_method("GA+GD", trainable="lora").prepare(base), args
    return (base if prompt_type is None else SoftPromptUnlearner(base, CONFIGS[prompt_type](4))), args


def held(model):
    """The numbers of the decoder layers that this process holds, between passes."""
    return sum(p.ds_tensor.numel() for p in model.parameters() if hasattr(p, "ds_tensor"))


def gathered(model):
    """The numbers of the decoder layers that are whole in this process."""
    return sum(p.numel() for p in model.parameters() if hasattr(p, "ds_tensor"))


def gathered_after_live_steps(folder):
    """Those after steps whose reference is a pass of the base between a forward and its backward pass."""
    model, size = make_unlearner(), {"per_device_train_batch_size": 4}
    args = arguments(folder, **size, **SGD | {"save_strategy": "no"}, **zero3())
    UnlearningTrainer(model, args, make_collator(), make_answers(4, 4), reference="live").train()
    return gathered(model)


def after_two_passes():
    """The numbers of the decoder layers that are whole after two passes and one backward pass, and the gradients."""
    model = make_unlearner()
    partition_layers(model, ZERO)
    return gradients_of_two_passes(model), gathered(model)


def gradients_of_two_passes(model):
    batches = [make_collator()([dict(row) for row in make_answers(*sizes)]) for sizes in ((2, 3), (3, 1))]
    sum(model(**batch).loss for batch in batches).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def at_message():
    torch.manual_seed(3)
    return SoftPromptUnlearner(build("llama").float(), CONFIGS["p_tuning"](4), prompt_position="message").float()


def message_steps(folder, processes, **options):
    """Steps of a prompt inside the rows."""
    collator = make_collator(prompt_position="message", text_field="prompt")
    return steps(at_message(), folder, processes, collator=collator, **options)


def state_scores(model):
    """Those of a gate that reads the states of the model's base."""
    words = ("film", "plot", "good", "bad", "doe", "is", "of", "the")
    texts = [f"text about jane {word}" for word in words], [f"review of the {word}" for word in words]
    return StateGate.fit(model, make_tokenizer(), *texts).scores(["about jane", "the film"]).tolist()


def unpartitioned(folder):
    """The errors of what runs a base that was loaded in shards before anything gathers it."""
    ids, found = torch.ones(1, 3, dtype=torch.long), {}
    prompt, args = loaded(folder, "prompt_tuning", **zero3())
    found["generate"] = refused(lambda: prompt.generate(ids, max_new_tokens=1))
    found["forward"] = refused(lambda: prompt(ids))
    with prompt.disable_adapter():
        found["forward of the base"] = refused(lambda: prompt(ids))
    lora, args = loaded(folder, "lora", **zero3())
    found["forward of LoRA"] = refused(lambda: lora(ids))
    base, args = loaded(folder, None, **zero3())
    found["states"] = refused(lambda: state_scores(base))
    del args
    found["unpartitioned"] = refused(lambda: steps(prompt, folder / "refused", 2))
    return found


def main(folder):
    """All of the work, in one of the processes; its results go to a file."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # plain gloo, which needs no compiler
    state, folder, results = start_one_of_two(), Path(folder), {}
    for prompt_type in CONFIGS:
        model = make_unlearner(prompt_type)
        results[prompt_type] = steps(model, folder / prompt_type, 2, **zero3())
        results[f"held {prompt_type}"] = held(model)
        first = str(folder / prompt_type / "out" / "checkpoint-1")
        resumed = steps(make_unlearner(prompt_type), folder / prompt_type, 2, first, **zero3())
        results[f"resumed {prompt_type}"] = resumed["state"]
        path = folder / f"checkpointed-{prompt_type}"
        checkpointed = {"gradient_checkpointing": True, **zero3()}
        results[f"checkpointed {prompt_type}"] = steps(make_unlearner(prompt_type), path, 2, **checkpointed)
    for prompt_type in LOADED:
        model, _args = loaded(folder, prompt_type, **zero3())
        results[f"in shards {prompt_type}"] = not gathers_weights(model) and held(model)
        loss = UnlearningLoss() if prompt_type == "lora" else None
        results[f"loaded {prompt_type}"] = steps(model, folder / f"loaded-{prompt_type}", 2, loss=loss, **zero3())
        del _args
    results["offloaded"] = steps(make_unlearner(), folder / "offloaded", 2, **offloaded())
    with pytest.MonkeyPatch.context() as patch:
        for name, value in LAUNCHED.items():
            patch.setenv(name, value)
        model = make_unlearner()
        results["launched"] = steps(model, folder / "launched", 2)
        results["held launched"] = held(model)
    accumulated = {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 3}
    results["accumulated"] = steps(make_unlearner(), folder / "accumulated", 2, **accumulated, **zero3())
    results["lora"] = steps(lora(), folder / "lora", 2, loss=UnlearningLoss(), **zero3())
    for trainable in ("prompt", "lora"):
        results[f"uneven {trainable}"] = uneven_steps(trainable, folder / "uneven", 2, **zero3())
    results["message"] = message_steps(folder / "message", 2, **zero3())
    results["two passes"] = after_two_passes()
    results["gathered live"] = gathered_after_live_steps(folder / "live")
    in_bf16 = zero3(bf16={"enabled": "auto"})
    results["bf16"] = steps(make_unlearner(), folder / "bf16", 2, bf16=True, **in_bf16)
    model = make_model("prompt_tuning")
    partition_layers(model, ZERO)
    results["evaluation"] = evaluation(model, folder / "evaluation")
    results["states of a gate"] = state_scores(model)
    results["twice"] = refused(lambda: partition_layers(model, ZERO))
    results["trains"] = refused(
        lambda: steps(trainable_model("full", dtype=torch.float32), folder, 2, loss=UnlearningLoss(), **zero3())
    )
    optimizer = zero3(optimizer={"type": "AdamW", "params": {"lr": "auto"}})
    results["optimizer"] = refused(lambda: steps(make_unlearner(), folder / "refused", 2, **optimizer))
    clipped = zero3(gradient_clipping=7.0)
    results["differs"] = refused(lambda: steps(make_unlearner(), folder / "refused", 2, **clipped))
    for name, values in IGNORED.items():
        results[name] = refused(
            lambda values=values: steps(make_unlearner(), folder / "refused", 2, **zero3(**values))
        )
    results["stage"] = refused(lambda: partition_layers(make_unlearner(), {"stage": 2}))
    unused = {"stage": 3, "offload_optimizer": {"device": "cpu"}}
    results["offloaded optimizer"] = refused(lambda: partition_layers(make_unlearner(), unused))
    results |= unpartitioned(folder)
    scaler = {"loss_scale": 0, "initial_scale_power": 16, "loss_scale_window": 1000, "hysteresis": 4, "misspelled": 1}
    results["precision"] = precision_settings(
        {"fp16": {"enabled": True, **scaler}, "bf16": {"enabled": False, "x": 1}}
    )
    finish(state, results, folder)


@pytest.fixture(scope="module")
def launch(tmp_path_factory):
    """The folder of what two processes did, and the results of each of them."""
    folder = tmp_path_factory.mktemp("zero3")
    build("llama").float().save_pretrained(folder / "base")
    return folder, launched(__file__, folder, FOLDER)


@pytest.mark.parametrize("prompt_type", CONFIGS)
def test_2_processes_with_a_base_under_zero3_make_the_steps_of_one(launch, tmp_path, prompt_type):
    one = steps(make_unlearner(prompt_type), tmp_path, 1)
    numbers = sum(p.numel() for p in build("llama").model.layers.parameters())
    for results in launch[1]:
        assert_steps(one, results[prompt_type])
        assert_steps(one, results[f"checkpointed {prompt_type}"])
        assert_same(results[prompt_type]["state"], results[f"resumed {prompt_type}"], rtol=0, atol=0)
        assert numbers / 2 <= results[f"held {prompt_type}"] < 0.6 * numbers


@pytest.mark.parametrize("prompt_type", CONFIGS)
def test_a_prompt_trained_under_zero3_loads_onto_a_whole_base(launch, prompt_type):
    folder, results = launch
    saved = folder / prompt_type / "out" / "checkpoint-2"
    assert_loads(build("llama"), saved, results[0][prompt_type])


@pytest.mark.parametrize("prompt_type", LOADED)
def test_a_base_that_transformers_loads_in_shards_makes_the_steps_of_a_whole_one(launch, tmp_path, prompt_type):
    folder, found = launch
    model, _ = loaded(folder, prompt_type)
    one = steps(model, tmp_path, 1, loss=UnlearningLoss() if prompt_type == "lora" else None)
    for results in found:
        assert results[f"in shards {prompt_type}"]
        assert_steps(one, results[f"loaded {prompt_type}"])


def test_a_config_of_accelerate_launch_makes_the_steps_of_one(launch, tmp_path):
    one = steps(make_unlearner(), tmp_path, 1)
    for results in launch[1]:
        assert_steps(one, results["launched"])
        assert results["held launched"]


@pytest.mark.parametrize("kind", ["offloaded", "accumulated"])
def test_offloaded_weights_and_accumulated_batches_make_the_steps_of_one(launch, tmp_path, kind):
    one = steps(make_unlearner(), tmp_path, 1)
    for results in launch[1]:
        assert_steps(one, results[kind])


def test_lora_beside_a_base_under_zero3_makes_the_steps_of_one(launch, tmp_path):
    one = steps(lora(), tmp_path, 1, loss=UnlearningLoss())
    for results in launch[1]:
        assert_steps(one, results["lora"])


@pytest.mark.parametrize("trainable", ["prompt", "lora"])
def test_a_process_without_retain_rows_gathers_layers_for_the_other(launch, tmp_path, trainable):
    one = uneven_steps(trainable, tmp_path, 1)
    for results in launch[1]:
        assert_same(one, results[f"uneven {trainable}"], rtol=0, atol=1e-5)


def test_a_prompt_inside_the_rows_makes_the_steps_of_one(launch, tmp_path):
    one = message_steps(tmp_path, 1)
    for results in launch[1]:
        assert_steps(one, results["message"])


def test_two_passes_before_a_backward_pass_have_the_gradients_of_one_process_and_leave_no_layer_gathered(launch):
    one = gradients_of_two_passes(make_unlearner())
    for results in launch[1]:
        gradients, whole = results["two passes"]
        assert_same(one, gradients, rtol=0, atol=1e-5)
        assert whole == 0


def test_a_gate_reads_the_states_of_a_base_under_zero3(launch):
    one = state_scores(make_model("prompt_tuning"))
    for results in launch[1]:
        assert results["states of a gate"] == pytest.approx(one, abs=1e-4)


def test_a_live_reference_leaves_no_layer_gathered(launch):
    for results in launch[1]:
        assert results["gathered live"] == 0


def test_mixed_precision_is_that_of_the_arguments(launch, tmp_path):
    one = steps(make_unlearner(), tmp_path, 1, bf16=True)
    in_float32 = steps(make_unlearner(), tmp_path / "float32", 1)
    for results in launch[1]:
        logs = [log["loss"] for log in results["bf16"]["logs"]]
        assert logs == pytest.approx([log["loss"] for log in one["logs"]], abs=2e-2)
        assert logs != pytest.approx([log["loss"] for log in in_float32["logs"]], abs=1e-4)


def test_a_model_under_zero3_is_evaluated_as_a_whole_one(launch, tmp_path):
    one = evaluation(make_model("prompt_tuning"), tmp_path)
    for results in launch[1]:
        assert_evaluation(one, results["evaluation"])


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("twice", "sharded already"),
        ("trains", "for a frozen base"),
        ("optimizer", "leave these sections out"),
        ("differs", "gradient_clipping=7.0"),
        ("offloaded optimizer", "zero_optimization's offload_optimizer"),
        ("quantized", "zero_optimization's zero_quantized_weights"),
        ("misspelled", "stage3_max_live_parameter"),
        ("stage", "stage=2: expected stage 3"),
        ("scaler", "bf16.bf16_master_weights_and_grads"),
        ("generate", "call spul.models.partition_layers"),
        ("forward", "call spul.models.partition_layers"),
        ("forward of the base", "call spul.models.partition_layers"),
        ("forward of LoRA", "call spul.models.partition_layers"),
        ("states", "call spul.models.partition_layers"),
        ("unpartitioned", "call spul.models.partition_layers"),
    ],
)
def test_what_zero3_cannot_do_is_refused(launch, kind, message):
    for results in launch[1]:
        assert message in results[kind]


def test_settings_of_half_precision_are_refused_by_name_but_for_their_defaults(launch):
    assert launch[1][0]["precision"] == ["fp16.hysteresis", "fp16.misspelled"]


if __name__ == "__main__":
    main(sys.argv[1])
