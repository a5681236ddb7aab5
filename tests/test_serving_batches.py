"""Batches: rows of any prompts, lengths and settings together are answered as each alone, also where one fails."""

from __future__ import annotations

import asyncio
import json
import time
from contextlib import aclosing

import pytest
import torch
from encoded import with_template
from helpers import CONFIGS, build
from servers import alone, answered, jobs_of, joined, make_engine, make_gated, prompt, rendered

from spul import ForgetRetainCollator, SoftPromptUnlearner
from spul.data.encoder import RowEncoder
from spul.gates import AnyGate, GatedUnlearner, NameGate
from spul.serving.encoding import RequestEncoder
from spul.serving.engine import Job
from spul.serving.errors import ApiError
from spul.serving.loading import always
from spul.serving.requests import ChatRequest, Limits, Sampling, read_body
from spul.serving.served import ServedPrompts

GREEDY = Sampling(temperature=0)


def test_a_prompt_that_is_not_among_those_served_fails_its_batch_alone():
    gated = make_gated("other")
    engine = make_engine(gated)
    known, engine.served.served = engine.served.served, {"other": engine.served.served["other"]}

    async def run():
        engine.start()
        try:
            [job] = jobs_of(gated, ["about jane"], [3])
            with pytest.raises(ApiError) as caught:
                await joined(engine, job)
            engine.served.served = known
            [job] = jobs_of(gated, ["about jane"], [3])
            return caught.value.status, engine.is_alive, await joined(engine, job)
        finally:
            await engine.stop()

    expected, _ = alone(gated, gated.tokenizer("about jane")["input_ids"], "default", 3)
    assert asyncio.run(run()) == (500, True, expected)


TEXTS = ["about jane is the film good", "the film is", "text of doe", "jane", "doe is good " * 3]
NAMES = ["default", "__base__", "other", "default", "other"]
NUMS = [3, 8, 12, 1, 5]


@pytest.mark.parametrize(
    ("prompt_type", "family", "num_calls"),
    [("prompt_tuning", "llama", 1), ("prefix_tuning", "llama", 1), ("prompt_tuning", "gpt2", 1),
     # a window shorter than the rows: generated in groups, which take no stopping criteria; here each row alone
     ("prefix_tuning", "mistral", 6)],
)  # fmt: skip
def test_rows_that_come_together_are_answered_as_alone(monkeypatch, prompt_type, family, num_calls):
    gated, calls = make_gated("other", prompt_type=prompt_type, family=family), []
    expected = [
        alone(gated, gated.tokenizer(text)["input_ids"], name, num)[0]
        for text, name, num in zip(TEXTS, NAMES, NUMS, strict=True)
    ]
    engine, generate = make_engine(gated, gather_seconds=0.5), gated.unlearner.generate
    monkeypatch.setattr(gated.unlearner, "generate", lambda *a, **k: calls.append(len(a[0])) or generate(*a, **k))
    jobs = jobs_of(gated, TEXTS, NUMS)
    assert answered(engine, jobs) == expected
    assert (calls[0], len(calls)) == (len(TEXTS), num_calls)
    assert [job.prompt.get("name", "__base__") for job in jobs] == NAMES
    assert len(set(expected)) > 3


def test_settings_of_the_base_do_not_change_how_rows_are_sampled():
    gated = make_gated("other")
    gated.get_base_model().generation_config.update(do_sample=True, temperature=0.3, top_k=2, num_beams=3)
    engine = make_engine(gated)
    found = answered(engine, jobs_of(gated, TEXTS, NUMS))
    plain = make_gated("other")
    assert found == [
        alone(plain, plain.tokenizer(text)["input_ids"], name, num)[0]
        for text, name, num in zip(TEXTS, NAMES, NUMS, strict=True)
    ]


