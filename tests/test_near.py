"""A start near the base: its distance is the KL of its answers, in every kind and at each position."""

import math
import warnings

import pytest
import torch
from helpers import CONFIGS, build, make_collator, make_dataset, rows
from peft import PromptEncoderConfig

from spul import SoftPromptUnlearner
from spul.losses.positions import response_positions
from spul.prompts import NearStart, near
from spul.prompts.starts import start_prompt

P = 5


@pytest.fixture(params=CONFIGS)
def kind(request) -> str:
    return request.param


def distance_of(unlearner, collator):
    batch = collator(list(make_dataset()))
    positions, targets = response_positions(batch["labels"])
    rows = (batch["input_ids"], batch["attention_mask"], positions)
    with torch.no_grad():
        own, base = (
            logits[targets != -100].double().log_softmax(-1)
            for logits in (
                unlearner.response_logits(*rows, prompt_position=batch.get("prompt_position")),
                unlearner.base_logits(*rows),
            )
        )
    return (own.exp() * (own - base)).sum(-1).mean().item()


def near_start(collator=None, **kwargs):
    return NearStart(make_dataset(), collator or make_collator(), **kwargs)


def unlearner_of(kind, start, seed=3, **kwargs):
    base = build("llama", torch.float64)
    torch.manual_seed(seed)
    return SoftPromptUnlearner(base, CONFIGS[kind](P), start=start, **kwargs)


def test_the_prompt_is_the_draw_with_the_least_kl_of_its_answers(kind, monkeypatch):
    drawn, found = [], []
    distance = near._Rows.distance

    def seen(rows):
        drawn.append({name: t.clone() for name, t in rows.view.prompt_encoder["default"].state_dict().items()})
        found.append(distance(rows))
        return found[-1]

    monkeypatch.setattr(near._Rows, "distance", seen)
    unlearner = unlearner_of(kind, near_start(within=0, num_draws=4, num_rows=1000))
    assert len(set(found)) == 4
    own, nearest = unlearner.prompt_encoder["default"].state_dict(), drawn[found.index(min(found))]
    assert all(torch.equal(own[name], nearest[name]) for name in own)
    assert distance_of(unlearner.eval(), make_collator()) == pytest.approx(min(found), rel=1e-4)


def test_the_first_draw_within_the_bound_is_taken(monkeypatch):
    found = [0.9, 0.5, 0.3, 0.1]
    monkeypatch.setattr(near._Rows, "distance", lambda rows: found.pop(0))
    unlearner_of("prompt_tuning", near_start(within=0.3))
    assert found == [0.1]


def test_a_draw_without_a_finite_distance_gives_way_to_others(monkeypatch):
    found, drawn = [math.nan, 0.5, math.nan, 0.4, 0.6], []

    def distance(rows):
        drawn.append(rows.view.prompt_encoder["default"].embedding.weight.clone())
        return found[len(drawn) - 1]

    monkeypatch.setattr(near._Rows, "distance", distance)
    unlearner = unlearner_of("prompt_tuning", near_start(num_draws=5))
    assert torch.equal(unlearner.prompt_encoder["default"].embedding.weight, drawn[3])


def test_dropout_of_the_prompts_encoder_is_off_while_it_is_measured():
    torch.manual_seed(0)
    config = PromptEncoderConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=P,
        encoder_hidden_size=8,
        encoder_reparameterization_type="LSTM",
        encoder_dropout=0.9,
    )
    unlearner = SoftPromptUnlearner(build("llama", torch.float64), config)
    unlearner.train()
    with torch.no_grad():
        rows = near._Rows(unlearner, "default", near_start())
        assert rows.distance() == rows.distance()
    assert unlearner.prompt_encoder["default"].training


