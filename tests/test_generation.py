"""Generation under a prompt: as greedy decoding by hand, each row as alone, and what it cannot honor is refused."""

import pytest
import torch
from helpers import CONFIGS, LENGTHS, SHAPE, build_unlearner, longrope_unlearner, make_batch
from plain import continued, row_logits
from transformers import (
    EncoderNoRepeatNGramLogitsProcessor,
    Llama4ForCausalLM,
    Llama4TextConfig,
    NoRepeatNGramLogitsProcessor,
)

from spul import SoftPromptUnlearner
from spul.prompts.pads import RequestPenalty

UNEQUAL, WIDTH = (7, 4, 5), 7
GREEDY = {"do_sample": False, "pad_token_id": 0}


def unequal_rows(side="left"):
    generator = torch.Generator().manual_seed(6)
    rows = [torch.randint(5, 120, (length,), generator=generator) for length in UNEQUAL]
    pads = [(0, WIDTH - n) if side == "right" else (WIDTH - n, 0) for n in UNEQUAL]
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


@pytest.mark.parametrize("size", ["no_repeat_ngram_size", "encoder_no_repeat_ngram_size"])
@pytest.mark.parametrize("num", [1, 2])
@pytest.mark.parametrize("prompted", [True, False])
@pytest.mark.parametrize("prompt_type", ["prompt_tuning", "prefix_tuning"])
def test_pads_are_no_tokens_that_may_not_repeat(prompt_type, prompted, num, size):
    unlearner, steps = build_unlearner("llama", prompt_type), []
    batch = {
        "input_ids": torch.tensor([[0] * 7 + [7, 9], list(range(11, 20))]),
        "attention_mask": torch.tensor([[0] * 7 + [1, 1], [1] * 9]),
        "adapter_names": ["default" if prompted else "__base__"] * 2,
    }
    # A batch is generated as one, so that processors of the caller's own see it.
    new = {"max_new_tokens": 5, size: 2, "sequence_bias": {(7,): 1e4}, "num_beams": num, **GREEDY}
    new |= {"num_return_sequences": num, "logits_processor": [lambda ids, scores: steps.append(len(ids)) or scores]}
    alone = unlearner.generate(batch["input_ids"][:1, 7:], adapter_names=batch["adapter_names"][:1], **new)[:, 2:]
    assert alone[0, :2].tolist() == [7, 7]
    steps.clear()
    assert torch.equal(unlearner.generate(**batch, **new)[:num, 9:], alone)
    assert set(steps) == {2 * num}


@pytest.mark.parametrize("window", [6, 40])
@pytest.mark.parametrize("named", [False, True])
def test_tokens_of_a_request_are_favored_in_the_rows_own_also_where_prompts_stand_as_embeddings(window, named):
    """Rows that may outgrow a window of 6 are generated from embeddings, which name no tokens."""
    unlearner = build_unlearner("mistral", sliding_window=window).eval()
    rows, batch = unequal_rows()
    new = {"max_new_tokens": 6, "min_new_tokens": 6, "encoder_repetition_penalty": 4.0, "eos_token_id": 2, **GREEDY}
    names = ["default", "__base__", "default"] if named else ["default"] * 3
    found = unlearner.generate(**batch, **new, **({"adapter_names": names} if named else {}))[:, WIDTH:].tolist()
    beams = unlearner.generate(**batch, **new, adapter_names=names, num_beams=3, num_return_sequences=3)[:, WIDTH:]
    for row, name, out, own in zip(rows, names, found, beams.split(3), strict=True):

        def favored(ids, row=row, prompted=name == "default"):
            logits = row_logits(unlearner, ids, prompted=prompted)
            of_request = logits[:, row]
            logits[:, row] = torch.where(of_request < 0, of_request / 4, of_request * 4)
            return logits

        assert out == continued(favored, row)
        one = unlearner.generate(row[None], **new, adapter_names=[name], num_beams=3, num_return_sequences=3)
        assert torch.equal(own, one[:, len(row) :])


