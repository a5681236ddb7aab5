"""The cost of a run is that of the work it did."""

from pathlib import Path

import pytest
import torch
from helpers import CONFIGS, arguments, build, make_collator, make_dataset, make_unlearner, probed
from paper.costs import Meter, PeakMemory

from spul import SoftPromptUnlearner, UnlearningLoss, UnlearningTrainer


def test_passes_are_rows_and_tokens_through_the_decoder(family):
    model = build(family)
    with Meter(model) as meter:
        model(torch.ones(3, 7, dtype=torch.int64))
        model(torch.ones(2, 5, dtype=torch.int64))
    assert (meter.cost.forward_passes, meter.cost.forward_tokens) == (5, 31)
    model(torch.ones(3, 7, dtype=torch.int64))
    assert meter.cost.forward_passes == 5


def test_a_shared_prompt_is_one_row_and_the_reference_is_counted():
    batch = make_collator()([make_dataset(3, 3)[i] for i in range(6)])
    width = batch["input_ids"].shape[1]
    unlearner = SoftPromptUnlearner(build("llama"), CONFIGS["prompt_tuning"](4), loss=UnlearningLoss(beta=0.5))
    with Meter(unlearner) as meter:
        probed(unlearner)  # the meter's hook has the base probed anew
        before = meter.cost.forward_passes, meter.cost.forward_tokens
        unlearner(**batch).loss.backward()
    # The prompt by itself, six rows under it, three retain rows of the frozen model.
    assert meter.cost.forward_passes - before[0] == 1 + 6 + 3
    assert meter.cost.forward_tokens - before[1] == 4 + 6 * width + 3 * width


@pytest.mark.parametrize("prompt_type", CONFIGS)
def test_a_training_run_is_counted_whole(tmp_path, prompt_type):
    unlearner = make_unlearner(prompt_type, loss=UnlearningLoss(beta=0.0))
    args = arguments(tmp_path, max_steps=3, per_device_train_batch_size=8)
    trainer = UnlearningTrainer(unlearner, args, make_collator(), make_dataset(12, 12))
    with Meter(unlearner) as meter:
        if prompt_type != "prefix_tuning":
            probed(unlearner)
        before = meter.cost.forward_passes
        trainer.train()
    assert meter.cost.forward_passes - before == 3 * (8 + (prompt_type != "prefix_tuning"))
    assert meter.cost.trainable_parameters == sum(p.numel() for p in unlearner.prompt_encoder.parameters())
    assert meter.cost.seconds > 0
    assert set(meter.cost.to_dict()) == {
        "trainable_parameters",
        "seconds",
        "peak_memory_bytes",
        "forward_passes",
        "forward_tokens",
    }


def test_the_hook_is_gone_even_after_an_error():
    model = build("llama")
    with pytest.raises(RuntimeError, match="stop"), Meter(model) as meter:
        raise RuntimeError("stop")
    model(torch.ones(1, 4, dtype=torch.int64))
    assert meter.cost.forward_passes == 0


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="resident memory is told by Linux only")
def test_peak_memory_sees_what_was_freed_before_the_end():
    with PeakMemory("cpu") as peak:
        block = torch.ones(64 * 2**20 // 4)
        del block
    assert 60e6 < peak.bytes < 100e6
    with PeakMemory("cpu") as peak:
        pass
    assert peak.bytes < 10e6
