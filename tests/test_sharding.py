"""A base sharded over two processes trains, saves, resumes and evaluates as in one. One launch for all of it."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from accelerate.utils.deepspeed import HfDeepSpeedConfig
from helpers import (
    CONFIGS,
    assert_same,
    build,
    longrope_unlearner,
    make_trainer,
    make_unlearner,
)
from processes import finish, launched, start_one_of_two
from sharded_steps import (
    FSDP,
    assert_evaluation,
    assert_loads,
    assert_steps,
    evaluation,
    lora,
    refused,
    steps,
    uneven_steps,
)
from small_evaluations import learned, make_model, measured

import spul.training.reference
import spul.training.sharding
from spul import UnlearningLoss
from spul.models import shard_layers
from spul.models.compat_checkpointing import is_checkpointing, switch_checkpointing
from spul.prompts import row_prompts
from spul.prompts.row_prompts import RowPrompts
from spul.prompts.shared_prefix import shares_states
from spul.training.sharding import check_zero3

CONFIGS_OF_ACCELERATE = Path(__file__).parents[1] / "examples" / "accelerate"


JOINT, CONCATENATED = "joint_logits", "concatenated_logits"
# Of kinds of bases: the way that many short rows take, and the way of one long row beside them.
WAYS = {kind: [JOINT, CONCATENATED] for kind in ("plain", "checkpointed")}
WAYS |= {kind: [CONCATENATED, CONCATENATED] for kind in ("not earned", "lost when checkpointed", "longrope")}


# ---- the work, the same in one process and in each of two ----


def checkpointed(prompt_type, folder):
    """`steps` of a sharded base under gradient checkpointing, and whether it shared the prompt in them."""
    unlearner = make_unlearner(prompt_type)
    found = steps(unlearner, folder, 2, gradient_checkpointing=True, **FSDP)
    assert is_checkpointing(unlearner.get_base_model().train())
    return found | {"shared": shares_states(unlearner, 4, 12)}


def batch_of(process):
    """A batch whose shape depends on the process: many rows of a few tokens, or one of many."""
    torch.manual_seed(process)
    ids = torch.randint(3, 120, ((40, 3), (1, 30))[process])
    return ids, torch.ones_like(ids), torch.full((len(ids), 1), ids.shape[1] - 1)


def step_of(unlearner, process):
    """A step's logits, the prompt's gradient, the way that it took, and how often it passed the base."""
    given = batch_of(process)
    prompts = RowPrompts(unlearner.train(), len(given[0]))
    passes = []
    unlearner.get_base_model().model.register_forward_pre_hook(lambda *_: passes.append(1))
    way = prompts.single_pass(given[0].shape[1])  # which is earned by passes of its own
    passes.clear()
    logits = prompts.response_logits(*given)
    logits.tanh().sum().backward()
    gradient = torch.cat([p.grad.flatten() for p in unlearner.parameters() if p.grad is not None])
    return {"logits": logits.detach(), "gradient": gradient}, None if way is None else way.__name__, len(passes)


def unlearner_of(kind):
    if kind == "longrope":  # positions change beyond 12, which one of the batches exceeds
        return longrope_unlearner().float()
    unlearner = make_unlearner("p_tuning")
    if kind in ("checkpointed", "lost when checkpointed"):
        switch_checkpointing(unlearner.get_base_model(), "enable", {"use_reentrant": False})
    return unlearner


def sharded_step(process, kind):
    """`step_of` over a sharded base, where more tokens are added than a whole one would have."""
    unlearner = unlearner_of(kind)
    shard_layers(unlearner)
    lost = {"not earned": "joins_prompt", "lost when checkpointed": "checkpoints_prefix"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_prompts, "MOST_ADDED_TOKENS", 0)
        if kind in lost:
            patch.setattr(row_prompts, lost[kind], lambda *args, **kwargs: False)
        return step_of(unlearner, process)


def sharded_otherwise():
    """The error of a model that is sharded with its embeddings."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    other = fully_shard(learned(), mesh=init_device_mesh("cpu", (2,)))
    return refused(lambda: measured(other, "sampling"))


