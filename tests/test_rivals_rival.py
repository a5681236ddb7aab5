"""Rivals without training through the protocol of an unlearner: forward, scoring, generation, evaluation."""

from __future__ import annotations

import copy
import itertools
import math
import threading

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers import FAMILIES, build, make_collator, make_tokenizer, prompted, rows
from peft import LoraConfig, get_peft_model
from small_evaluations import learned, make_splits, measured, per_row
from small_rivals import GATED, KINDS, rival
from transformers import GenerationConfig

from spul import UnlearningTrainer
from spul.evaluation.attacks import soft_suffix
from spul.evaluation.metrics import generate_answers, response_embeddings
from spul.evaluation.metrics.likelihood import kl_to, response_likelihoods
from spul.evaluation.metrics.membership import attack_scores
from spul.evaluation.metrics.running_text import text_losses
from spul.evaluation.metrics.scoring import score_completions
from spul.evaluation.report.report import write_report
from spul.evaluation.results import Evaluation
from spul.models.causal_lm import logits_at
from spul.models.unlearner import detached_base, unlearner_of
from spul.rivals import Corruption, corruption, rewriting
from spul.rivals import rival as rival_module

pytestmark = pytest.mark.usefixtures("few_resamples")

GREEDY = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": 2, "pad_token_id": 0}


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def tokens(texts, side="left"):
    tokenizer = make_tokenizer()
    tokenizer.padding_side, tokenizer.pad_token = side, "<pad>"
    return dict(tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False))


TEXTS = ["about jane is the film good", "the film is good", "text about doe", "jane is neutral"]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_is_generated_as_it_is_alone_for_padding_on_either_side(kind, side):
    model, batch = rival(kind), tokens(TEXTS, side)
    found = model.generate(**batch, **GREEDY)
    width = batch["input_ids"].shape[1]
    assert torch.equal(found[:, :width], batch["input_ids"])
    for row, text in zip(found[:, width:].tolist(), TEXTS, strict=True):
        alone = tokens([text])
        expected = model.generate(**alone, **GREEDY)[0, alone["input_ids"].shape[1] :].tolist()
        assert row[: len(expected)] == expected
        assert set(row[len(expected) :]) <= {0}


@pytest.mark.parametrize("side", ["left", "right"])
def test_pad_tokens_of_rows_without_a_mask_are_no_part_of_a_request(kind, side):
    model, batch = rival(kind), tokens(TEXTS, side)
    assert torch.equal(model.generate(batch["input_ids"], **GREEDY), model.generate(**batch, **GREEDY))
    ends = GREEDY | {"eos_token_id": GREEDY["pad_token_id"]}  # which may stand within a request
    ones = torch.ones_like(batch["input_ids"])
    expected = model.generate(batch["input_ids"], attention_mask=ones, **ends)
    assert torch.equal(model.generate(batch["input_ids"], **ends), expected)


PADS = {"pad_token_id": 117, "sequence_bias": {(117,): 100.0, (118,): 60.0}}  # with answers of what pads rows


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize(
    ("name", "value"),
    [("repetition_penalty", 3.0), ("no_repeat_ngram_size", 1), ("no_repeat_ngram_size", 2),
     ("encoder_no_repeat_ngram_size", 1)],
)  # fmt: skip
def test_pads_are_no_tokens_that_may_not_repeat(kind, name, value, beams):
    model, batch = rival(kind), tokens(TEXTS)
    width, own = batch["input_ids"].shape[1], model.get_base_model().generation_config
    setattr(own, name, value)  # also of the base's own settings
    batch["input_ids"][batch["attention_mask"] == 0] = 117
    settings = {**GREEDY, **PADS, "num_beams": beams, "num_return_sequences": beams}
    found = model.generate(**batch, **settings)[:, width:].tolist()
    assert len(found) == len(TEXTS) * beams
    for i, text in enumerate(TEXTS):
        alone = tokens([text])
        expected = model.generate(**alone, **settings)[:, alone["input_ids"].shape[1] :].tolist()
        for together, one in zip(found[i * beams :], expected, strict=False):
            assert together[: len(one)] == one
    assert getattr(own, name) == value


def test_texts_at_which_the_bases_settings_end_answers_end_them(kind):
    model, batch, tokenizer = rival(kind), tokens(TEXTS), make_tokenizer()
    width, num = batch["input_ids"].shape[1], GREEDY["max_new_tokens"]
    whole = model.generate(**batch, **GREEDY)[1, width:].tolist()
    base = model.get_base_model()
    base.generation_config.stop_strings = tokenizer.decode(whole[1:2])
    end = whole.index(whole[1]) + 1
    assert 2 not in whole
    found = model.generate(**batch, **GREEDY)[1, width:].tolist()
    assert found[:end] == whole[:end]
    assert set(found[end:]) <= {0}
    with model.disable_adapter():
        assert model.generate(**batch, **GREEDY).shape[1] <= width + num