@pytest.mark.parametrize("kind", ["prompt_tuning", "p_tuning"])
def test_at_the_message_the_distance_is_of_prompts_inside_the_rows(kind, monkeypatch):
    collator = make_collator(prompt_position="message", text_field="text")
    rows = make_dataset().map(lambda row: {"text": row["prompt"].split()[-1]})
    found, distance = [], near._Rows.distance
    monkeypatch.setattr(near._Rows, "distance", lambda rows: found.append(distance(rows)) or found[-1])
    start = NearStart(rows, collator, within=0, num_draws=2, num_rows=1000)
    unlearner = unlearner_of(kind, start, prompt_position="message").eval()
    batch = collator(list(rows))
    positions, targets = response_positions(batch["labels"])
    given = (batch["input_ids"], batch["attention_mask"], positions)
    with torch.no_grad():
        own = unlearner.response_logits(*given, prompt_position=batch["prompt_position"])[targets != -100]
        base = unlearner.base_logits(*given)[targets != -100]
    own, base = own.double().log_softmax(-1), base.double().log_softmax(-1)
    expected = (own.exp() * (own - base)).sum(-1).mean().item()
    assert min(found) == pytest.approx(expected, rel=1e-4)


def test_a_second_prompt_is_compared_as_itself_and_the_first_stays():
    unlearner = unlearner_of("prompt_tuning", "random")
    first = unlearner.prompt_encoder["default"].embedding.weight.clone()
    unlearner.add_adapter("second", CONFIGS["prompt_tuning"](P), start=near_start(num_draws=2))
    assert torch.equal(unlearner.prompt_encoder["default"].embedding.weight, first)
    assert not torch.equal(unlearner.prompt_encoder["second"].embedding.weight, first)


def test_draws_of_p_tuning_are_spread_as_pefts_are():
    unlearner, one = unlearner_of("p_tuning", "peft"), []
    for _ in range(40):
        start_prompt(unlearner, "default", near_start(num_draws=1, num_rows=1))
        one.append(unlearner.get_prompt_embedding_to_save("default"))
    theirs = [unlearner_of("p_tuning", "peft", seed).get_prompt_embedding_to_save("default") for seed in range(40)]
    ours, theirs = torch.stack(one), torch.stack(theirs)
    assert ours.std(dim=0).mean().item() == pytest.approx(theirs.std(dim=0).mean().item(), rel=0.1)


def test_a_seed_gives_one_prompt(kind):
    one, again, other = (
        unlearner_of(kind, near_start(num_draws=2), seed).get_prompt_embedding_to_save("default") for seed in (1, 1, 2)
    )
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_a_start_that_stays_far_is_said_with_its_distance(monkeypatch):
    monkeypatch.setattr(near, "FAR", -1.0)
    with pytest.warns(
        UserWarning, match=r"'default' begins \d+\.\d\d nats .* nearest of 2; .* raise num_draws"
    ) as found:
        unlearner_of("prompt_tuning", near_start(within=0, num_draws=2))
    assert found.pop(UserWarning).filename == __file__
    monkeypatch.setattr(near, "FAR", 1e9)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        unlearner_of("prompt_tuning", near_start(num_draws=2))


@pytest.mark.parametrize("more", [{}, {"resample": False}, {"pairs": True}])
def test_draws_of_the_collator_are_those_without_the_start(more):
    collator, rows = make_collator(**more), list(make_dataset())
    start = near_start(collator, num_rows=1000)
    assert start.distance is None
    unlearner_of("prompt_tuning", start)
    assert 0 < start.distance < math.inf
    fresh = make_collator(**more)
    for _ in range(2):
        assert torch.equal(collator(rows)["labels"], fresh(rows)["labels"])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: NearStart(rows("a", 3), make_collator()), ValueError, "dataset has no is_forget"),
        (lambda: NearStart([], make_collator()), TypeError, "dataset is a list"),
        (lambda: NearStart(make_dataset(), None), TypeError, "collator is a NoneType; expected a ForgetRetain"),
        (lambda: near_start(num_draws=0), ValueError, "num_draws=0: expected at least 1"),
        (lambda: near_start(within=-0.1), ValueError, "within=-0.1: expected nats"),
        (lambda: near_start(num_rows=True), TypeError, "num_rows=True: expected an integer"),
    ],
)
def test_what_cannot_be_compared_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
