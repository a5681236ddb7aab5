"""Steps of training that two processes make over a sharded base, and that one makes over the whole one."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from helpers import (
    arguments,
    assert_same,
    make_answers,
    make_collator,
    make_unlearner,
    prompt_state,
    rows,
    scored,
    trainable_model,
)
from small_evaluations import measured

import spul.training.reference_parts
from spul import SoftPromptUnlearner, UnlearningLoss, UnlearningTrainer
from spul.models.compat import is_sharded
from spul.models.noise import zero_dropout
from spul.records.digests import fingerprint

FSDP = {"fsdp": True, "fsdp_config": {"version": 2}}
SGD = {"optim": "sgd", "max_grad_norm": 0.5, "weight_decay": 0.0, "max_steps": 2, "save_strategy": "steps"}
SGD |= {"save_steps": 1, "learning_rate": 0.1}
METRICS = ("accuracy", "loss", "f1", "generic")


def steps(model, folder, processes, resume=None, loss=None, as_on_gpus=False, collator=None, **options):
    """Two steps of 18 rows with a cached reference, saved after each; an evaluation of seven rows."""
    size = {"per_device_train_batch_size": 18 // processes, **SGD, **options}
    args = arguments(folder / "out", **size)
    if as_on_gpus:  # the state that accelerate has there; on CPUs it knows no FSDP
        state = Accelerator(cpu=True).state
        state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
        state.distributed_type = DistributedType.FSDP
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spul.training.reference_parts, "MIN_ROWS_PER_PART", 3)
        trainer = UnlearningTrainer(
            model,
            args,
            collator or make_collator(),
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


def uneven_steps(trainable, folder, processes, **options):
    """Steps with a live reference on forget rows and retain rows, in order: of two processes one has no retain row."""
    model = make_unlearner() if trainable == "prompt" else lora()
    in_order = {"train_sampling_strategy": "sequential", "per_device_train_batch_size": 8 // processes}
    trainer = UnlearningTrainer(
        model,
        arguments(folder, **in_order, **SGD | {"save_strategy": "no"}, **options),
        make_collator(),
        make_answers(4, 4),
        reference="live",
        loss=None if trainable == "prompt" else UnlearningLoss(),
    )
    trainer.train()
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


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


def assert_loads(base, saved, found):
    """A prompt saved by `steps` loads onto a base with what it was trained to, and scores as in its training."""
    loaded = SoftPromptUnlearner.from_pretrained(base, saved, is_trainable=True)
    trained = {name.split("prompt_encoder.")[1]: p for name, p in found["state"].items()}
    assert_same(prompt_state(loaded), trained)
    scores = scored(loaded, rows("jane", 7))
    assert scores == pytest.approx({k: found["metrics"][f"eval_jane_{k}"] for k in scores}, abs=1e-5)


def assert_evaluation(one, two):
    """A sharded model is evaluated as a whole one, but for what needs whole weights."""
    assert "sharded" in two["skipped"]["membership by gradient norm"]
    assert two["metrics"] == pytest.approx({key: one["metrics"][key] for key in two["metrics"]}, abs=1e-4)
    assert {key[3] for key in one["metrics"].keys() - two["metrics"].keys()} == {"gradient_norm"}
    assert len(two["metrics"]) > 50
