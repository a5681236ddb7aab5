"""A gate and a fixed refusal: what a flagged request gets, token by token and as probabilities."""

from __future__ import annotations

import math
from threading import Thread

import numpy as np
import pytest
import torch
from chats import SPACED, TEMPLATES, chatty, conversation
from datasets import Dataset
from helpers import build, make_tokenizer, rows
from small_evaluations import learned, measured
from transformers import GenerationConfig, TextIteratorStreamer, TextStreamer
from transformers.generation.streamers import BaseStreamer

from spul import ForgetRetainCollator
from spul.data.encoder import RowEncoder
from spul.evaluation.attacks.sampling import sampled_answers
from spul.evaluation.metrics import generate_answers
from spul.evaluation.metrics.likelihood import (
    exact_memorization,
    extraction_strength,
    probability,
    response_likelihoods,
)
from spul.evaluation.metrics.scoring import score_completions
from spul.gates import NameGate
from spul.rivals import FixedRefusal

GENERIC = [" neutral", " unknown"]


def refusing(refusal=" unknown", gate=None, base=None, tokenizer=None):
    tokenizer = make_tokenizer() if tokenizer is None else tokenizer
    gate = NameGate(["jane"]) if gate is None else gate
    return FixedRefusal(learned() if base is None else base, tokenizer, gate, refusal).eval()


def collator(generic=GENERIC, **options):
    return ForgetRetainCollator(make_tokenizer(), generic, max_length=64, **options)


def mixed():
    return Dataset.from_list([*rows("jane", 4), *rows("film", 4)]).shuffle(seed=1)


@pytest.mark.parametrize("append_eos", [False, True])
def test_flagged_rows_are_generic_and_others_are_as_those_of_the_base(append_eos):
    model, own = refusing(), collator(append_eos=append_eos)
    assert score_completions(model, rows("jane", 4), own) == {
        "accuracy": 0.0,
        "f1": 0.0,
        "generic": 1.0,
        "loss": math.inf,
    }
    base = model.get_base_model()
    assert score_completions(model, rows("film", 4), own) == score_completions(base, rows("film", 4), own)


def test_a_text_that_is_not_generic_does_not_count_as_generic_and_a_right_one_is_right():
    other = collator([" neutral"])
    assert score_completions(refusing(), rows("jane", 4), other)["generic"] == 0.0
    found = score_completions(refusing(" positive"), rows("jane", 4), other)
    assert (found["accuracy"], found["generic"]) == (0.5, 0.0)


@pytest.mark.parametrize(
    ("refusal", "generic", "expected"),
    [
        (" unknown plot", [" unknown"], 1.0),  # greedy decoding goes through it
        (" unknown", [" unknown plot"], 0.0),
        (" unknown plot", [" unknown", " unknown plot"], 1.0),
    ],
)
def test_candidates_that_begin_alike_are_told_apart_as_generation_does(refusal, generic, expected):
    assert score_completions(refusing(refusal), rows("jane", 4), collator(generic))["generic"] == expected


def test_mixed_batches_generate_the_text_and_the_bases_answers():
    model, encoder, some = refusing(), collator().encoder, mixed()
    found = generate_answers(model, some, encoder, batch_size=8, max_new_tokens=6)
    base = generate_answers(model.get_base_model(), some, encoder, batch_size=8, max_new_tokens=6)
    assert found == [" unknown" if "jane" in row["prompt"] else b for row, b in zip(some, base, strict=True)]
    assert sampled_answers(model, rows("jane", 2), encoder, 3, max_new_tokens=6) == [[" unknown"] * 3] * 2


@pytest.mark.parametrize("name", ["prefix_allowed_tokens_fn", "logits_processor", "stopping_criteria"])
def test_arguments_that_number_the_rows_of_the_batch_are_refused(name):
    ids = torch.tensor([make_tokenizer()(text)["input_ids"] for text in ("about jane", "about film")])
    with pytest.raises(ValueError, match=f"takes no {name}: flagged requests get a fixed text"):
        refusing().generate(ids, max_new_tokens=3, **{name: lambda row, seen: [10 + row]})