def main(folder):
    """All of the work, in one of the processes; its results go to a file."""
    state, folder, results = start_one_of_two(), Path(folder), {}
    for prompt_type in CONFIGS:
        results[prompt_type] = steps(make_unlearner(prompt_type), folder / prompt_type, 2, **FSDP)
        first = folder / prompt_type / "out" / "checkpoint-1"
        resumed = steps(make_unlearner(prompt_type), folder / prompt_type, 2, str(first), **FSDP)
        results[f"resumed {prompt_type}"] = resumed["state"]
        results[f"checkpointed {prompt_type}"] = checkpointed(prompt_type, folder / f"checkpointed-{prompt_type}")
    offload = {"version": 2, "cpu_offload": True, "reshard_after_forward": False}
    results["offloaded"] = steps(make_unlearner(), folder / "offloaded", 2, fsdp=True, fsdp_config=offload)
    accumulated = {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 3, "as_on_gpus": True}
    results["accumulated"] = steps(make_unlearner(), folder / "accumulated", 2, **accumulated)
    results["lora"] = steps(lora(), folder / "lora", 2, loss=UnlearningLoss(), **FSDP)
    for trainable in ("prompt", "lora"):
        results[f"uneven {trainable}"] = uneven_steps(trainable, folder / "uneven", 2, **FSDP)
    for kind in WAYS:
        results["one pass", kind] = sharded_step(state.process_index, kind)
    results["otherwise"] = sharded_otherwise()
    model = make_model("prompt_tuning")
    shard_layers(model)
    results["evaluation"] = evaluation(model, folder / "evaluation")
    finish(state, results, folder)