def test_the_base_is_asked_for_no_position_beyond_the_longest_row(kind, monkeypatch):
    """Such as that of columns that are pads in every row; out of range they are an error on a GPU alone."""
    model, batch = rival(kind), tokens(TEXTS, "right")
    wide = {name: torch.nn.functional.pad(tensor, (0, 3)) for name, tensor in batch.items()}
    with torch.no_grad():
        expected, asked = model(**batch).logits, []

        def logits_in_range(base, positions, **inputs):
            asked.append(int(positions.max()) - inputs["input_ids"].shape[1])
            return logits_at(base, positions, **inputs)

        for module in (rival_module, rewriting, corruption):
            monkeypatch.setattr(module, "logits_at", logits_in_range)
        found = model(**wide).logits
    assert len(asked) == 1
    assert asked[0] < 0
    own = batch["attention_mask"].bool()
    torch.testing.assert_close(found[:, : own.shape[1]][own], expected[own])


@pytest.mark.parametrize("side", ["left", "right"])
def test_forward_has_the_logits_of_each_row_alone_and_the_loss_of_its_labels(kind, side):
    model, batch = rival(kind, learned().double()), tokens(TEXTS, side)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    own = batch["attention_mask"].bool()
    for i in range(len(TEXTS)):
        labels[i, own[i].nonzero()[:-2, 0]] = -100
    with torch.no_grad():
        out = model(**batch, labels=labels)
        losses = []
        for i, text in enumerate(TEXTS):
            alone = tokens([text])
            answer = alone["input_ids"].clone()
            answer[:, :-2] = -100
            one = model(**alone, labels=answer)
            torch.testing.assert_close(out.logits[i, own[i]], one.logits[0])
            losses += [one.loss.item()] * 2
    assert out.loss.item() == pytest.approx(np.mean(losses), rel=1e-5)
    with torch.no_grad():
        positions = torch.arange(batch["input_ids"].shape[1] - 1)[None]
        whole = tokens(TEXTS[:1])
        n = whole["input_ids"].shape[1]
        found = model.response_logits(**whole, positions=positions[:, : n - 1], labels=whole["input_ids"])
        torch.testing.assert_close(found[0], model(**whole).logits[0, : n - 1])


def test_scores_are_those_of_generated_answers(kind):
    model, collator = rival(kind), make_collator()
    for split in make_splits().values():
        found = score_completions(model, split, collator)
        answers = generate_answers(model, split, collator.encoder, max_new_tokens=4)
        generic = [any(text.startswith(g) for g in collator.generic_completions) for text in answers]
        right = [text.startswith(true) for text, true in zip(answers, split["completion"], strict=True)]
        assert found["accuracy"] == pytest.approx(np.mean(right))
        assert found["generic"] == pytest.approx(np.mean(generic))


def test_inside_disable_adapter_it_is_the_base_for_this_thread_alone(kind):
    model, batch = rival(kind), tokens(TEXTS)
    base, found = model.get_base_model(), []
    unlike = model.generate(**batch, **GREEDY)
    with model.disable_adapter(), torch.no_grad():
        assert not model.enabled
        assert model.virtual_tokens_in_use == 0
        assert model.adapter_settings() == {}
        assert torch.equal(model.generate(**batch, **GREEDY), base.generate(**batch, **GREEDY))
        assert torch.equal(model(**batch).logits, base(**batch).logits)
        inputs = {**tokens(TEXTS, "right"), "positions": torch.tensor([[2, 3]] * 4)}
        assert torch.equal(model.response_logits(**inputs), model.base_logits(**inputs))
        other = threading.Thread(target=lambda: found.append(model.generate(**batch, **GREEDY)))
        other.start()
        other.join()
    assert torch.equal(found[0], unlike)
    assert not torch.equal(unlike, base.generate(**batch, **GREEDY)[:, : unlike.shape[1]])
    with detached_base(model) as detached:
        assert detached is base


def test_the_base_is_left_as_it_is(kind):
    base = learned()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    required = [p.requires_grad for p in base.parameters()]
    model = rival(kind, base)
    model.generate(**tokens(TEXTS), **GREEDY)
    score_completions(model, rows("jane", 3), make_collator())
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    assert [p.requires_grad for p in base.parameters()] == required
    assert not any(module._forward_hooks for module in base.modules())
    assert not model.trains_base