def test_every_beam_favors_the_tokens_of_its_own_request():
    penalty = RequestPenalty(2.0, torch.tensor([[3, 3], [4, 5]]))
    found = penalty(torch.zeros(4, 1, dtype=torch.long), torch.tensor([[1.0] * 6] * 4))
    assert found.tolist() == [[1, 1, 1, 2, 1, 1]] * 2 + [[1, 1, 1, 1, 2, 2]] * 2


@pytest.mark.parametrize("of_requests", [False, True])
def test_a_processor_of_the_callers_own_is_the_only_one_of_its_kind_and_leaves_the_other(of_requests):
    rows = torch.tensor([[0] * 7 + [7, 9], list(range(11, 20))])
    own = EncoderNoRepeatNGramLogitsProcessor(9, rows) if of_requests else NoRepeatNGramLogitsProcessor(9)
    sizes = {"encoder_no_repeat_ngram_size": 1 if of_requests else 2, "no_repeat_ngram_size": 2 if of_requests else 1}
    new = {"max_new_tokens": 2, "sequence_bias": {(7,): 1e4}, "logits_processor": [own], **sizes, **GREEDY}
    found = build_unlearner("llama").generate(rows, attention_mask=rows.ne(0).long(), **new)
    assert found[0, 9:].tolist() == [7, 7]  # neither in a pad's place nor in the answer before


def test_a_token_that_is_forced_may_repeat_an_ngram():
    _, batch = unequal_rows()
    batch["input_ids"][1, -3:] = torch.tensor([9, 2, 7])
    new = {"max_new_tokens": 2, "no_repeat_ngram_size": 2, "forced_eos_token_id": 2, "sequence_bias": {(9,): 1e4}}
    assert build_unlearner("llama").generate(**batch, **new, **GREEDY)[1, WIDTH:].tolist() == [9, 2]


@pytest.mark.parametrize("prompt_type", CONFIGS)
def test_in_chunked_attention_each_row_is_continued_as_alone(prompt_type):
    shape = {**SHAPE, "intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size_mlp": 48}
    kinds = ["chunked_attention", "full_attention"]
    torch.manual_seed(0)
    base = Llama4ForCausalLM(Llama4TextConfig(**shape, attention_chunk_size=6, layer_types=kinds, moe_layers=[]))
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    unlearner = SoftPromptUnlearner(base.eval(), CONFIGS[prompt_type](4)).eval()
    rows, batch = unequal_rows()
    new = {"max_new_tokens": 8, "min_new_tokens": 8, **GREEDY}
    found = unlearner.generate(**batch, **new)
    for row, out in zip(rows, found, strict=True):
        alone = row[None]
        if prompt_type != "prefix_tuning":
            with torch.no_grad():
                for _ in range(8):
                    logits = concatenated(unlearner, alone)[:, -1]
                    logits[:, 2] = -torch.inf
                    alone = torch.cat([alone, logits.argmax(-1, keepdim=True)], dim=1)
        else:
            alone = unlearner.generate(alone, **new)
        assert out[WIDTH:].tolist() == alone[0, len(row) :].tolist()


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
    with pytest.raises(ValueError, match=f"in groups here, which {next(iter(argument))}.* cannot follow"):
        build_unlearner("mistral", "prefix_tuning").generate(**batch, max_new_tokens=8, **argument)


# ---- longrope: other rotary factors, and a dropped cache, beyond a switch ----


def concatenated(unlearner, ids):
    embeds = torch.cat([unlearner.get_prompt(1), unlearner.word_embeddings(ids)], dim=1)
    return unlearner.get_base_model()(inputs_embeds=embeds, use_cache=False).logits[:, 4:]


