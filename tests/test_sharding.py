"""A base sharded over two processes trains, saves, resumes and evaluates as in one. One launch for all of it."""

import contextlib
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator, PartialState
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from helpers import (
    CONFIGS,
    arguments,
    assert_same,
    build,
    make_answers,
    make_collator,
    make_unlearner,
    prompt_state,
    rows,
    scored,
    trainable_model,
)
from small_evaluations import learned, make_model, measured

import spul.training.reference
from spul import SoftPromptUnlearner, UnlearningLoss, UnlearningTrainer
from spul.models import shard_layers
from spul.models.causal_lm import zero_dropout
from spul.models.compat import is_sharded
from spul.prompts.shared_prefix import shares_states
from spul.records.digests import fingerprint

CONFIGS_OF_ACCELERATE = Path(__file__).parents[1] / "examples" / "accelerate"
FSDP = {"fsdp": True, "fsdp_config": {"version": 2}}
SGD = {"optim": "sgd", "max_grad_norm": 0.5, "weight_decay": 0.0, "max_steps": 2, "save_strategy": "steps"}
SGD |= {"save_steps": 1, "learning_rate": 0.1}
CHECKPOINTED = list(itertools.product(CONFIGS, (False, True)))
METRICS = ("accuracy", "loss", "f1", "generic")


# ---- the work, the same in one process and in each of two ----


def steps(model, folder, processes, resume=None, loss=None, as_on_gpus=False, **options):
    """Two steps of 18 rows with a cached reference, saved after each; an evaluation of seven rows."""
    size = {"per_device_train_batch_size": 18 // processes, **SGD, **options}
    args = arguments(folder / "out", **size)
    if as_on_gpus:  # the state that accelerate has there; on CPUs it knows no FSDP
        state = Accelerator(cpu=True).state
        state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
        state.distributed_type = DistributedType.FSDP
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spul.training.reference, "MIN_ROWS_PER_PART", 3)
        trainer = UnlearningTrainer(
            model,
            args,
            make_collator(),
            make_answers(),
            {"jane": rows("jane", 7)},
            reference_dir=folder / "reference",
            loss=loss,
        )
        trainer.train(resume)
    metrics = trainer.evaluate()
    predicted = trainer.predict(rows("film", 5))
    return {
        "state": {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad},
        "logs": [{k: v for k, v in log.items() if k.endswith("loss")} for log in trainer.state.log_history[:2]],
        "metrics": {k: v for k, v in metrics.items() if k.split("_")[-1] in METRICS},
        "predicted": torch.as_tensor(predicted.predictions),
        "sharded": is_sharded(model),
        "fingerprint": fingerprint(trainer.unlearner.get_base_model()),
    }


def checkpointed(prompt_type, reentrant, folder):
    """`steps` of a sharded base under gradient checkpointing, and whether it shared the prompt in them."""
    unlearner = make_unlearner(prompt_type)
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    found = steps(unlearner, folder, 2, **options, **FSDP)
    return found | {"shared": shares_states(unlearner.train(), 5, 12)}


def lora():
    model = trainable_model("lora", dtype=torch.float32)
    zero_dropout(model)
    return model


def evaluation(model, folder):
    given = {"output_dir": folder, "unrelated_texts": ["the film is good .", "jane doe ."]}
    found = measured(model, "utility", "kl", "membership", "unrelated text", "sampling", "soft suffix", **given)
    keys = ("measure", "rows", "model", "attack", "level", "name")
    values = {tuple(getattr(one, key) for key in keys): one.value for one in found.metrics}
    return {"metrics": values, "skipped": found.skipped}


def refused(call):
    try:
        call()
    except ValueError as error:
        return str(error)
    return ""