def test_it_is_an_unlearner_that_cannot_be_trained(kind, tmp_path):
    model = rival(kind)
    assert unlearner_of(model) is model
    assert model.has_adapter
    with pytest.raises(TypeError, match="nothing of it trains"):
        model.check_trainable()
    with pytest.raises(TypeError, match="nothing of it trains"):
        UnlearningTrainer(model, train_dataset=rows("jane", 2), data_collator=make_collator())
    with pytest.raises(TypeError, match="reads token ids"):
        model.embedding_logits(torch.zeros(1, 2, 32), torch.ones(1, 2), torch.tensor([[0]]))


def test_it_shows_its_gate(kind):
    assert ("\n  gate: NameGate(jane)\n" in repr(rival(kind))) == (kind in GATED)


def test_a_copy_and_the_same_method_on_another_base_do_the_same(kind, tmp_path):
    model, batch = rival(kind), tokens(TEXTS)
    expected = model.generate(**batch, **GREEDY)
    assert torch.equal(copy.deepcopy(model).generate(**batch, **GREEDY), expected)
    moved = model.on_base(learned(), tmp_path)
    assert type(moved) is type(model)
    assert torch.equal(moved.generate(**batch, **GREEDY), expected)
    assert moved.adapter_settings() == model.adapter_settings()


def test_several_samples_and_beams_follow_their_request(kind):
    model, batch = rival(kind), tokens(TEXTS)
    found = model.generate(**batch, **{**GREEDY, "num_beams": 2}, num_return_sequences=2)
    assert found[:, : batch["input_ids"].shape[1]].tolist() == batch["input_ids"].repeat_interleave(2, 0).tolist()
    one = model.generate(**batch, **{**GREEDY, "num_beams": 2})
    width = min(found.shape[1], one.shape[1])
    assert torch.equal(found[::2, :width], one[:, :width])


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "refusal"])
def test_those_that_do_not_stream_take_no_streamer(kind):
    with pytest.raises(ValueError, match="takes no streamer"):
        rival(kind).generate(**tokens(TEXTS[:1]), streamer=object(), **GREEDY)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"inputs_embeds": torch.zeros(4, 3, 32)}, "takes no inputs_embeds"),
        ({"max_length": 20}, "takes no max_length"),
        ({"return_dict_in_generate": True}, "takes no return_dict_in_generate"),
        ({"past_key_values": object()}, "takes no past_key_values"),
        ({"max_new_tokens": None}, "needs max_new_tokens"),
        ({"adapter_names": ["a"] * 4}, "runs under one adapter"),
    ],
)
def test_arguments_that_go_around_the_method_are_refused(kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        rival(kind).generate(**tokens(TEXTS), **{**GREEDY, **arguments})


def test_numbers_of_tokens_answers_and_beams_are_whole_and_1_or_more(kind):
    model, batch = rival(kind), tokens(TEXTS[:1])
    for name, value in itertools.product(("max_new_tokens", "num_return_sequences", "num_beams"), (0, -1, 2.5, True)):
        config = GenerationConfig(max_new_tokens=5)
        setattr(config, name, value)
        for settings in ({**GREEDY, name: value}, {"generation_config": config}):
            with pytest.raises(ValueError, match=f"{name}={value}; expected a whole number of 1 or more"):
                model.generate(**batch, **settings)


def test_numbers_of_numpy_are_numbers_as_for_the_base(kind):
    model, batch = rival(kind), tokens(TEXTS[:1])
    settings = {**GREEDY, "num_beams": 2, "num_return_sequences": 2}
    expected = model.generate(**batch, **settings)
    settings |= {name: np.int64(settings[name]) for name in ("max_new_tokens", "num_beams", "num_return_sequences")}
    assert torch.equal(model.generate(**batch, **settings), expected)


def test_without_a_mask_pad_tokens_are_pads_as_for_the_base(kind):
    model, batch = rival(kind), tokens(TEXTS)
    expected = model.generate(**batch, **GREEDY)
    assert torch.equal(model.generate(batch["input_ids"], **GREEDY), expected)
    with pytest.raises(ValueError, match="a row of zeros only: there is nothing to continue"):
        model.generate(batch["input_ids"], attention_mask=batch["attention_mask"] * 0, **GREEDY)


def test_forward_refuses_what_it_does_not_read(kind):
    model, batch = rival(kind), tokens(TEXTS)
    for arguments in ({"is_forget": torch.ones(4)}, {"inputs_embeds": torch.zeros(4, 3, 32)}):
        with pytest.raises(ValueError, match="takes input_ids"):
            model(**batch, **arguments)
    with pytest.raises(ValueError, match="which it needs"):
        model(attention_mask=batch["attention_mask"])


def test_settings_may_stand_in_a_config(kind):
    model, batch = rival(kind), tokens(TEXTS)
    config = GenerationConfig(**GREEDY)
    assert torch.equal(model.generate(**batch, generation_config=config), model.generate(**batch, **GREEDY))


def test_only_a_bare_causal_lm_is_a_base(kind):
    lora = get_peft_model(build("llama"), LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]))
    for model in (prompted(dtype=torch.float32), lora, torch.nn.Linear(2, 2)):
        with pytest.raises(TypeError, match="expected a causal LM"):
            rival(kind, model)