@pytest.mark.parametrize("prompt_type", ["prompt_tuning", "prefix_tuning"])
@pytest.mark.parametrize(
    ("name", "value"),
    [("repetition_penalty", 3.0), ("no_repeat_ngram_size", 1), ("no_repeat_ngram_size", 2), ("max_time", 1e-9),
     ("forced_eos_token_id", 2), ("forced_bos_token_id", 5), ("is_assistant", True)],
)  # fmt: skip
def test_under_settings_of_the_base_rows_that_come_together_are_answered_as_alone(prompt_type, name, value):
    gated = make_gated("other", prompt_type=prompt_type)
    own = gated.get_base_model().generation_config
    gated.tokenizer.pad_token = own.pad_token_id = None  # rows are padded by the token that ends answers
    setattr(own, name, value)
    together = answered(make_engine(gated, gather_seconds=0.5), jobs_of(gated, TEXTS, NUMS))
    assert together == [
        answered(make_engine(gated), jobs_of(gated, [text], [num]))[0] for text, num in zip(TEXTS, NUMS, strict=True)
    ]
    assert all(isinstance(one, str) for one in together)
    assert any(together)
    assert (gated.get_base_model().generation_config, getattr(own, name)) == (own, value)
    plain = answered(make_engine(make_gated("other", prompt_type=prompt_type)), jobs_of(gated, TEXTS, NUMS))
    if value != 2 or name == "forced_eos_token_id":  # no two tokens come twice in these short answers
        assert (together != plain) == (name in ("repetition_penalty", "no_repeat_ngram_size"))  # others: not of a row


@pytest.mark.parametrize("stops", ["ga", ["ga", "no such text", ""], []])
def test_texts_at_which_the_bases_settings_end_answers_end_them_as_those_of_the_request_do(stops):
    gated = make_gated("other")
    ids = gated.tokenizer("about jane")["input_ids"]
    whole, num = alone(gated, ids, "default", 12)
    assert ("ga" in whole, num) == (True, 12)
    gated.get_base_model().generation_config.stop_strings = stops
    engine = make_engine(gated)
    encoder = RequestEncoder(engine.served, engine.limits)
    jobs = [
        encoder.job(ChatRequest("completion", ids, Sampling(temperature=0, stop=own), 12))
        for own in ((), ("t",), ("ti",))
    ]
    ends = [whole[: whole.index("ga")] if stops else whole, whole[: whole.index("t")], whole[: whole.index("ti")]]
    assert answered(engine, jobs) == ends


def test_a_row_near_the_last_position_goes_without_one_that_would_push_it_beyond(monkeypatch):
    """Learned positions have an end, and a row goes on until the longest answer of its batch has ended."""
    gated, calls = make_gated(family="gpt2"), []
    long, short = "the film is good " * 16, "jane"
    ids = [gated.tokenizer(text)["input_ids"] for text in (long, short)]
    room = 96 - 5 - len(ids[0])
    assert 0 < room < 30
    expected = [alone(gated, ids[0], "__base__", room)[0], alone(gated, ids[1], "default", 60)[0]]
    engine, generate = make_engine(gated, gather_seconds=0.5), gated.unlearner.generate
    monkeypatch.setattr(gated.unlearner, "generate", lambda *a, **k: calls.append(len(a[0])) or generate(*a, **k))
    assert answered(engine, [Job(ids[0], GREEDY, room), Job(ids[1], GREEDY, 60)]) == expected
    assert calls == [1, 1]


def test_a_row_that_fails_fails_alone(monkeypatch, caplog):
    gated = make_gated("other")
    generate = gated.unlearner.generate

    def fails(ids, *args, **kwargs):
        if (ids == 119).any():
            raise RuntimeError("out of memory")
        return generate(ids, *args, **kwargs)

    monkeypatch.setattr(gated.unlearner, "generate", fails)
    found = answered(make_engine(gated, gather_seconds=0.5), [Job([119], GREEDY, 3), *jobs_of(gated, TEXTS, NUMS)])
    assert isinstance(found[0], ApiError)
    assert found[0].status == 500
    assert "memory" not in found[0].message
    assert "out of memory" in caplog.text
    assert all(isinstance(one, str) for one in found[1:])


def test_without_a_choice_of_prompt_there_is_no_answer(caplog):
    """Gates that are not the prompts' any more: the base would answer."""
    gated = make_gated("other")
    engine = make_engine(gated)
    gated.unlearner.delete_adapter("other")
    [found] = answered(engine, jobs_of(gated, ["good"], [3]))
    assert (type(found), found.status) == (ApiError, 500)


def test_where_prompts_are_disabled_the_base_answers_only_what_has_none(caplog):
    gated = make_gated("other")
    engine = make_engine(gated)
    gated.unlearner.active_adapter = []
    found = answered(engine, jobs_of(gated, ["good", "jane"], [3, 3]))
    assert found[0] == alone(gated, gated.tokenizer("good")["input_ids"], "__base__", 3)[0]
    assert (type(found[1]), found[1].status) == (ApiError, 500)
    assert "would answer in their place" in caplog.text


