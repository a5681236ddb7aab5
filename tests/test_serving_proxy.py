"""The engine in front of vLLM: a fake one checks that each request comes with its own prompt's embeddings."""

from __future__ import annotations

import asyncio
import base64
import io
import json

import openai
import pytest
import torch
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from servers import (
    HTTP,
    MODEL,
    TOKEN,
    by_itself,
    client,
    make_gated,
    refusal_of,
    rendered,
    running,
    running_app,
    until,
)

from spul.serving.proxy import VllmEngine
from spul.serving.requests import Limits
from spul.serving.served import ServedPrompts

NAMES = {"about jane": "default", "text of doe": "other", "the plot": "__base__"}


ODD = {
    "usage": '{"choices": [], "usage": "many"}',
    "no number": '{"choices": [], "usage": {"completion_tokens": Infinity}}',
    "below 0": '{"choices": [], "usage": {"completion_tokens": -5}}',
    "half a character": '{"choices": [{"text": "\\ud800", "finish_reason": null}]}',
    "deep": "[" * 100_000,
    "long": " " * (1 << 21),
    "error": '{"error": {"message": "no"}}',
}


class FakeVllm:
    """Takes completions as vLLM does, and answers with the shape of what it got."""

    def __init__(self):
        self.bodies, self.keys, self.fault, self.gone = [], [], None, 0
        self.app = FastAPI()
        self.app.add_api_route("/v1/completions", self.complete, methods=["POST"])

    async def complete(self, request: Request):
        body = await request.json()
        self.bodies.append(body)
        self.keys.append(request.headers.get("authorization"))
        if isinstance(self.fault, int):
            return JSONResponse({"error": {"message": "no"}}, self.fault)
        return StreamingResponse(self.lines(body), media_type="text/event-stream")

    async def lines(self, body):
        texts = ["one", " two", " three"][: body["max_tokens"]]
        if self.fault == "breaks":
            texts = ["one\u2028", "\x85 two\x1c", "\u2029é"]
        try:
            for i, text in enumerate(texts):
                reason = "length" if i + 1 == len(texts) else None
                if self.fault == "slow" or (self.fault == "hangs" and reason):
                    await asyncio.sleep(3600)
                if self.fault == "nonsense":
                    yield "data: {\n\n"
                if self.fault == "short" and reason:
                    return
                chunk = {"choices": [{"text": text, "finish_reason": reason}]}
                if body["stream_options"].get("continuous_usage_stats"):
                    chunk["usage"] = {"completion_tokens": i + 1}
                yield f"data: {json.dumps(chunk, ensure_ascii=False)}\r\n\r\n"
                if self.fault in ODD:
                    yield f"data: {ODD[self.fault]}\n\n"
            yield f"data: {json.dumps({'choices': [], 'usage': {'completion_tokens': len(texts)}})}\n\n"
            yield "data: [DONE]\n\n"
        except asyncio.CancelledError:
            self.gone += 1
            raise


@pytest.fixture(scope="module")
def gated():
    return make_gated("other")


@pytest.fixture
def upstream():
    fake = FakeVllm()
    with running_app(fake.app) as (url, _):
        fake.url = url
        yield fake


def engine_of(gated, upstream, **options):
    options = {"limits": Limits(max_new_tokens=32), "url": upstream.url, "model": "base", **options}
    return VllmEngine(ServedPrompts(gated), **options)


def expected_embeddings(gated, ids, name):
    """Prompt and tokens, looked up by hand."""
    unlearner = gated.unlearner
    virtual = unlearner.prompt_encoder[name].embedding.weight
    return torch.cat([virtual, gated.get_base_model().get_input_embeddings().weight[ids]])


def sent_embeddings(body):
    return torch.load(io.BytesIO(base64.b64decode(body["prompt_embeds"])), weights_only=True)


