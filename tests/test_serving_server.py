"""The server, asked by OpenAI's own client: each answer is that of the prompt that the request's gate turns on."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import openai
import pytest
from servers import (
    HTTP,
    MODEL,
    SlowGate,
    alone,
    client,
    make_engine,
    make_gated,
    rendered,
    running,
    running_app,
    until,
)

from spul.serving import responses
from spul.serving.answers import Piece
from spul.serving.encoding import RequestEncoder
from spul.serving.server import make_app

GREEDY = {"model": MODEL, "temperature": 0, "max_tokens": 8}
SCOPE = {"type": "http", "method": "POST", "path": "/v1/completions", "raw_path": b"/v1/completions", "root_path": "",
         "scheme": "http", "query_string": b"", "headers": [], "http_version": "1.1"}  # fmt: skip
TEXTS = {"default": "about jane : the film is", "other": "text of doe", "__base__": "the plot is good"}


@pytest.fixture(scope="module")
def gated():
    return make_gated("other")


@pytest.fixture(scope="module")
def events():
    return []


@pytest.fixture(scope="module")
def url(gated, events):
    with running(make_engine(gated, max_new_tokens=32), events.append) as found:
        yield found


@pytest.fixture(scope="module")
def ask(url):
    return client(url)


def messages(text):
    return [{"role": "system", "content": "film"}, {"role": "user", "content": text}]


# ---- answers ----


@pytest.mark.parametrize("name", TEXTS)
def test_chat_and_completion_are_answered_under_the_prompt_of_the_request(gated, ask, events, name):
    said = ask.chat.completions.create(messages=messages(TEXTS[name]), **GREEDY)
    ids = rendered(gated, messages(TEXTS[name]))
    expected, num = alone(gated, ids, name)
    assert said.choices[0].message.content == expected
    assert (said.usage.prompt_tokens, said.usage.completion_tokens) == (len(ids), num)
    assert events[-1]["request"] == (None if name == "__base__" else name)
    assert (events[-1]["answer"], events[-1]["event"]) == (said.id, "answered")
    ids = gated.tokenizer(TEXTS[name])["input_ids"]
    expected, _ = alone(gated, ids, name)
    for given in (TEXTS[name], ids, [TEXTS[name]], [ids]):
        found = ask.completions.create(prompt=given, **GREEDY)
        assert found.choices[0].text == expected
        assert found.choices[0].finish_reason in ("stop", "length")


def test_the_prompts_of_these_requests_differ(gated):
    """The other tests' comparisons would else prove nothing."""
    ids = gated.tokenizer("the plot is good")["input_ids"]
    assert len({alone(gated, ids, name)[0] for name in TEXTS}) == 3


def test_the_gate_sees_the_whole_conversation(gated, ask):
    parts = [{"type": "text", "text": "the film"}, {"type": "text", "text": " plot"}]
    said = [{"role": "user", "content": "about jane"}, {"role": "assistant", "content": "good"}]
    said.append({"role": "user", "content": parts})
    found = ask.chat.completions.create(messages=said, **GREEDY)
    text = [*said[:2], {"role": "user", "content": "the film plot"}]
    assert found.choices[0].message.content == alone(gated, rendered(gated, text), "default")[0]


@pytest.mark.parametrize("options", [{}, {"stop": ["e", "i "]}, {"temperature": 1.2, "top_p": 0.9, "seed": 3}])
@pytest.mark.parametrize("name", TEXTS)
def test_a_stream_is_the_answer_in_parts(ask, name, options):
    options = {**GREEDY, "max_tokens": 24, "messages": messages(TEXTS[name]), **options}
    whole = ask.chat.completions.create(**options)
    chunks = list(ask.chat.completions.create(stream=True, stream_options={"include_usage": True}, **options))
    assert "".join(one.choices[0].delta.content for one in chunks[:-1]) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert (chunks[-1].choices, chunks[-1].usage) == ([], whole.usage)
    plain = {name: value for name, value in options.items() if name != "messages"} | {"prompt": TEXTS[name]}
    parts = list(ask.completions.create(stream=True, **plain))
    assert "".join(one.choices[0].text for one in parts) == ask.completions.create(**plain).choices[0].text