@pytest.mark.parametrize("kind", KINDS)
def test_an_evaluation_measures_what_there_is_and_says_what_there_is_not(kind, tmp_path):
    model, splits = rival(kind), make_splits()
    measures = ("utility", "kl", "membership", "input attack", "relearning", "quantized", "sampling", "soft suffix",
                "linear probe")  # fmt: skip
    found = measured(model, *measures, output_dir=tmp_path)
    assert "nothing to train further" in found.skipped["relearning"]
    assert "reads text" in found.skipped["soft suffix"]
    assert ("kl" in found.skipped, "membership" in found.skipped) == ((kind == "refusal",) * 2)
    taken = {one.measure for one in found.measurements}
    assert taken >= {"utility", "input attack", "quantized", "sampling", "linear probe"}
    for split, some in splits.items():
        scores = per_row(found, "utility", split, "unlearned")
        assert ("flagged" in scores) == (kind in GATED)
        if kind in GATED:
            assert scores["flagged"] == [float("jane" in prompt) for prompt in some["prompt"]]
        detached = per_row(found, "utility", split, "detached")
        base = score_completions(learned(), some, make_collator())
        assert np.mean(detached["accuracy"]) == base["accuracy"]
    if kind == "refusal":
        assert found.metric(measure="utility", rows="train_forget", model="unlearned", name="generic").value == 1
        assert found.metric(measure="utility", rows="train_forget", model="unlearned", name="accuracy").value == 0
        assert found.metric(measure="utility", rows="train_forget", model="unlearned", name="loss").value == math.inf
    assert repr(Evaluation.load(tmp_path).metrics) == repr(found.metrics)  # NaN is not equal to itself
    write_report(found, tmp_path)
    assert model.kind in (tmp_path / "report.md").read_text()


def test_another_setting_is_another_evaluation(tmp_path):
    model = rival("corruption")
    measured(model, "utility", output_dir=tmp_path)
    model.corruption = Corruption("noise", 2.0, 8)
    with pytest.raises(ValueError, match="differs in models"):
        measured(model, "utility", output_dir=tmp_path)


def test_hidden_states_and_running_text_go_through_it(kind):
    model, collator = rival(kind), make_collator()
    assert response_embeddings(model, rows("film", 3), collator.encoder).shape == (3, 32)
    found = text_losses(model, ["the film is good", "a bad plot"], collator.encoder)
    assert np.isfinite(found["nats"]).all()


def test_a_trained_suffix_is_refused(kind):
    with pytest.raises(TypeError, match="trained vectors are none"):
        soft_suffix(rival(kind), rows("jane", 2), rows("doe", 2), make_collator().encoder)


def test_comparisons_of_likelihoods_refuse_a_fixed_text():
    model, encoder = rival("refusal"), make_collator().encoder
    for measure in (kl_to, attack_scores):
        with pytest.raises(TypeError, match="fixed text"):
            measure(model, rows("jane", 2), encoder)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_scored_as_it_generates(kind, family):
    model, collator = rival(kind, build(family)), make_collator()
    some = rows("jane", 2)
    texts = Dataset.from_list([{**row, "completion": " x"} for row in some])
    answers = generate_answers(model, texts, collator.encoder, max_new_tokens=3)
    own = [
        {"input_ids": collator.encoder.encode(row).prompt_ids, "text": answer}
        for row, answer in zip(texts, answers, strict=True)
    ]
    with torch.no_grad():
        for one in own:
            ids = torch.tensor([one["input_ids"]])
            new = model.generate(ids, **{**GREEDY, "max_new_tokens": 3})[:, ids.shape[1] :]
            whole = torch.cat([ids, new], dim=1)
            positions = torch.arange(ids.shape[1] - 1, whole.shape[1] - 1)[None]
            logits = model.response_logits(whole, torch.ones_like(whole), positions)
            assert torch.equal(logits.argmax(-1), new)
    assert len(response_likelihoods(model, some, collator.encoder)) == 2