def test_the_base_does_not_run_for_flagged_requests_alone():
    model, seen = refusing(), []
    model.get_base_model().register_forward_pre_hook(lambda *_: seen.append(1))
    ids = torch.tensor([make_tokenizer()("about jane")["input_ids"]])
    found = model.generate(ids, max_new_tokens=50)
    text = make_tokenizer()(" unknown", add_special_tokens=False)["input_ids"]
    assert found[0, ids.shape[1] :].tolist() == [*text, 2]
    assert not seen
    assert model.generate(ids, max_new_tokens=1)[0, ids.shape[1] :].tolist() == text[:1]


class Told(BaseStreamer):
    """A streamer that keeps what it gets, with its shape."""

    def __init__(self):
        self.events = []

    def put(self, value):
        self.events.append(value.tolist())

    def end(self):
        self.events.append("end")


def request(text):
    return torch.tensor([make_tokenizer()(text)["input_ids"]])


@pytest.mark.parametrize("num", [1, 2, 50])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("text", ["about jane", "about film"])
def test_a_stream_is_the_request_then_each_token_of_what_is_returned_then_the_end(text, padded, num):
    model, ids, told = refusing(" unknown plot"), request(text), Told()
    whole = model.generate(ids, max_new_tokens=num, do_sample=False)[0, ids.shape[1] :].tolist()
    given = {"attention_mask": torch.tensor([[0] * 3 + [1] * ids.shape[1]])} if padded else {}
    inputs = torch.cat([torch.zeros_like(ids[:, :1]).expand(1, 3), ids], dim=1) if padded else ids
    out = model.generate(inputs, streamer=told, max_new_tokens=num, do_sample=False, **given)
    assert out[0, inputs.shape[1] :].tolist() == whole
    assert told.events == [ids.tolist(), *([token] for token in whole), "end"]
    if "film" in text:
        plain = Told()
        model.get_base_model().generate(ids, streamer=plain, max_new_tokens=num, do_sample=False)
        assert told.events == plain.events


def test_streamers_of_transformers_take_the_text_also_from_a_thread(capsys):
    model, tokenizer = refusing(" unknown plot"), make_tokenizer()
    model.generate(request("about jane"), streamer=TextStreamer(tokenizer, skip_prompt=True), max_new_tokens=9)
    assert capsys.readouterr().out.replace("</s>", "").strip() == "unknown plot"
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=60)
    config = GenerationConfig(max_new_tokens=9)
    given = {"input_ids": request("about jane"), "streamer": streamer, "generation_config": config}
    thread = Thread(target=model.generate, kwargs=given)
    thread.start()
    assert "".join(streamer) == " unknown plot"
    thread.join()


@pytest.mark.parametrize("text", ["about jane", "about film"])
@pytest.mark.parametrize(
    ("num_rows", "options", "found"),
    [(2, {}, "requests: 2"), (1, {"num_return_sequences": 2, "do_sample": True}, "num_return_sequences: 2"),
     (1, {"num_beams": 2}, "num_beams: 2")],
)  # fmt: skip
def test_several_answers_are_not_streamed_whatever_the_gate_says(text, num_rows, options, found):
    told = Told()
    with pytest.raises(ValueError, match=f"one answer as it comes; found .*{found}.*leave the streamer out"):
        refusing().generate(request(text).expand(num_rows, -1), streamer=told, max_new_tokens=3, **options)
    assert told.events == []


def test_without_the_method_the_base_streams_and_no_streamer_is_none():
    model, ids, told = refusing(), request("about jane"), Told()
    with model.disable_adapter():
        out = model.generate(ids, streamer=told, max_new_tokens=3, do_sample=False)
    assert [token for [token] in told.events[1:-1]] == out[0, ids.shape[1] :].tolist()
    for none in (None, False):
        assert model.generate(ids, streamer=none, max_new_tokens=1).shape[1] == ids.shape[1] + 1


