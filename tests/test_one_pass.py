"""One pass for prompt and rows, as on a GPU: equal to two and to the plain twin, and taken where it is right."""

import pytest
import torch
from cache_droppers import DropsTheCache, ForgetsWhereItIs, RefusesACache, under_prompt
from helpers import (
    CONFIGS,
    FAMILIES,
    ONE_STEP,
    assert_same,
    build,
    build_unlearner,
    longrope_unlearner,
    make_batch,
    make_trainer,
    prompt_gradients,
    prompt_state,
    prompted,
)
from passes import Passes, assert_as_plain, checkpointed
from transformers import LlamaForCausalLM

from spul import SoftPromptUnlearner
from spul.models.compat_cache import _in_front, cache_of_last_row
from spul.models.compat_checkpointing import is_checkpointing
from spul.prompts import one_pass, row_prompts
from spul.prompts.row_prompts import RowPrompts

EMBEDDED = pytest.mark.parametrize("kind", ["prompt_tuning", "p_tuning"])
REENTRANT = pytest.mark.parametrize("reentrant", [False, True])


@pytest.fixture
def waiting(monkeypatch):
    """The CPU counts as a device that waits for launches."""
    monkeypatch.setattr(row_prompts, "waits_for_launches", lambda device: True)


def shapes_of_passes(unlearner, batch):
    """Rows and tokens of each pass of a training step, the reference's last."""
    passes = Passes(unlearner)
    unlearner(**batch)  # earns the way
    passes.shapes.clear()
    unlearner(**batch)
    return passes.shapes


def given_of(batch):
    positions = torch.tensor([[2, 3]]).expand(len(batch["input_ids"]), -1)
    return batch["input_ids"], batch["attention_mask"], positions


def way_of(unlearner, num_rows, num_tokens):
    found = RowPrompts(unlearner, num_rows).single_pass(num_tokens)
    return None if found is None else found.__name__


# ---- equal ----


# Fewer and more virtual tokens than the rows have columns, and more than half of the base's positions.
@pytest.mark.parametrize("p", [4, 20, 60])
@pytest.mark.parametrize("family", [*FAMILIES, "mistral"])
def test_one_pass_has_the_logits_and_gradients_of_two(family, p):
    unlearner = prompted(family, "prompt_tuning", p).train()
    ids, mask, positions = given_of(make_batch())
    prompts = RowPrompts(unlearner, len(ids))
    embeds = unlearner.word_embeddings(ids)
    logits = [prompts.shared_logits(ids, mask, positions), prompts.joint_logits(embeds, mask, positions)]
    gradients = [prompt_gradients(unlearner, found.tanh().sum()) for found in logits]
    torch.testing.assert_close(*logits)
    torch.testing.assert_close(*gradients)
    assert all(gradient.abs().max() > 0 for gradient in gradients[0].values())


@EMBEDDED
@pytest.mark.parametrize("family", [*FAMILIES, "mistral"])
@pytest.mark.usefixtures("waiting")
def test_losses_and_gradients_of_a_step_equal_the_plain_twin(family, kind):
    unlearner, batch = build_unlearner(family, kind).train(), make_batch()
    assert shapes_of_passes(unlearner, batch) == [(6, 12), (3, 12)]  # five rows and the prompt
    assert_as_plain(unlearner, batch)


@EMBEDDED
@REENTRANT
@pytest.mark.parametrize("family", [*FAMILIES, "mistral"])
@pytest.mark.usefixtures("waiting")
def test_losses_and_gradients_equal_the_plain_twin_under_gradient_checkpointing(family, kind, reentrant):
    unlearner, batch = checkpointed(build_unlearner(family, kind), reentrant), make_batch()
    assert shapes_of_passes(unlearner, batch) == [(6, 12), (3, 12)]
    assert is_checkpointing(unlearner.get_base_model())
    assert_as_plain(unlearner, batch)


@pytest.mark.parametrize("window", [3, 6])
@pytest.mark.parametrize("family", ["gemma3", "mistral"])
@pytest.mark.usefixtures("waiting")
def test_a_prompt_longer_than_the_sliding_window_equals_the_plain_twin(family, window):
    unlearner, batch = build_unlearner(family, p=8, sliding_window=window).train(), make_batch()
    assert shapes_of_passes(unlearner, batch)[0] == (6, 12)
    assert_as_plain(unlearner, batch)


@pytest.mark.usefixtures("waiting")
def test_beyond_the_switch_of_longrope_there_is_no_such_pass():
    unlearner = longrope_unlearner().train()  # 4 virtual tokens; a switch at 12
    assert [way_of(unlearner, 32, num_tokens) for num_tokens in (8, 9)] == ["joint_logits", None]


def test_no_pad_has_a_position_beyond_those_of_prompt_and_rows():
    unlearner, seen, mask = prompted(p=40), [], torch.ones(2, 8, dtype=torch.long)
    base = unlearner.get_base_model()
    base.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True)
    RowPrompts(unlearner, 2).joint_logits(torch.zeros(2, 8, 32, dtype=torch.float64), mask, mask)
    row, prompts = seen[0][0], seen[0][2]
    assert torch.equal(row, torch.arange(40, 80).clamp(max=47))
    assert torch.equal(prompts, torch.arange(40))