@pytest.mark.parametrize("prompt_type", ["prompt_tuning", "p_tuning"])
@pytest.mark.parametrize(("length", "num_new"), [(20, 8), (9, 8), (3, 5)])
def test_rows_on_one_side_of_the_switch_are_continued_as_by_concatenation(prompt_type, length, num_new):
    unlearner = longrope_unlearner(prompt_type)
    ids = torch.randint(5, 120, (1, length), generator=torch.Generator().manual_seed(8))
    found, expected = unlearner.generate(ids, max_new_tokens=num_new, min_new_tokens=num_new, **GREEDY), ids
    with torch.no_grad():
        for _ in range(num_new):
            logits = concatenated(unlearner, expected)[:, -1]
            logits[:, 2] = -torch.inf
            expected = torch.cat([expected, logits.argmax(-1, keepdim=True)], dim=1)
    assert found.tolist() == expected.tolist()


def test_generation_that_would_cross_the_switch_is_refused():
    ids = torch.randint(5, 120, (1, 5))
    with pytest.raises(ValueError, match="changes its rotary factors beyond 12 positions"):
        longrope_unlearner().generate(ids, max_new_tokens=8, **GREEDY)
    with pytest.raises(ValueError, match="drops its cache beyond 12 positions, and a prefix with it"):
        longrope_unlearner("prefix_tuning").generate(ids.repeat(1, 4), max_new_tokens=8, **GREEDY)


@pytest.mark.parametrize("name", ["default", "__base__"])
def test_rows_that_stay_on_one_side_of_the_switch_are_one_batch_whatever_their_lengths(monkeypatch, name):
    unlearner, calls = longrope_unlearner(), []
    base, new = unlearner.get_base_model(), {"max_new_tokens": 3, "min_new_tokens": 3, "eos_token_id": 2, **GREEDY}
    rows = [torch.randint(5, 120, (length,)) for length in (3, 14, 5, 4, 13)]
    ids = torch.stack([torch.nn.functional.pad(row, (14 - len(row), 0)) for row in rows])
    batch = {"input_ids": ids, "attention_mask": ids.ne(0).long()}
    alone = [unlearner.generate(row[None], adapter_names=[name], **new)[0, len(row) :] for row in rows]
    generate = base.generate
    monkeypatch.setattr(base, "generate", lambda ids, **k: calls.append(ids.shape) or generate(ids, **k))
    found = unlearner.generate(**batch, adapter_names=[name] * 5, **new)
    assert torch.equal(found, torch.cat([ids, torch.stack(alone)], dim=1))
    assert {(3, 5), (2, 14)} <= set(calls)
    assert all(size > 1 for size, _ in calls)  # the others are probes of the base


@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize("length", [13, 6])
def test_losses_and_logits_on_either_side_of_the_switch_are_those_of_concatenation(length, gradient):
    unlearner = longrope_unlearner()
    ids = torch.randint(5, 120, (1, length), generator=torch.Generator().manual_seed(9))
    labels = ids.clone()
    labels[:, :3] = -100
    with torch.set_grad_enabled(gradient):
        expected = concatenated(unlearner, ids)
        out = unlearner(input_ids=ids, labels=labels, is_forget=torch.tensor([True]))
        torch.testing.assert_close(unlearner(input_ids=ids).logits[:, 4:], expected)
        positions, mask = torch.arange(length)[None], torch.ones_like(ids)
        found = unlearner.embedding_logits(unlearner.word_embeddings(ids), mask, positions)
        torch.testing.assert_close(found, expected)
    cross_entropy = torch.nn.functional.cross_entropy(
        expected[0, 2:-1], ids[0, 3:], reduction="sum" if length == 6 else "mean"
    )
    torch.testing.assert_close(out.forget_loss.abs(), cross_entropy)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_generation_of_a_padded_batch_equals_one_by_one(family, prompt_type, checkpointing):
    unlearner = build_unlearner(family, prompt_type)
    with torch.no_grad():
        for parameter in unlearner.prompt_encoder.parameters():
            parameter.mul_(4)  # a prompt loud enough to change the answers of a random model
    if checkpointing:
        unlearner.gradient_checkpointing_enable()
        unlearner.train()
    right = make_batch("right")
    alone = [
        unlearner.generate(ids[None, :length], max_new_tokens=6, do_sample=False)[0, length:].tolist()
        for ids, length in zip(right["input_ids"], LENGTHS, strict=True)
    ]
    for side in ("right", "left"):
        batch = make_batch(side)
        out = unlearner.generate(
            batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=6, do_sample=False
        )
        assert torch.equal(out[:, :12], batch["input_ids"])
        for row, tokens in enumerate(alone):
            assert out[row, 12 : 12 + len(tokens)].tolist() == tokens