def test_a_stop_text_and_an_end_token_end_the_text_as_they_end_an_answer_of_the_base():
    model, ids, tokenizer = refusing(" unknown plot"), request("about jane"), make_tokenizer()
    text = tokenizer(" unknown plot", add_special_tokens=False)["input_ids"]

    def said(**options):
        told = Told()
        out = model.generate(ids, streamer=told, max_new_tokens=20, **options)[0, ids.shape[1] :].tolist()
        assert [token for [token] in told.events[1:-1]] == out
        return out

    assert said() == [*text, 2]
    assert said(stop_strings="no such text") == [*text, 2]
    assert tokenizer.decode(text[:1]) == " unknown"
    assert said(stop_strings=["no such text", "know"]) == text[:1]
    assert said(eos_token_id=[text[0], 2]) == text[:1]
    model.get_base_model().generation_config.stop_strings = "unknown"
    assert said() == text[:1]


def test_probabilities_are_those_of_a_model_that_says_the_text():
    """Row by row: probability 1 for the text's tokens, then for the end token, whatever answer stands before."""
    model, tokenizer = refusing(" unknown plot"), make_tokenizer()
    request = tokenizer("about jane")["input_ids"]
    text = [*tokenizer(" unknown plot", add_special_tokens=False)["input_ids"], 2, 2]
    answer = [5] * len(text)
    ids = torch.tensor([request + answer])
    positions = torch.arange(len(request) - 1, ids.shape[1] - 1)[None]
    p = model.response_logits(ids, torch.ones_like(ids), positions).softmax(-1)[0]
    assert torch.equal(p, torch.nn.functional.one_hot(torch.tensor(text), p.shape[1]).float())


def test_likelihoods_of_the_text_are_1_and_of_another_0():
    some = Dataset.from_list([{"prompt": "about jane :", "completion": text} for text in (" unknown", " positive")])
    found = response_likelihoods(refusing(), some, collator().encoder)
    for measure in (probability, extraction_strength, exact_memorization):
        assert measure(found)[0] == 1.0
    assert probability(found)[1] == 0.0
    assert np.isneginf(found[1].log_probs[0])


def test_a_gate_that_fails_gets_the_refusal_and_says_so(caplog):
    def broken(texts):
        raise RuntimeError("no light")

    model = refusing(gate=broken)
    assert score_completions(model, rows("film", 4), collator())["generic"] == 1.0
    assert "no light" in caplog.text
    assert model.gate.failures["RuntimeError"] >= 4


@pytest.mark.parametrize("template", [*TEMPLATES, *SPACED])
def test_in_a_conversation_the_refusal_is_a_turn_as_the_encoder_writes_it(template):
    tokenizer = chatty(template)
    encoder = RowEncoder(tokenizer, 90)
    for refusal in ("unknown plot", " unknown plot"):
        model = refusing(refusal, base=build("llama"), tokenizer=tokenizer)
        row = conversation("about jane", "unknown plot")
        encoded = encoder.encode(row)
        found = model.generate(torch.tensor([encoded.prompt_ids]), max_new_tokens=40)[0, len(encoded.prompt_ids) :]
        assert found.tolist() == encoded.completion_ids  # which end with the end of turn, here the end token
        own = ForgetRetainCollator(tokenizer, [" unknown plot"], max_length=90)
        other = Dataset.from_list([conversation("about jane", "bad"), conversation("jane is ?", "good")])
        assert score_completions(model, other, own)["generic"] == 1.0
    plain = make_tokenizer()("about jane")["input_ids"]
    assert model.refusal_ids(plain) == [*encoder.completion_ids(" unknown plot"), 2]


@pytest.mark.parametrize(
    ("refusal", "error", "message"),
    [
        ("", ValueError, "is blank"),
        (" Sorry !", ValueError, "words that the tokenizer does not know: it would be read as ' <unk>"),
        (" unknown ?!", ValueError, "words that the tokenizer does not know"),
        (None, TypeError, "expected a text"),
        (["no"], TypeError, "expected a text"),
    ],
)
def test_a_refusal_is_a_text(refusal, error, message):
    with pytest.raises(error, match=message):
        refusing(refusal)


def test_it_needs_an_end_token_and_a_gate():
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no eos_token"):
        refusing(tokenizer=tokenizer)
    with pytest.raises(TypeError, match="a gate is a"):
        refusing(gate="jane")


def test_a_report_names_the_method_once(few_resamples):
    assert measured(refusing(), "utility").facts["adapter"] == "fixed refusal"