@pytest.fixture(scope="module")
def launch(tmp_path_factory):
    """The folder of what two processes did, and the results of each of them."""
    folder = tmp_path_factory.mktemp("sharding")
    return folder, launched(__file__, folder)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What `steps` finds in one process, of each type of prompt."""
    return {kind: steps(make_unlearner(kind), tmp_path_factory.mktemp("alone"), 1) for kind in CONFIGS}


# ---- the tests ----


@pytest.mark.parametrize("prompt_type", CONFIGS)
def test_2_processes_with_a_sharded_base_make_the_steps_of_one(launch, alone, prompt_type):
    for results in launch[1]:
        assert_steps(alone[prompt_type], results[prompt_type])
        assert_same(results[prompt_type]["state"], results[f"resumed {prompt_type}"], rtol=0, atol=0)


@pytest.mark.parametrize("prompt_type", CONFIGS)
def test_a_prompt_trained_on_a_sharded_base_loads_onto_a_whole_one(launch, prompt_type):
    folder, results = launch
    saved = folder / prompt_type / "out" / "checkpoint-2"
    assert sorted(path.name for path in saved.iterdir() if "fsdp" in path.name) == []
    assert_loads(build("llama"), saved, results[0][prompt_type])


@pytest.mark.parametrize("kind", ["offloaded", "accumulated"])
def test_offloaded_shards_and_accumulated_batches_make_the_steps_of_one(launch, alone, kind):
    for results in launch[1]:
        assert_steps(alone["prompt_tuning"], results[kind])


@pytest.mark.parametrize("prompt_type", CONFIGS)
def test_a_sharded_base_under_gradient_checkpointing_makes_the_steps_of_one(launch, alone, prompt_type):
    for results in launch[1]:
        found = results[f"checkpointed {prompt_type}"]
        assert_steps(alone[prompt_type], found)
        assert found["shared"]


@pytest.mark.parametrize("kind", WAYS)
def test_each_process_passes_a_sharded_base_once_whatever_the_shape_of_its_batch(launch, kind):
    """A second pass would gather its layers again, and one process alone that took it would wait for ever."""
    ways = []
    for process, results in enumerate(launch[1]):
        found, way, passes = results["one pass", kind]
        expected, whole, _ = step_of(unlearner_of(kind), process)
        assert whole is None
        assert passes == 1
        for name, each in expected.items():  # gradients of hundreds: small entries are as exact as the largest
            largest = each.abs().max()
            torch.testing.assert_close(found[name] / largest, each / largest, rtol=0, atol=1e-5)
        ways.append(way)
    assert ways == WAYS[kind]


def test_lora_beside_a_sharded_base_makes_the_steps_of_one(launch, tmp_path):
    one = steps(lora(), tmp_path, 1, loss=UnlearningLoss())
    for results in launch[1]:
        assert_steps(one, results["lora"])


@pytest.mark.parametrize("trainable", ["prompt", "lora"])
def test_a_process_without_retain_rows_gathers_layers_for_the_live_reference_of_the_other(launch, tmp_path, trainable):
    """It would go on alone, and both would wait for ever."""
    one = uneven_steps(trainable, tmp_path, 1)
    for results in launch[1]:
        assert_same(one, results[f"uneven {trainable}"], rtol=0, atol=1e-5)


def test_a_sharded_model_is_evaluated_as_a_whole_one(launch, tmp_path):
    one = evaluation(make_model("prompt_tuning"), tmp_path)
    for results in launch[1]:
        assert_evaluation(one, results["evaluation"])


def test_a_model_that_is_sharded_with_its_embeddings_is_refused(launch):
    for results in launch[1]:
        assert "shard_layers" in results["otherwise"]


@pytest.fixture
def plugin(monkeypatch):
    """Settings of FSDP in one process, where accelerate makes none."""
    settings = {"fsdp_version": 2, "activation_checkpointing": False, "reshard_after_forward": True}
    found = SimpleNamespace(**settings, cpu_offload=False)
    monkeypatch.setattr(spul.training.sharding, "fsdp_plugin", lambda *_: found)
    return found


def test_settings_of_fsdp_that_cannot_be_honored_are_refused(tmp_path, plugin):
    with pytest.raises(ValueError, match="bf16_full_eval"):
        make_trainer(tmp_path, bf16_full_eval=True)
    unlearner = make_unlearner()
    switch_checkpointing(unlearner.get_base_model(), "enable", {"use_reentrant": True})
    with pytest.raises(ValueError, match="'use_reentrant': False"):
        make_trainer(tmp_path, unlearner=unlearner)
    plugin.activation_checkpointing = True
    with pytest.raises(ValueError, match="gradient_checkpointing=True"):
        make_trainer(tmp_path)
    plugin.fsdp_version = 1
    with pytest.raises(ValueError, match="fsdp_version: 2"):
        make_trainer(tmp_path)


@pytest.mark.parametrize(
    ("content", "is_frozen", "message"),
    [
        ({}, False, "for a frozen base"),
        ({"optimizer": {"type": "AdamW"}}, True, "optimizer: .* leave these sections out"),
        ({"scheduler": {"type": "WarmupLR"}}, True, "scheduler: .* leave these sections out"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, True, "offload_optimizer"),
        ({"zero_optimization": {"offload_optimizer": {"device": "none"}}}, True, None),
        ({"activation_checkpointing": {"cpu_checkpointing": True}}, True, "activation_checkpointing"),
        ({"flops_profiler": {"enabled": True}}, True, "flops_profiler"),
        (
            {"wall_clock_breakdown": True, "data_types": {"grad_accum_dtype": "fp32"}},
            True,
            "wall_clock_.*, data_types",
        ),
        ({"wall_clock_breakdown": False, "flops_profiler": {"enabled": False, "detailed": True}}, True, None),
        ({"fp16": {"enabled": False, "loss_scale": 128}, "steps_per_print": 2000}, True, None),
    ],
)
def test_what_a_config_of_deepspeed_says_of_its_engine_is_refused(content, is_frozen, message):
    config = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}} | content)
    config.mismatches = []
    if message is None:
        check_zero3(config, is_frozen)
        return
    with pytest.raises(ValueError, match=message):
        check_zero3(config, is_frozen)


@pytest.mark.parametrize(
    ("name", "processes", "machines"),
    [("one-gpu", 1, 1), ("eight-gpus", 8, 1), ("eight-gpus-zero3", 8, 1), ("two-nodes", 16, 2)],
)
def test_a_config_of_accelerate_loads(name, processes, machines):
    config = load_config_from_file(str(CONFIGS_OF_ACCELERATE / f"{name}.yaml"))
    assert (config.num_processes, config.num_machines) == (processes, machines)
    if name.endswith("zero3"):
        assert config.distributed_type == DistributedType.DEEPSPEED
        assert config.deepspeed_config["zero_stage"] == 3
    elif processes > 1:
        assert config.distributed_type == DistributedType.FSDP
        assert config.fsdp_config["fsdp_version"] == 2
    else:
        assert not config.fsdp_config


if __name__ == "__main__":
    main(sys.argv[1])