@pytest.mark.parametrize("window", [4, 10])
@pytest.mark.parametrize("family", ["gemma3", "mistral"])
def test_generation_across_a_sliding_window_equals_one_by_one(family, window, prompt_type):
    unlearner = build_unlearner(family, prompt_type, sliding_window=window)
    batch = make_batch("left")
    out = unlearner.generate(
        batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=6, do_sample=False
    )
    for row, length in enumerate(LENGTHS):
        ids = batch["input_ids"][row, 12 - length :]
        alone = unlearner.generate(ids[None], max_new_tokens=6, do_sample=False)[0, length:]
        assert out[row, 12 : 12 + len(alone)].tolist() == alone.tolist()


def test_generation_equals_greedy_decoding_by_hand(family, prompt_type):
    unlearner = build_unlearner(family, prompt_type)
    ids = make_batch()["input_ids"][0]
    expected = ids
    for _ in range(5):
        expected = torch.cat([expected, row_logits(unlearner, expected)[-1].argmax()[None]])
    out = unlearner.generate(ids[None], max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert out[0].tolist() == expected.tolist()


def test_beams_and_several_sequences_keep_their_rows(prompt_type):
    unlearner, batch = build_unlearner(prompt_type=prompt_type), make_batch("left")
    mask = batch["attention_mask"]
    out = unlearner.generate(
        batch["input_ids"], attention_mask=mask, max_new_tokens=4, num_beams=3, num_return_sequences=2, do_sample=False
    )
    assert out.shape[0] == 10
    for row, length in enumerate(LENGTHS):
        alone = unlearner.generate(
            batch["input_ids"][row : row + 1, 12 - length :], max_new_tokens=4, num_beams=3, num_return_sequences=2
        )
        for k in range(2):
            assert out[2 * row + k, 12 : 12 + alone.shape[1] - length].tolist() == alone[k, length:].tolist()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"inputs_embeds": torch.zeros(1, 3, 32)}, "takes no inputs_embeds"),
        ({"position_ids": torch.zeros(1, 3)}, "takes no position_ids"),
        ({"use_cache": False}, "leave out use_cache=False"),
        ({"attention_mask": torch.zeros(5, 12)}, "row of zeros only"),
    ],
)
def test_generate_refuses_what_it_cannot_honor(kwargs, message):
    with pytest.raises(ValueError, match=message):
        build_unlearner().generate(make_batch()["input_ids"], **kwargs)
    with pytest.raises(ValueError, match="needs input_ids"):
        build_unlearner().generate(max_new_tokens=3)
    with pytest.raises(ValueError, match="takes no inputs_embeds: pass input_ids"):
        build_unlearner().generate(inputs_embeds=torch.zeros(1, 3, 32))


def test_a_positional_generation_config_counts():
    from transformers import GenerationConfig

    unlearner, batch = build_unlearner(), make_batch()
    config = GenerationConfig(max_new_tokens=3, num_beams=2, num_return_sequences=2, pad_token_id=0, eos_token_id=2)
    out = unlearner.generate(batch["input_ids"], config, attention_mask=batch["attention_mask"])
    assert len(out) == 10


def test_generation_beyond_the_models_positions_raises():
    ids = torch.randint(3, 120, (1, 92))
    with pytest.raises(ValueError, match="leave no room in the model's 96 positions"):
        build_unlearner("gpt2").generate(ids)
