"""Rows of unequal length on sliding-window models: each as alone, and arguments that count rows stay right."""

import pytest
import torch
from helpers import CONFIGS, build_unlearner

LENGTHS, WIDTH = (7, 4, 5), 7
GREEDY = {"do_sample": False, "pad_token_id": 0}


def unequal_rows(side="left"):
    generator = torch.Generator().manual_seed(6)
    rows = [torch.randint(5, 120, (length,), generator=generator) for length in LENGTHS]
    pads = [(0, WIDTH - n) if side == "right" else (WIDTH - n, 0) for n in LENGTHS]
    ids = torch.stack([torch.nn.functional.pad(row, pad) for row, pad in zip(rows, pads, strict=True)])
    return rows, {"input_ids": ids, "attention_mask": ids.ne(0).long()}


@pytest.mark.parametrize("window", [6, 14])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("prompt_type", CONFIGS)
def test_each_row_is_continued_as_alone(prompt_type, side, window):
    unlearner = build_unlearner("mistral", prompt_type, sliding_window=window)
    rows, batch = unequal_rows(side)
    new = {"max_new_tokens": 8, "min_new_tokens": 8, **GREEDY}
    found = unlearner.generate(**batch, **new)
    assert torch.equal(found[:, :WIDTH], batch["input_ids"])
    for row, out in zip(rows, found, strict=True):
        assert out[WIDTH:].tolist() == unlearner.generate(row[None], **new)[0, len(row) :].tolist()


@pytest.mark.parametrize("prompt_type", ["prompt_tuning", "p_tuning"])
def test_arguments_by_row_meet_their_row(prompt_type):
    unlearner = build_unlearner("mistral", prompt_type)
    _, batch = unequal_rows()
    by_row = {"prefix_allowed_tokens_fn": lambda row, seen: [10 + row]}
    found = unlearner.generate(**batch, **by_row, max_new_tokens=3, **GREEDY)
    assert found[:, WIDTH:].tolist() == [[10] * 3, [11] * 3, [12] * 3]
    out = unlearner.generate(**batch, max_new_tokens=3, return_dict_in_generate=True, output_scores=True, **GREEDY)
    assert out.sequences.tolist() == unlearner.generate(**batch, max_new_tokens=3, **GREEDY).tolist()
    assert out.scores[0].shape == (3, 120)


@pytest.mark.parametrize("prompt_type", CONFIGS)
def test_lengths_count_the_columns_of_the_whole_batch(prompt_type):
    unlearner = build_unlearner("mistral", prompt_type)
    _, batch = unequal_rows()
    found = unlearner.generate(**batch, max_length=11, min_length=11, **GREEDY)
    expected = unlearner.generate(**batch, max_new_tokens=4, min_new_tokens=4, **GREEDY)
    assert found.tolist() == expected.tolist()
    with pytest.raises(ValueError, match="max_length=7 leaves nothing to generate after 7 tokens"):
        unlearner.generate(**batch, max_length=7, **GREEDY)


@pytest.mark.parametrize(
    "argument",
    [
        {"prefix_allowed_tokens_fn": lambda row, seen: [10 + row]},
        {"logits_processor": [lambda ids, scores: scores]},
        {"stopping_criteria": [lambda ids, scores: False]},
        {"return_dict_in_generate": True},
    ],
)
def test_under_a_prefix_arguments_of_the_whole_batch_are_refused(argument):
    _, batch = unequal_rows()
    with pytest.raises(ValueError, match=f"in groups, which {next(iter(argument))}.* cannot follow"):
        build_unlearner("mistral", "prefix_tuning").generate(**batch, max_new_tokens=8, **argument)