@pytest.mark.parametrize("join", [lambda gate: gate, lambda gate: AnyGate([NameGate(["jane"]), AnyGate([gate])])])
def test_a_gate_that_fails_attaches_its_prompt(join):
    def broken(texts):
        raise RuntimeError("no light")

    gated = make_gated(default=join(broken))
    engine = make_engine(gated)
    jobs = jobs_of(gated, ["good"], [5])
    assert answered(engine, jobs) == [alone(gated, jobs[0].token_ids, "default", 5)[0]]
    assert engine.served.gate_failures == 1


def test_a_request_that_is_being_answered_keeps_the_prompt_that_is_revoked():
    gated, engine = make_gated(default=always), None
    job = jobs_of(gated, ["good film"], [12])[0]
    expected = [alone(gated, job.token_ids, name, 12)[0] for name in ("default", "__base__")]
    engine = make_engine(gated)

    async def run():
        engine.start()
        async with aclosing(engine.answer(job)) as pieces:
            text = (await anext(pieces)).text
            revoking = asyncio.ensure_future(engine.change(lambda served: served.revoke("default")))
            later = asyncio.ensure_future(joined(engine, Job(job.token_ids, GREEDY, 12)))
            text += "".join([piece.text async for piece in pieces])
        found = [text, await later], await revoking
        await engine.stop()
        return found

    texts, gone = asyncio.run(run())
    assert texts == expected
    assert [one["name"] for one in gone] == ["default"]


def test_a_stopped_engine_takes_nothing():
    engine = make_engine(make_gated())
    answered(engine, [])
    for call in (lambda: joined(engine, Job([5], GREEDY, 3)), lambda: engine.change(lambda served: None)):
        with pytest.raises(ApiError) as caught:
            asyncio.run(call())
        assert caught.value.status == 503


def test_prompts_at_the_message_are_put_there_and_completions_refused():
    unlearner = SoftPromptUnlearner(
        build("llama", torch.float64), CONFIGS["prompt_tuning"](5), prompt_position="message"
    )
    prompt(unlearner, "default", 0)
    plain = make_gated()
    gated = GatedUnlearner(unlearner.double(), plain.tokenizer, {"default": always}).eval()
    engine = make_engine(gated)
    encoder = RequestEncoder(engine.served, engine.limits)
    messages = [{"role": "user", "content": "the film is good"}]
    job = encoder.job(ChatRequest("chat", messages, GREEDY, 8))
    ids = rendered(gated, messages)
    assert job.token_ids == ids
    assert 0 < job.prompt_position < len(ids)
    out = unlearner.generate(
        torch.tensor([ids]), prompt_position=torch.tensor([job.prompt_position]), max_new_tokens=8, do_sample=False
    )
    expected = gated.tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)
    assert answered(engine, [job]) == [expected] != [alone(plain, ids, "default")[0]]
    with pytest.raises(ApiError, match="send a chat"):
        encoder.job(ChatRequest("completion", "good", GREEDY, 8))


@pytest.mark.parametrize("max_tokens", [None, 1, 80])
def test_requests_without_room_for_the_longest_prompt_are_refused_before_they_wait(max_tokens):
    engine = make_engine(make_gated("other"), max_new_tokens=80)
    encoder = RequestEncoder(engine.served, engine.limits)
    room = 96 - 6
    for num in (1, 10, room - 1, room, 200):
        request = ChatRequest("completion", [5] * num, GREEDY, max_tokens)
        if num + (max_tokens or 1) <= room:
            assert encoder.job(request).max_tokens == (max_tokens or min(80, room - num))
        else:
            with pytest.raises(ApiError) as caught:
                encoder.job(request)
            assert caught.value.code == "context_length_exceeded"


@pytest.mark.parametrize("ids", [[-1], [120], [5, 10**9]])
def test_ids_that_are_no_tokens_are_refused(ids):
    engine = make_engine(make_gated())
    with pytest.raises(ApiError, match="token id"):
        RequestEncoder(engine.served, engine.limits).job(ChatRequest("completion", ids, GREEDY, 3))


