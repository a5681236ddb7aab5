"""The ordinary forward without gradient: PEFT's logits and loss, by a prompt that passes alone."""

import pytest
import torch
from helpers import CONFIGS, build_unlearner
from plain import assert_as_peft, labeled_batch, peft_forward


@pytest.fixture(params=["prompt_tuning", "p_tuning"])  # prefix tuning needs no pass
def prompt_type(request) -> str:
    return request.param


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_without_gradient_the_forward_gives_pefts_logits_and_loss(family, kind, side):
    unlearner, batch = build_unlearner(family, kind), labeled_batch()
    given = labeled_batch(side)
    with torch.no_grad():
        expected, out = peft_forward(unlearner, **batch), unlearner(**given)
    assert out.logits.shape == expected.logits.shape
    torch.testing.assert_close(out.loss, expected.loss)
    num_virtual = out.logits.shape[1] - batch["input_ids"].shape[1]
    torch.testing.assert_close(out.logits[:, :num_virtual], expected.logits[:, :num_virtual])
    real, plain = given["attention_mask"].bool(), batch["attention_mask"].bool()
    torch.testing.assert_close(out.logits[:, num_virtual:][real], expected.logits[:, num_virtual:][plain])


def test_the_output_has_pefts_fields_in_pefts_order(family, prompt_type):
    unlearner, batch = build_unlearner(family, prompt_type), labeled_batch()
    with torch.no_grad():
        out, expected = unlearner(**batch), peft_forward(unlearner, **batch)
    assert list(out.keys()) == list(expected.keys())
    torch.testing.assert_close(out[0], expected.loss)
    torch.testing.assert_close(out[1], expected.logits)


@pytest.mark.parametrize("gradient", [True, False])
def test_token_types_are_ignored_with_a_warning_as_in_peft(gradient, prompt_type):
    unlearner, batch = build_unlearner("gpt2", prompt_type), labeled_batch()
    types = torch.ones_like(batch["input_ids"])
    with torch.set_grad_enabled(gradient):
        expected = unlearner(**batch).logits
        with pytest.warns(UserWarning, match=r"(?i)token.types?.*ignor") as found:
            torch.testing.assert_close(unlearner(**batch, token_type_ids=types).logits, expected)
        assert gradient or found.pop(UserWarning).filename == __file__  # with a gradient it is PEFT's own
    inputs = {"input_ids": batch["input_ids"][:1, :7], "max_new_tokens": 2, "do_sample": False}
    with pytest.warns(UserWarning, match=r"(?i)token.types?.*ignor"):
        generated = unlearner.generate(**inputs, token_type_ids=types[:1, :7])
    assert generated.tolist() == unlearner.generate(**inputs).tolist()


@pytest.mark.parametrize("window", [3, 8])
def test_a_prompt_longer_than_the_sliding_window_gives_pefts_logits(window, prompt_type):
    assert_as_peft(build_unlearner("gemma3", prompt_type, sliding_window=window), labeled_batch())


@pytest.mark.parametrize(
    "options",
    [
        {"logits_to_keep": 1},
        {"logits_to_keep": 12},
        {"logits_to_keep": 14},
        {"logits_to_keep": torch.tensor([0, 6, 16])},
        {"output_hidden_states": True},
        {"use_cache": False},
        {"return_dict": False},
        {"attention_mask": None},
    ],
)
def test_options_of_the_forward_mean_what_they_mean_in_peft(family, prompt_type, options):
    unlearner, batch = build_unlearner(family, prompt_type), {**labeled_batch(), **options}
    del batch["labels"]
    with torch.no_grad():
        out, expected = unlearner(**batch), peft_forward(unlearner, **batch)
    if "return_dict" in options:
        torch.testing.assert_close(out[0], expected[0])
        return
    torch.testing.assert_close(out.logits, expected.logits)
    assert list(out.keys()) == list(expected.keys())
    assert (out.past_key_values is None) == (expected.past_key_values is None)
    assert (out.hidden_states is None) == (expected.hidden_states is None)
    if out.past_key_values is not None:
        assert out.past_key_values.get_seq_length() == expected.past_key_values.get_seq_length() == 17


@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize("kind", CONFIGS)
def test_states_that_the_config_asks_for_are_those_that_a_call_asks_for(kind, gradient):
    unlearner, batch = build_unlearner("llama", kind), labeled_batch()
    with torch.set_grad_enabled(gradient):
        expected = unlearner(**batch, output_hidden_states=True).hidden_states
        unlearner.get_base_model().config.output_hidden_states = True
        found, none = unlearner(**batch), unlearner(**batch, output_hidden_states=False)
    assert none.hidden_states is None
    torch.testing.assert_close(found.hidden_states, expected)
    torch.testing.assert_close(found.logits, none.logits)


def test_states_that_the_config_asks_for_are_refused_where_rows_are_moved():
    unlearner, left = build_unlearner(), labeled_batch("left")
    names = ["default", "__base__", *["default"] * (len(left["input_ids"]) - 2)]
    with torch.no_grad():
        expected = unlearner(**left), unlearner(**left, adapter_names=names)
        unlearner.get_base_model().config.output_hidden_states = True
        with pytest.raises(ValueError, match="take no output_hidden_states; pad on the right"):
            unlearner(**left)
        with pytest.raises(ValueError, match="found output_hidden_states: leave that out, give it as False where"):
            unlearner(**left, adapter_names=names)
        found = [unlearner(**left, output_hidden_states=False, **one) for one in ({}, {"adapter_names": names})]
    for out, own in zip(found, expected, strict=True):
        assert out.hidden_states is None
        torch.testing.assert_close(out.logits, own.logits)
    assert unlearner(**left, is_forget=torch.ones(len(names), dtype=torch.bool)).loss.isfinite()