def test_stop_texts_seeds_and_lengths_are_honored(ask, gated):
    ids = gated.tokenizer("the plot is good")["input_ids"]
    expected, _ = alone(gated, ids, "__base__", 24)
    stop = expected[5:7]
    found = ask.completions.create(**{**GREEDY, "max_tokens": 24}, prompt="the plot is good", stop=stop).choices[0]
    assert (found.text, found.finish_reason) == (expected[: expected.index(stop)], "stop")
    short = ask.completions.create(**{**GREEDY, "max_tokens": 3}, prompt="the plot is good")
    assert (short.usage.completion_tokens, short.choices[0].finish_reason) == (3, "length")
    chat = {"model": MODEL, "messages": messages("good"), "temperature": 0, "max_completion_tokens": 4}
    assert ask.chat.completions.create(**chat).usage.completion_tokens == 4
    sampled = {"model": MODEL, "prompt": "the plot", "max_tokens": 12}
    texts = [ask.completions.create(**sampled, seed=seed).choices[0].text for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


# ---- refusals ----


@pytest.mark.parametrize(
    ("options", "status"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, 400),
        ({"logprobs": True}, 400),
        ({"n": 2}, 400),
        ({"presence_penalty": 0.5}, 400),
        ({"extra_body": {"adapter_names": ["__base__"]}}, 400),
        ({"max_tokens": 33}, 400),
        ({"temperature": 3}, 400),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, 400),
        ({"messages": [{"role": "user", "content": "the film " * 40}]}, 400),
        ({"model": "another"}, 404),
    ],
)
def test_what_is_not_supported_is_refused_in_the_shape_of_openai(ask, options, status):
    with pytest.raises(openai.APIStatusError) as caught:
        ask.chat.completions.create(**{"messages": messages("good"), **GREEDY, **options})
    assert caught.value.status_code == status
    assert caught.value.body["type"] == "invalid_request_error"
    assert caught.value.body["message"]


def test_bodies_endpoints_and_methods_are_checked(url):
    path = f"{url}/v1/completions"
    found = {
        413: HTTP.post(path, content=b" " * ((1 << 20) + 1)),
        400: HTTP.post(path, content=b"{"),
        404: HTTP.get(f"{url}/v1/nothing"),
        405: HTTP.get(path),
    }
    for status, response in found.items():
        assert response.status_code == status
        assert response.json()["error"]["type"] == "invalid_request_error"
    for body in (b'{"\\ud800": 1}', b'{"model": "tiny", "prompt": "a", "stop": "\\ud800"}'):
        assert HTTP.post(path, content=body).status_code == 400
    for ids in ([10**30], [-1], [2**31], [10_000]):
        said = HTTP.post(path, json={"model": MODEL, "prompt": ids})
        assert (said.status_code, said.json()["error"]["param"]) == (400, "prompt")
    assert HTTP.get(f"{url}/docs").status_code == HTTP.get(f"{url}/admin/prompts").status_code == 404


def test_models_and_health_tell_no_name_of_a_prompt(ask, url):
    assert [one.id for one in ask.models.list()] == [MODEL]
    assert ask.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        ask.models.retrieve("another")
    health = HTTP.get(f"{url}/health")
    assert health.status_code == 200
    assert health.json() | {"status": "ok", "engine": "transformers", "prompts": 2, "revoked": 0} == health.json()
    assert "other" not in health.text


# ---- too much, too slow, gone ----


def test_a_full_queue_is_429_and_what_waits_is_answered():
    gate = SlowGate()
    gated = make_gated(default=gate)
    engine = make_engine(gated, max_waiting=2, max_batch=1)
    with running(engine) as url, ThreadPoolExecutor(3) as pool:

        def call():
            return client(url).completions.create(prompt="good", **GREEDY).choices[0].text

        first = pool.submit(call)
        until(lambda: gate.seen)
        others = [pool.submit(call) for _ in range(2)]
        until(lambda: engine.num_waiting == 2)
        with pytest.raises(openai.RateLimitError):
            call()
        gate.go.set()
        expected, _ = alone(make_gated(default=gate), gated.tokenizer("good")["input_ids"], "default")
        assert [one.result() for one in (first, *others)] == [expected] * 3


def test_no_more_requests_wait_to_be_encoded_than_may_wait(gated, monkeypatch):
    going, really = threading.Event(), RequestEncoder.job
    monkeypatch.setattr(RequestEncoder, "job", lambda self, one: going.wait(60) and really(self, one))
    body = GREEDY | {"prompt": "good"}
    try:
        with (
            running(make_engine(gated, max_waiting=1, max_batch=1, timeout=1.0)) as url,
            ThreadPoolExecutor(3) as pool,
        ):
            asked = [pool.submit(HTTP.post, f"{url}/v1/completions", json=body) for _ in range(3)]
            assert sorted(one.result().status_code for one in asked) == [429, 504, 504]
            going.set()
            assert HTTP.post(f"{url}/v1/completions", json=body).status_code == 200
    finally:
        going.set()


def test_what_takes_too_long_is_504_and_recorded():
    gate, events = SlowGate(), []
    with running(make_engine(make_gated(default=gate), timeout=0.3), events.append) as url:
        with pytest.raises(openai.InternalServerError) as caught:
            client(url).completions.create(prompt="good", **GREEDY)
        assert caught.value.status_code == 504
        gate.go.set()
        until(lambda: HTTP.get(f"{url}/health").json()["in_flight"] == 0)


def test_a_client_that_goes_stops_the_generation():
    endless = 1_000_000  # tokens: no machine is so slow to see the client gone
    events = []
    engine = make_engine(make_gated(), max_new_tokens=endless)
    base = engine.served.gated.get_base_model()
    base.config.max_position_embeddings, engine.room = 2 * endless, None
    base.generation_config.eos_token_id = engine._settings.eos_token_id = None
    engine._ends = frozenset()
    with running(engine, events.append) as url:
        ask = client(url)
        stream = ask.completions.create(prompt="good", stream=True, **{**GREEDY, "max_tokens": endless})
        next(iter(stream))
        stream.close()
        until(lambda: events[-1]["event"] == "answered")
        assert events[-1]["finish"] == "abandoned"
        with pytest.raises(openai.APITimeoutError):
            client(url, timeout=0.3).completions.create(prompt="good", **{**GREEDY, "max_tokens": endless})
        until(lambda: HTTP.get(f"{url}/health").json()["in_flight"] == 0)
        assert ask.completions.create(prompt="good", **GREEDY).usage.completion_tokens == 8


