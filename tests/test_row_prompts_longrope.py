"""Rows with prompts of their own on both sides of longrope's switch: each is computed as it is alone."""

import pytest
import torch
from helpers import CONFIGS, longrope_unlearner, make_tokenizer
from plain import by_hand, continued, plain_row

from spul.gates import GatedUnlearner
from spul.prompts import row_prompts

GREEDY = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "eos_token_id": 2, "pad_token_id": 0}


def test_beyond_the_switch_of_longrope_prompts_are_concatenated():
    unlearner = longrope_unlearner()
    unlearner.add_adapter("long", CONFIGS["prompt_tuning"](9))
    unlearner.double().eval()
    ids = torch.randint(5, 120, (3, 13))
    names = ["long", "default", "__base__"]
    with torch.no_grad():
        out = unlearner(ids, adapter_names=names)
    for name, row, logits in zip(names, ids, out.logits, strict=True):
        torch.testing.assert_close(logits, plain_row(unlearner, name, row))
    found = unlearner.generate(ids, adapter_names=names, **GREEDY)
    for name, row, answer in zip(names, ids, found, strict=True):
        assert answer[13:].tolist() == by_hand(unlearner, name, row)


def straddling(prompt_type="prompt_tuning", side="right"):
    """Prompts of 4, 2 and 9 virtual tokens on a base with a switch at 12, and rows on both sides of it."""
    unlearner = longrope_unlearner(prompt_type)
    for name, p in (("short", 2), ("long", 9)):
        unlearner.add_adapter(name, CONFIGS[prompt_type](p))
    torch.manual_seed(4)
    # In turn: 12, 13, 8, 13, 4, 12, 11 and 20 positions with the prompt; together 29.
    named = [("long", 3), ("long", 4), ("default", 4), ("short", 11), ("__base__", 4), ("__base__", 12)]
    named += [("long", 2), ("short", 18)]
    rows = [torch.randint(5, 120, (num,)) for _, num in named]
    ids, mask = torch.zeros(2, len(rows), 20, dtype=torch.long)
    for i, row in enumerate(rows):
        start = 0 if side == "right" else 20 - len(row)
        ids[i, start : start + len(row)], mask[i, start : start + len(row)] = row, 1
    return unlearner.double().eval(), [name for name, _ in named], rows, {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("prompt_type", CONFIGS)
def test_rows_of_several_prompts_on_both_sides_of_the_switch_of_longrope_have_the_logits_of_each_alone(
    prompt_type, side
):
    unlearner, names, rows, batch = straddling(prompt_type, side)
    with torch.no_grad():
        logits = unlearner(**batch, adapter_names=names).logits
        expected = [plain_row(unlearner, name, row) for name, row in zip(names, rows, strict=True)]
    for own, mask, alone in zip(logits, batch["attention_mask"], expected, strict=True):
        torch.testing.assert_close(own[mask.bool()], alone)


@pytest.mark.parametrize("prompt_type", CONFIGS)
def test_responses_on_both_sides_of_the_switch_of_longrope_have_the_logits_and_gradients_of_each_row(prompt_type):
    unlearner, names, rows, batch = straddling(prompt_type)
    last = torch.tensor([[len(row) - 2, len(row) - 1] for row in rows])
    found = unlearner.response_logits(**batch, positions=last, adapter_names=names)
    alone = torch.stack([plain_row(unlearner, name, row)[-2:] for name, row in zip(names, rows, strict=True)])
    torch.testing.assert_close(found, alone)
    weights = list(unlearner.prompt_encoder["default"].parameters())
    gradients = [torch.autograd.grad(one.tanh().sum(), weights) for one in (found, alone)]
    torch.testing.assert_close(*gradients)
    one = unlearner.response_logits(**batch, positions=last)
    with torch.no_grad():
        torch.testing.assert_close(one, torch.stack([plain_row(unlearner, "default", row)[-2:] for row in rows]))
        base = unlearner.base_logits(**batch, positions=last)
        torch.testing.assert_close(base, torch.stack([plain_row(unlearner, "__base__", row)[-2:] for row in rows]))
        if prompt_type != "prefix_tuning":
            embeds = unlearner.word_embeddings(batch["input_ids"])
            torch.testing.assert_close(unlearner.embedding_logits(embeds, batch["attention_mask"], last), one)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("prompt_type", ["prompt_tuning", "prefix_tuning"])
def test_rows_on_both_sides_of_the_switch_of_longrope_are_continued_as_alone(prompt_type, side):
    """Where a row under a prompt would cross it, or a prefix be beyond it, nothing is generated."""
    unlearner, names, rows, batch = straddling(prompt_type, side)
    settings = {**GREEDY, "max_new_tokens": 3, "min_new_tokens": 3}
    under_prefix = prompt_type == "prefix_tuning"
    stay = [2, 4, 5] if under_prefix else [1, 2, 3, 4, 5, 7]

    def of(some):
        return {name: column[some] for name, column in batch.items()} | {"adapter_names": [names[i] for i in some]}

    for some in (stay, [4, 5, 5]):  # the last one: rows of the base alone
        found = unlearner.generate(**of(some), **settings)
        assert torch.equal(found[:, :20], batch["input_ids"][some])
        for i, answer in zip(some, found, strict=True):
            by_plain_rows = continued(lambda ids, i=i: plain_row(unlearner, names[i], ids), rows[i], 3)
            assert answer[20:].tolist() == by_plain_rows, names[i]
    refusal = "drops its cache beyond 12 positions" if under_prefix else "changes its rotary factors beyond 12"
    with pytest.raises(ValueError, match=f"{refusal}.* of row 1 are 11 tokens, with new tokens up to 14"):
        unlearner.generate(**of([2, 6]), **settings)
    with pytest.raises(ValueError, match="under different prompts, in groups here, which streamer cannot follow"):
        unlearner.generate(**of(stay), **settings, streamer=object())


def test_through_gates_rows_on_both_sides_of_the_switch_of_longrope_are_those_of_each_alone():
    unlearner, names, rows, batch = straddling()
    longest = max(len(row) for row in rows)
    tokenizer = make_tokenizer()

    def gate(name):
        flagged = [tokenizer.decode(row) for row, own in zip(rows, names, strict=True) if own == name]
        return lambda texts: [text in flagged for text in texts]

    gated = GatedUnlearner(unlearner, tokenizer, {name: gate(name) for name in ("default", "short", "long")})
    assert longest == 18
    assert gated.route([tokenizer.decode(row) for row in rows]) == names
    with torch.no_grad():
        logits = gated(**batch).logits
        for name, row, own in zip(names, rows, logits, strict=True):
            torch.testing.assert_close(own[: len(row)], plain_row(unlearner, name, row))


def test_a_sharded_base_refuses_rows_on_both_sides_of_the_switch_of_longrope_and_takes_those_of_one(monkeypatch):
    monkeypatch.setattr(row_prompts, "is_sharded", lambda base: True)
    unlearner, names, rows, batch = straddling()
    with pytest.raises(ValueError, match="a sharded base takes rows of one side under one prompt"):
        unlearner(**batch, adapter_names=names)
    width = len(rows[2])
    positions, given = torch.tensor([[width - 1]]), {name: column[2:3] for name, column in batch.items()}
    with torch.no_grad():  # 8 positions, and pads up to the 22nd
        found = unlearner.response_logits(**given, positions=positions)
        torch.testing.assert_close(found[0], plain_row(unlearner, "default", rows[2])[-1:])


@pytest.mark.parametrize("side", ["right", "left"])
def test_once_all_prompts_are_deleted_rows_on_both_sides_of_the_switch_are_computed_as_alone(side):
    unlearner, names, rows, batch = straddling(side=side)
    for name in list(unlearner.peft_config):
        unlearner.delete_adapter(name)
    base, names, settings = unlearner.get_base_model(), ["__base__"] * len(rows), GREEDY | {"max_new_tokens": 3}
    settings["min_new_tokens"] = 3
    with torch.no_grad():
        logits = unlearner(**batch, adapter_names=names).logits
        for own, mask, row in zip(logits, batch["attention_mask"], rows, strict=True):
            torch.testing.assert_close(own[mask.bool()], base(row[None], use_cache=False).logits[0])
    found = unlearner.generate(**batch, adapter_names=names, **settings)[:, 20:]
    for own, row in zip(found, rows, strict=True):
        assert own.tolist() == base.generate(row[None], **settings)[0, len(row) :].tolist()
    with unlearner.disable_adapter():  # as the base has it
        assert torch.equal(unlearner(**batch, adapter_names=names).logits, base(**batch).logits)
    assert torch.equal(unlearner(**batch).logits, base(**batch).logits)
    with pytest.raises(ValueError, match=r"holds \['default'\], which this model does not have"):
        unlearner.generate(**batch, adapter_names=["default"] * len(rows), **settings)