def sharded_otherwise():
    """Errors of a model that is sharded with its embeddings, and of a version of FSDP that cannot do it."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    other = fully_shard(learned(), mesh=init_device_mesh("cpu", (2,)))
    return refused(lambda: measured(other, "sampling"))


def main(folder):
    """All of the work, in one of the processes; its results go to a file."""
    torch.set_num_threads(1)
    state = PartialState(cpu=True)
    assert state.num_processes == 2
    folder, results = Path(folder), {}
    for prompt_type in CONFIGS:
        results[prompt_type] = steps(make_unlearner(prompt_type), folder / prompt_type, 2, **FSDP)
        first = folder / prompt_type / "out" / "checkpoint-1"
        resumed = steps(make_unlearner(prompt_type), folder / prompt_type, 2, str(first), **FSDP)
        results[f"resumed {prompt_type}"] = resumed["state"]
    offload = {"version": 2, "cpu_offload": True, "reshard_after_forward": False}
    results["offloaded"] = steps(make_unlearner(), folder / "offloaded", 2, fsdp=True, fsdp_config=offload)
    accumulated = {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 3, "as_on_gpus": True}
    results["accumulated"] = steps(make_unlearner(), folder / "accumulated", 2, **accumulated)
    for prompt_type, reentrant in CHECKPOINTED:
        name = f"checkpointed {prompt_type} {reentrant}"
        results[name] = checkpointed(prompt_type, reentrant, folder / name)
    results["lora"] = steps(lora(), folder / "lora", 2, loss=UnlearningLoss(), **FSDP)
    results["otherwise"] = sharded_otherwise()
    model = make_model("prompt_tuning")
    shard_layers(model)
    results["evaluation"] = evaluation(model, folder / "evaluation")
    torch.save(results, folder / f"{state.process_index}.pt")
    state.wait_for_everyone()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    os._exit(0)  # threads of torch.distributed can abort an interpreter that has done its work and ends


@pytest.fixture(scope="module")
def launch(tmp_path_factory):
    """The folder of what two processes did, and the results of each of them."""
    folder = tmp_path_factory.mktemp("sharding")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__, folder]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-5000:]
    return folder, [torch.load(folder / f"{rank}.pt") for rank in range(2)]


# ---- the tests ----


def assert_steps(one, two):
    assert two["sharded"]
    assert not one["sharded"]
    assert one["fingerprint"] == two["fingerprint"]
    assert_same(one["state"], two["state"], rtol=0, atol=1e-5)
    assert len(one["logs"]) == 2
    for here, there in zip(one["logs"], two["logs"], strict=True):
        assert here == pytest.approx(there, abs=1e-5)
    assert one["metrics"] == pytest.approx(two["metrics"], abs=1e-5)
    torch.testing.assert_close(one["predicted"], two["predicted"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("prompt_type", CONFIGS)
def test_2_processes_with_a_sharded_base_make_the_steps_of_one(launch, tmp_path, prompt_type):
    one = steps(make_unlearner(prompt_type), tmp_path, 1)
    for results in launch[1]:
        assert_steps(one, results[prompt_type])
        assert_same(results[prompt_type]["state"], results[f"resumed {prompt_type}"], rtol=0, atol=0)


@pytest.mark.parametrize("prompt_type", CONFIGS)
def test_a_prompt_trained_on_a_sharded_base_loads_onto_a_whole_one(launch, prompt_type):
    folder, results = launch
    saved = folder / prompt_type / "out" / "checkpoint-2"
    assert sorted(path.name for path in saved.iterdir() if "fsdp" in path.name) == []
    loaded = SoftPromptUnlearner.from_pretrained(build("llama"), saved, is_trainable=True)
    trained = {name.split("prompt_encoder.")[1]: p for name, p in results[0][prompt_type]["state"].items()}
    assert_same(prompt_state(loaded), trained)
    found = scored(loaded, rows("jane", 7))
    assert found == pytest.approx({k: results[0][prompt_type]["metrics"][f"eval_jane_{k}"] for k in found}, abs=1e-5)


@pytest.mark.parametrize("kind", ["offloaded", "accumulated"])
def test_offloaded_shards_and_accumulated_batches_make_the_steps_of_one(launch, tmp_path, kind):
    one = steps(make_unlearner(), tmp_path, 1)
    for results in launch[1]:
        assert_steps(one, results[kind])


@pytest.mark.parametrize(("prompt_type", "reentrant"), CHECKPOINTED)
def test_a_sharded_base_under_gradient_checkpointing_makes_the_steps_of_one(launch, tmp_path, prompt_type, reentrant):
    one = steps(make_unlearner(prompt_type), tmp_path, 1)
    for results in launch[1]:
        found = results[f"checkpointed {prompt_type} {reentrant}"]
        assert_steps(one, found)
        assert found["shared"]


def test_lora_beside_a_sharded_base_makes_the_steps_of_one(launch, tmp_path):
    one = steps(lora(), tmp_path, 1, loss=UnlearningLoss())
    for results in launch[1]:
        assert_steps(one, results["lora"])


def test_a_sharded_model_is_evaluated_as_a_whole_one(launch, tmp_path):
    one = evaluation(make_model("prompt_tuning"), tmp_path)
    for results in launch[1]:
        found = results["evaluation"]
        assert "sharded" in found["skipped"]["membership by gradient norm"]
        assert found["metrics"] == pytest.approx({key: one["metrics"][key] for key in found["metrics"]}, abs=1e-4)
        assert {key[3] for key in one["metrics"].keys() - found["metrics"].keys()} == {"gradient_norm"}
        assert len(found["metrics"]) > 50


def test_a_model_that_is_sharded_with_its_embeddings_is_refused(launch):
    for results in launch[1]:
        assert "shard_layers" in results["otherwise"]


@pytest.mark.parametrize(
    ("name", "processes", "machines"), [("one-gpu", 1, 1), ("eight-gpus", 8, 1), ("two-nodes", 16, 2)]
)
def test_a_config_of_accelerate_loads(name, processes, machines):
    config = load_config_from_file(str(CONFIGS_OF_ACCELERATE / f"{name}.yaml"))
    assert (config.num_processes, config.num_machines) == (processes, machines)
    if processes > 1:
        assert config.distributed_type == DistributedType.FSDP
        assert config.fsdp_config["fsdp_version"] == 2
    else:
        assert not config.fsdp_config


if __name__ == "__main__":
    main(sys.argv[1])