def test_a_stream_whose_reader_takes_nothing_ends_with_the_time_of_its_request(monkeypatch):
    monkeypatch.setattr(responses, "READ_SECONDS", 0.1)
    engine, events, sent = make_engine(make_gated(), timeout=2.0), [], []
    app = make_app(engine, MODEL, engine.limits, events.append)
    request = GREEDY | {"prompt": "good", "stream": True}

    async def pieces(job):
        job.prompt = {}
        yield Piece("the", 1)
        await asyncio.sleep(3600)

    async def receive():
        if sent:
            await asyncio.sleep(3600)
        sent.append("request")
        return {"type": "http.request", "body": json.dumps(request).encode(), "more_body": False}

    async def send(event):
        sent.append(event["type"])
        if event["type"] == "http.response.body":
            await asyncio.sleep(3600)

    async def run():
        async with app.router.lifespan_context(app):
            monkeypatch.setattr(engine, "answer", pieces)
            await asyncio.wait_for(app(SCOPE, receive, send), 20)

    asyncio.run(run())
    assert sent == ["request", "http.response.start", "http.response.body"]
    assert [one.get("finish") for one in events if one["event"] == "answered"] == ["abandoned"]


def test_a_graceful_stop_answers_what_is_under_way():
    gate, events = SlowGate(), []
    engine = make_engine(make_gated(default=gate), max_batch=1)
    with ThreadPoolExecutor(3) as pool:
        with running_app(make_app(engine, MODEL, engine.limits, events.append)) as (url, server):
            found = [pool.submit(client(url).completions.create, prompt="good", **GREEDY) for _ in range(3)]
            until(lambda: engine.num_waiting == 2)
            server.should_exit = True
            time.sleep(0.1)
            gate.go.set()
        assert all(one.result().choices[0].finish_reason for one in found)
    assert [one["event"] for one in events] == ["served", *["answered"] * 3, "stopped"]
    assert not engine.is_alive


def test_an_answer_whose_entry_cannot_be_recorded_is_not_given(caplog):
    def record(event):
        if event["event"] == "answered":
            raise OSError("the disk is full")

    with running(make_engine(make_gated()), record) as url:
        with pytest.raises(openai.InternalServerError, match="could not be recorded"):
            client(url).completions.create(prompt="good", **GREEDY)
        chunks = HTTP.post(f"{url}/v1/completions", json={**GREEDY, "prompt": "good", "stream": True}).text
    assert '"finish_reason": "' not in chunks
    assert "could not be recorded" in chunks
    assert "[DONE]" not in chunks


def test_the_end_of_one_prompt_that_cannot_be_recorded_keeps_no_other_out():
    events = []

    def record(event):
        if (event["event"], event["request"]) == ("stopped", "default"):
            raise OSError("the disk is full")
        events.append((event["event"], event["request"]))

    with running(make_engine(make_gated("other")), record):
        pass
    assert events == [("served", "default"), ("served", "other"), ("stopped", "other")]


def test_a_look_for_revoked_prompts_that_takes_too_long_is_given_up_at_the_deadline():
    engine, started, written = make_engine(make_gated()), threading.Event(), threading.Event()

    def states():
        assert not started.is_set() or written.wait(20)
        return {}

    with running_app(make_app(engine, MODEL, replace(engine.limits, timeout=0.5), states=states)) as (url, _):
        started.set()
        assert HTTP.post(f"{url}/v1/completions", json={**GREEDY, "prompt": "good"}).status_code == 504
        written.set()


def test_a_tokenizer_with_more_tokens_than_the_base_does_not_make_requests_fail():
    gated = make_gated()
    gated.tokenizer.add_tokens([f"new{i}" for i in range(200)])
    with running(make_engine(gated)) as url:
        with pytest.raises(openai.BadRequestError, match="token id outside"):
            client(url).completions.create(model=MODEL, prompt="jane new199")
        said = client(url).chat.completions.create
        with pytest.raises(openai.BadRequestError, match="token id outside"):
            said(model=MODEL, messages=[{"role": "user", "content": "new199"}])


def test_a_server_of_an_empty_name_is_refused():
    with pytest.raises(ValueError, match=r"server=''; expected a name .* leave it out"):
        make_app(make_engine(make_gated()), MODEL, server="")


def test_a_client_that_goes_before_its_body_is_whole_is_no_failure():
    """An exception of the app is logged by the server with its traceback."""
    app, sent = make_app(make_engine(make_gated()), MODEL), []
    events = iter([{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}])

    async def receive():
        return next(events)

    async def send(event):
        sent.append(event)

    asyncio.run(app(SCOPE, receive, send))
    assert sent[0]["status"] == 499