@pytest.mark.parametrize("text", NAMES)
def test_each_request_is_sent_with_the_embeddings_of_its_own_prompt(gated, upstream, text):
    events, name = [], NAMES[text]
    with running(engine_of(gated, upstream, api_key="secret"), events.append) as url:
        options = {"model": MODEL, "temperature": 0.5, "top_p": 0.8, "seed": 3, "stop": ["x"], "max_tokens": 2}
        found = client(url).completions.create(prompt=text, **options)
        chat = [{"role": "user", "content": text}]
        said = client(url).chat.completions.create(messages=chat, **options)
    assert (found.choices[0].text, found.choices[0].finish_reason) == ("one two", "length")
    assert said.choices[0].message.content == "one two"
    assert found.usage.completion_tokens == 2
    wanted = {"model": "base", **{key: options[key] for key in ("temperature", "top_p", "seed", "stop", "max_tokens")},
              "stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}  # fmt: skip
    assert upstream.keys == ["Bearer secret"] * 2
    for body, ids in zip(upstream.bodies, (gated.tokenizer(text)["input_ids"], rendered(gated, chat)), strict=True):
        payload = {key: value for key, value in body.items() if key not in wanted}
        assert {key: body[key] for key in wanted} == wanted
        if name == "__base__":
            assert payload == {"prompt": ids}
        else:
            assert list(payload) == ["prompt_embeds"]
            assert torch.equal(sent_embeddings(body), expected_embeddings(gated, ids, name))
    assert [one["request"] for one in events if one["event"] == "answered"] == [
        None if name == "__base__" else name
    ] * 2


def test_a_request_whose_prompt_is_revoked_meanwhile_is_refused_and_not_sent(gated, upstream):
    engine = engine_of(gated, upstream)
    with running(engine) as url:
        engine.served.withdrawn = lambda: ["default"]  # as the ledger says while the request waits for its gates
        with pytest.raises(openai.InternalServerError, match="the prompts changed while the request waited") as caught:
            client(url).completions.create(model=MODEL, prompt="jane")
        assert (caught.value.status_code, upstream.bodies) == (503, [])
        assert client(url).completions.create(model=MODEL, prompt="of doe").id


def test_a_stream_is_the_answer_in_parts(gated, upstream):
    with running(engine_of(gated, upstream)) as url:
        options = {"model": MODEL, "prompt": "jane", "max_tokens": 3}
        chunks = list(client(url).completions.create(stream=True, stream_options={"include_usage": True}, **options))
        assert [one.choices[0].text for one in chunks[:-1]] == ["one", " two", " three"]
        assert chunks[-1].usage == client(url).completions.create(**options).usage


@pytest.mark.parametrize(
    ("fault", "status"),
    [(400, 502), (500, 502), (503, 503), (429, 429), ("nonsense", 502), ("short", 502),
     *((one, 502) for one in ODD)],
)  # fmt: skip
def test_faults_of_vllm_are_errors_and_never_answers(gated, upstream, fault, status):
    with running(engine_of(gated, upstream)) as url:
        upstream.fault = fault
        with pytest.raises(openai.APIStatusError) as caught:
            client(url).completions.create(model=MODEL, prompt="jane")
        assert caught.value.status_code == status
        upstream.fault = None
        assert client(url).completions.create(model=MODEL, prompt="jane").choices[0].text == "one two three"


@pytest.mark.parametrize("fault", ["short", *ODD])
def test_a_stream_that_has_begun_ends_in_an_error_whatever_vllm_sends(gated, upstream, fault):
    upstream.fault, events = fault, []
    with running(engine_of(gated, upstream), events.append) as url:
        options = {"model": MODEL, "prompt": "jane", "max_tokens": 3, "stream": True}
        with HTTP.stream("POST", f"{url}/v1/completions", json=options) as response:
            lines = [line for line in response.iter_lines() if line]
    assert response.status_code == 200
    assert json.loads(lines[0][5:])["choices"][0]["text"] == "one"
    assert json.loads(lines[-1][5:])["error"]["type"] == "server_error"
    assert [one["finish"] for one in events if one["event"] == "answered"] == ["error 502"]


def test_a_stream_ends_in_an_error_also_where_an_engine_fails_in_its_own_way(gated, upstream, monkeypatch, caplog):
    engine = engine_of(gated, upstream)
    answer = engine.answer

    async def fails(job):
        async for piece in answer(job):
            yield piece
            raise RuntimeError("a fault of the engine")

    monkeypatch.setattr(engine, "answer", fails)
    events = []
    with running(engine, events.append) as url:
        options = {"model": MODEL, "prompt": "jane", "max_tokens": 3, "stream": True}
        text = HTTP.post(f"{url}/v1/completions", json=options).text
    assert json.loads(text.split("\n\n")[-2][5:])["error"]["message"] == "the request failed."
    assert "a fault of the engine" in caplog.text
    assert [one["finish"] for one in events if one["event"] == "answered"] == ["error 500"]


def test_of_a_long_error_of_vllm_the_beginning_is_read(gated, caplog):
    sent = []

    async def body():
        for _ in range(1000):
            sent.append(1)
            yield b"x" * 65536
            await asyncio.sleep(0.001)  # where the upstream is told that nobody reads any more

    app = FastAPI()
    app.add_api_route("/v1/completions", lambda: StreamingResponse(body(), 500), methods=["POST"])
    with running_app(app) as (upstream, _):
        engine = VllmEngine(ServedPrompts(gated), Limits(), upstream, "base")
        with running(engine) as url, pytest.raises(openai.InternalServerError) as caught:
            client(url).completions.create(model=MODEL, prompt="jane")
    assert caught.value.status_code == 502
    assert len(sent) < 1000
    assert len(caplog.text) < 2000


def test_characters_at_which_some_end_a_line_are_part_of_the_answer(gated, upstream):
    upstream.fault = "breaks"
    with running(engine_of(gated, upstream)) as url:
        options = {"model": MODEL, "prompt": "jane", "max_tokens": 3}
        assert client(url).completions.create(**options).choices[0].text == "one\u2028\x85 two\x1c\u2029é"
        with HTTP.stream("POST", f"{url}/v1/completions", json={**options, "stream": True}) as response:
            events = [json.loads(line[5:]) for line in response.iter_lines() if line.startswith("data: {")]
    assert [one["choices"][0]["text"] for one in events] == ["one\u2028", "\x85 two\x1c", "\u2029é"]


@pytest.mark.parametrize(
    "url", ["127.0.0.1:8000", "http://127.0.0.1:8000/v1/", "http://", "http://a:99999", "ftp://a", "http://a?x=1", ""]
)
def test_what_is_no_address_of_vllm_is_refused(gated, url):
    with pytest.raises(ValueError, match="without /v1"):
        VllmEngine(ServedPrompts(gated), Limits(), url, "base")


def test_a_key_that_no_header_takes_is_refused(gated):
    for key in ("", "a b", "schlüssel", "a\nb"):
        with pytest.raises(ValueError, match="vLLM's key"):
            VllmEngine(ServedPrompts(gated), Limits(), "http://127.0.0.1:9", "base", key)


def test_without_vllm_it_is_503(gated, upstream):
    upstream.url = "http://127.0.0.1:9"
    with running(engine_of(gated, upstream)) as url, pytest.raises(openai.InternalServerError) as caught:
        client(url).completions.create(model=MODEL, prompt="jane")
    assert caught.value.status_code == 503


def test_what_takes_too_long_ends_also_at_vllm(gated, upstream):
    upstream.fault = "slow"
    with running(engine_of(gated, upstream, limits=Limits(timeout=1.0))) as url:
        with pytest.raises(openai.InternalServerError) as caught:
            client(url).completions.create(model=MODEL, prompt="jane")
        assert caught.value.status_code == 504
        assert HTTP.get(f"{url}/health").json()["waiting"] == 0


def test_of_an_answer_that_its_client_leaves_the_tokens_so_far_are_noted(gated, upstream):
    upstream.fault, events = "hangs", []
    with running(engine_of(gated, upstream), events.append) as url:
        stream = client(url).completions.create(model=MODEL, prompt="jane", max_tokens=3, stream=True)
        assert [next(stream).choices[0].text for _ in range(2)] == ["one", " two"]
        stream.close()
        until(lambda: events[-1]["event"] == "answered")
        assert (events[-1]["finish"], events[-1]["completion_tokens"]) == ("abandoned", 2)


def test_too_many_requests_are_429(gated, upstream):
    engine = engine_of(gated, upstream)
    with running(engine) as url:
        engine._num = engine.limits.max_batch + engine.limits.max_waiting
        with pytest.raises(openai.RateLimitError):
            client(url).completions.create(model=MODEL, prompt="jane")
        engine._num = 0


def test_a_revoked_prompt_is_sent_no_more(upstream):
    gated = make_gated("other")
    with running(engine_of(gated, upstream), admin_token=TOKEN) as url:
        ask = lambda: client(url).completions.create(model=MODEL, prompt="text of doe")  # noqa: E731
        ask()
        gone = HTTP.delete(f"{url}/admin/prompts/other", headers={"Authorization": f"Bearer {TOKEN}"})
        assert gone.status_code == 200
        ask()
    assert [sorted({"prompt", "prompt_embeds"} & set(body)) for body in upstream.bodies] == [
        ["prompt_embeds"],
        ["prompt"],
    ]


def test_another_payload_may_be_given(gated, upstream):
    calls = []

    def payload(ids, name, position):
        calls.append((list(ids), name, position))
        return {"prompt_embeds": "own"}

    with running(engine_of(gated, upstream, payload=payload)) as url:
        client(url).completions.create(model=MODEL, prompt="jane")
    assert calls == [(gated.tokenizer("jane")["input_ids"], "default", 0)]
    assert upstream.bodies[0]["prompt_embeds"] == "own"


def test_prefixes_are_refused():
    with pytest.raises(ValueError, match="embeddings alone"):
        VllmEngine(ServedPrompts(make_gated(prompt_type="prefix_tuning")), Limits(), "http://127.0.0.1:9", "base")


def test_a_refusal_is_answered_without_vllm_also_where_there_is_none(gated, upstream):
    """As `generate` of the refusal by itself answers: whole, in parts, and in a conversation."""
    refusal, events = refusal_of(gated), []
    served = ServedPrompts(gated, refusals={"no": refusal})
    chat = [{"role": "user", "content": "the plot"}]
    text, num = by_itself(refusal, gated.tokenizer("the plot")["input_ids"])
    said, num_said = by_itself(refusal, rendered(gated, chat))
    with running(VllmEngine(served, Limits(), upstream.url, "base"), events.append) as url:
        options = {"model": MODEL, "prompt": "the plot", "max_tokens": 8}
        found = client(url).completions.create(**options)
        assert (found.choices[0].text, found.choices[0].finish_reason) == (text, "stop")
        assert found.usage.completion_tokens == num
        chunks = list(client(url).completions.create(stream=True, **options))
        assert [one.choices[0].text for one in chunks] == [" unknown", " film", " good", ""]
        answer = client(url).chat.completions.create(model=MODEL, messages=chat)
        assert (answer.choices[0].message.content, answer.usage.completion_tokens) == (said, num_said)
        stopped = client(url).completions.create(**options, stop=["film"])
        assert (stopped.choices[0].text, stopped.choices[0].finish_reason) == (" unknown ", "stop")
        assert upstream.bodies == []
        client(url).completions.create(**options | {"prompt": "jane and the plot"})  # the prompt's gate is first
        assert list({"prompt", "prompt_embeds"} & set(upstream.bodies[0])) == ["prompt_embeds"]
    answered = [one for one in events if one["event"] == "answered"]
    assert [one["request"] for one in answered] == ["no"] * 4 + ["default"]
    with running(VllmEngine(served, Limits(), "http://127.0.0.1:9", "base")) as url:
        assert client(url).completions.create(**options).choices[0].text == text


def test_a_prefix_is_refused_beside_a_refusal_too_and_a_refusal_alone_is_served():
    gated = make_gated(prompt_type="prefix_tuning")
    with pytest.raises(ValueError, match="embeddings alone"):
        VllmEngine(ServedPrompts(gated, refusals={"no": refusal_of(gated)}), Limits(), "http://127.0.0.1:9", "base")
    refusals = {"no": refusal_of(gated)}
    gated.delete_adapter("default")
    engine = VllmEngine(ServedPrompts(gated, refusals=refusals), Limits(), "http://127.0.0.1:9", "base")
    with running(engine) as url:
        found = client(url).completions.create(model=MODEL, prompt="the plot")
    assert found.choices[0].text == " unknown film good"