@EMBEDDED
def test_a_trainer_ends_with_the_prompt_that_two_passes_train(kind, tmp_path, monkeypatch):
    states = []
    for waits in (False, True):
        monkeypatch.setattr(row_prompts, "waits_for_launches", lambda device, waits=waits: waits)
        unlearner = build_unlearner("llama", kind)
        before = prompt_state(unlearner)
        make_trainer(tmp_path / str(waits), unlearner=unlearner, **ONE_STEP).train()
        states.append(prompt_state(unlearner))
    assert_same(*states)
    assert any(not torch.equal(states[0][name], before[name]) for name in before)


def test_the_gradient_of_the_last_rows_keys_equals_that_of_autograd():
    torch.manual_seed(0)
    states = torch.randn(3, 2, 6, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: _in_front(x, 4), states)
    plain = torch.cat([states[-1:, :, :4].expand(3, -1, -1, -1), states], dim=2)
    assert torch.equal(_in_front(states, 4), plain)


def test_the_cache_holds_no_tensor():
    cache = cache_of_last_row(build("llama"), 3)
    keys, values = cache.update(torch.ones(2, 2, 5, 8), torch.zeros(2, 2, 5, 8), 0)
    assert keys.shape == values.shape == (2, 2, 8, 8)
    assert cache.get_seq_length() == 3
    assert not any(torch.is_tensor(value) for layer in cache.layers for value in vars(layer).values())


# ---- chosen ----


def test_a_cpu_runs_the_prompt_in_a_pass_of_its_own():
    unlearner, batch = build_unlearner("llama").train(), make_batch()
    assert shapes_of_passes(unlearner, batch) == [(1, 5), (5, 12), (3, 12)]
    assert not one_pass.waits_for_launches(torch.device("cpu"))
    assert one_pass.waits_for_launches(torch.device("cuda", 1))


@pytest.mark.usefixtures("waiting")
def test_the_way_that_adds_the_fewest_tokens_is_taken():
    unlearner = build_unlearner("llama", p=5).train()
    assert way_of(unlearner, 32, 12) == "joint_logits"  # a row of 12, in place of 5 tokens in each of 32
    assert way_of(unlearner, 2, 40) == "concatenated_logits"
    assert way_of(unlearner, 1, 5) == "concatenated_logits"
    assert way_of(unlearner, one_pass.MOST_ADDED_TOKENS, 90) == "joint_logits"
    assert way_of(unlearner, 1, one_pass.MOST_ADDED_TOKENS + 1) == "concatenated_logits"
    assert way_of(unlearner, one_pass.MOST_ADDED_TOKENS, one_pass.MOST_ADDED_TOKENS + 1) is None


@pytest.mark.parametrize(("num_rows", "num_tokens", "p", "added"), [(32, 46, 30, 46), (2, 10, 30, 70), (1, 3, 3, 3)])
def test_the_prompts_row_adds_itself_and_the_pads_that_it_makes(num_rows, num_tokens, p, added):
    assert one_pass.tokens_of_prompts_row(num_rows, num_tokens, p) == added


@pytest.mark.usefixtures("waiting")
def test_without_gradients_inside_rows_and_under_several_prompts_there_is_no_such_pass():
    unlearner = build_unlearner("llama").eval()
    with torch.no_grad():
        assert way_of(unlearner, 32, 12) is None
    prefix = build_unlearner("llama", "prefix_tuning")
    assert way_of(prefix, 32, 12) is None
    unlearner.add_adapter("other", CONFIGS["prompt_tuning"](3))
    assert RowPrompts(unlearner, 2, ["default", "other"]).single_pass(12) is None
    assert RowPrompts(unlearner, 2, ["default", "__base__"]).single_pass(12) is None
    inside = SoftPromptUnlearner(build("llama"), CONFIGS["prompt_tuning"](4), prompt_position="message")
    before = torch.zeros(32, dtype=torch.long)
    assert RowPrompts(inside, 32, prompt_position=before).single_pass(12) is None


class TakesNoPositions(LlamaForCausalLM):
    """Counts positions from zero where they are given, as they are for a prompt that is a row of the batch alone."""

    def forward(self, *args, **kwargs):
        if kwargs.get("position_ids") is not None:
            kwargs["position_ids"] = torch.arange(kwargs["position_ids"].shape[1]).expand_as(kwargs["position_ids"])
        return super().forward(*args, **kwargs)


@pytest.mark.parametrize("base_class", [DropsTheCache, ForgetsWhereItIs, RefusesACache, TakesNoPositions])
@pytest.mark.usefixtures("waiting")
def test_a_base_that_computes_otherwise_behind_the_last_rows_keys_is_run_another_way(base_class):
    unlearner, batch = under_prompt(base_class).train(), make_batch()
    assert way_of(unlearner, 5, 12) is None
    assert_as_plain(unlearner, batch)


@pytest.mark.usefixtures("waiting")
def test_a_compiled_base_has_two_passes():
    unlearner = build_unlearner("llama").train()
    unlearner.get_base_model().model.layers[0].compile(backend="eager")
    assert way_of(unlearner, 5, 12) is None
