"""Under DeepSpeed's stages 1 and 2 two processes train, resume and evaluate as one does, or the training is refused.

DeepSpeed is in a folder of its own, which `SPUL_DEEPSPEED` names, as for `test_zero3.py`.
"""

import os
import sys
from pathlib import Path

import pytest
import torch
from helpers import CONFIGS, arguments, assert_same, make_answers, make_collator, make_unlearner, rows, trainable_model
from processes import finish, launched, start_one_of_two
from sharded_steps import METRICS, SGD, lora, refused

from spul import UnlearningLoss, UnlearningTrainer
from spul.models.noise import zero_dropout

FOLDER = os.environ.get("SPUL_DEEPSPEED")
pytestmark = pytest.mark.skipif(not FOLDER, reason="SPUL_DEEPSPEED names no folder with DeepSpeed")

ACCUMULATED = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
TRAINED = [*CONFIGS, "accumulated", "lora", "full"]
RESUMED = ["prompt_tuning", "lora", "full"]


def stage(number):
    """Options of a training by DeepSpeed's engine."""
    sizes = {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto"}
    config = {"zero_optimization": {"stage": number}, "gradient_clipping": "auto", **sizes}
    return {"deepspeed": config | {"zero_allow_untested_optimizer": True}}


def trained(kind, folder, processes, reference="live", loss=None, resume=None, **options):
    """Two steps of eight rows in order (of two processes one has no retain row), saved after each, and an evaluation.

    Returns:
        What trains, the losses, the scores of seven rows and predictions of five.
    """
    if kind == "full":
        model = trainable_model("full").float()
        zero_dropout(model)
    else:
        model = lora() if kind == "lora" else make_unlearner("prompt_tuning" if kind == "accumulated" else kind)
    if loss is None and kind in ("lora", "full"):
        loss = UnlearningLoss(beta=0.0)  # without a reference
    size = {"train_sampling_strategy": "sequential", "per_device_train_batch_size": 8 // processes}
    if kind == "accumulated" and processes == 2:
        size |= ACCUMULATED
    args = arguments(folder, **size, **SGD, **options)
    trainer = UnlearningTrainer(
        *(model, args, make_collator(), make_answers(4, 4), {"jane": rows("jane", 7)}),
        reference=reference,
        loss=loss,
        reference_dir=None,
    )
    trainer.train(resume)
    state = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    scores = {key: value for key, value in trainer.evaluate().items() if key.split("_")[-1] in METRICS}
    return state, losses, scores, torch.as_tensor(trainer.predict(rows("film", 5)).predictions)


def main(folder):
    """All of the work, in one of the processes; its results go to a file."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # plain gloo, which needs no compiler
    state, folder, results = start_one_of_two(), Path(folder), {}
    for number in (1, 2):
        for kind in TRAINED:
            results[kind, number] = trained(kind, folder / f"{kind}-{number}", 2, **stage(number))
        for kind in RESUMED:
            out = folder / f"{kind}-{number}"
            results["resumed", kind, number] = trained(kind, out, 2, resume=f"{out}/checkpoint-1", **stage(number))
        compared = {"loss": UnlearningLoss(), **stage(number)}
        results["compared", number] = refused(lambda given=compared: trained("lora", folder / "no", 2, **given))
        cached = {"reference": "cached", **stage(number)}
        results["cached", number] = refused(lambda given=cached: trained("p_tuning", folder / "no", 2, **given))
    finish(state, results, folder)


@pytest.fixture(scope="module")
def launch(tmp_path_factory):
    """The results of each of the two processes."""
    return launched(__file__, tmp_path_factory.mktemp("deepspeed"), FOLDER)


@pytest.mark.parametrize("kind", TRAINED)
def test_2_processes_under_stages_1_and_2_make_the_steps_of_one(launch, tmp_path, kind):
    state, losses, scores, predictions = trained(kind, tmp_path, 1)
    assert len(losses) == 2
    assert len(scores) == len(METRICS)
    for results in launch:
        for number in (1, 2):
            found, logged, scored, predicted = results[kind, number]
            assert_same(state, found, rtol=0, atol=1e-5)
            assert logged == pytest.approx(losses, abs=1e-5)
            assert scored == pytest.approx(scores, abs=1e-5)
            torch.testing.assert_close(predicted, predictions, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", RESUMED)
def test_a_resumed_training_ends_as_the_one_that_went_on(launch, kind):
    for results in launch:
        for number in (1, 2):
            (state, losses, scores, _), whole = results["resumed", kind, number], results[kind, number]
            assert_same(whole[0], state, rtol=0, atol=0)
            assert losses == pytest.approx(whole[1], abs=1e-6)
            assert scores == pytest.approx(whole[2], abs=1e-6)


@pytest.mark.parametrize("number", [1, 2])
def test_a_reference_that_the_engine_cannot_follow_is_refused(launch, number):
    for results in launch:
        assert "LoRA needs a loss without a reference" in results["compared", number]
        assert "use reference='live' for a prompt" in results["cached", number]


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1])