def test_a_completion_has_the_tokens_of_training_whatever_the_tokenizer_adds_to_a_text():
    gated = make_gated()
    gated.tokenizer = with_template(gated.tokenizer, "<s> $A </s>")
    encoder, rows = RequestEncoder(ServedPrompts(gated), Limits()), RowEncoder(gated.tokenizer, 64)
    for text in ("the film is", "<s>the film is", "the film is</s>"):
        ids = encoder.job(ChatRequest("completion", text, GREEDY, 3)).token_ids
        assert ids == rows.encode({"prompt": text, "completion": " good"}).prompt_ids
        assert ids.count(gated.tokenizer.bos_token_id) == 1
        assert ids.count(gated.tokenizer.eos_token_id) == text.count("</s>")


def test_parts_of_a_message_have_the_tokens_of_training():
    gated = make_gated()
    engine = make_engine(gated)
    parts = [{"type": "text", "text": text} for text in ("the film", "plot is", " good")]
    messages = [{"role": "user", "content": parts}]
    request = read_body("chat", json.dumps({"model": "m", "messages": messages}).encode(), "m", engine.limits)
    row = {"prompt": messages, "completion": [{"role": "assistant", "content": "good"}]}
    trained = ForgetRetainCollator(gated.tokenizer, [" good"]).encoder.encode(row)
    found = RequestEncoder(engine.served, engine.limits).job(request).token_ids
    assert found == trained.prompt_ids
    assert found == rendered(gated, [{"role": "user", "content": "the filmplot is good"}])


def test_a_message_of_a_role_that_the_template_leaves_out_is_refused():
    gated = make_gated()
    template = (
        "{% for m in messages %}{% if m.role == 'system' %}<s>{{ m.content }}</s>"
        "{% elif m.role == 'user' %}<s>user\n{{ m.content }}</s>{% endif %}{% endfor %}"
    )
    for role, other in (("developer", "system"), ("system", "developer")):
        gated.tokenizer.chat_template = template.replace("'system'", f"'{other}'")
        encoder = RequestEncoder(make_engine(gated).served, Limits())
        asked = {"role": "user", "content": "film"}
        talk = [asked, {"role": other, "content": "good"}]
        assert encoder.job(ChatRequest("chat", talk)).token_ids == rendered(gated, talk)
        with pytest.raises(ApiError, match=f"leaves out messages of the role '{role}'") as caught:
            encoder.job(ChatRequest("chat", [asked, {"role": role, "content": "good"}]))
        assert (caught.value.status, caught.value.param) == (400, "messages")


@pytest.mark.parametrize("role", ["system", "developer"])
def test_a_message_of_a_role_that_the_template_shows_or_refuses_itself_is_given_to_it(role):
    gated, talk = make_gated(), [{"role": role, "content": "good"}, {"role": "user", "content": "a film"}]
    encoder = RequestEncoder(make_engine(gated).served, Limits())
    assert encoder.job(ChatRequest("chat", talk)).token_ids == rendered(gated, talk)
    gated.tokenizer.chat_template = "{% if messages[0].role != 'user' %}{{ raise_exception('no') }}{% endif %}<s>"
    with pytest.raises(ApiError, match="does not take these messages"):
        RequestEncoder(make_engine(gated).served, Limits()).job(ChatRequest("chat", talk))


def test_a_conversation_that_the_template_does_not_take_is_refused():
    gated = make_gated()
    engine = make_engine(gated)
    gated.tokenizer.chat_template = "{{ raise_exception('no') }}"
    request = ChatRequest("chat", [{"role": "user", "content": "good"}], GREEDY, 3)
    with pytest.raises(ApiError, match="does not take"):
        RequestEncoder(engine.served, engine.limits).job(request)
    gated.tokenizer.chat_template = None
    with pytest.raises(ApiError, match="no chat template"):
        RequestEncoder(engine.served, engine.limits).job(request)


def test_closing_an_answer_frees_its_place():
    """The row that nobody waits for ends at its next token, not at its last."""
    gated = make_gated()
    gated.get_base_model().generation_config.eos_token_id = gated.tokenizer.eos_token = None
    engine = make_engine(gated)
    engine.room = None

    async def run():
        engine.start()
        pieces = engine.answer(Job([5, 6], GREEDY, 100_000))
        await anext(pieces)
        await pieces.aclose()
        start = time.monotonic()
        await joined(engine, Job([5, 6], GREEDY, 3))
        await engine.stop()
        return time.monotonic() - start

    assert asyncio.run(run()) < 30
