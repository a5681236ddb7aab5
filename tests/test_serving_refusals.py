"""Fixed refusals that are served, beside prompts and alone: each answer is that of `generate` by itself."""

from __future__ import annotations

import asyncio
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing

import openai
import pytest
from helpers import longrope_unlearner
from servers import (
    HTTP,
    MODEL,
    TOKEN,
    alone,
    answered,
    by_itself,
    client,
    jobs_of,
    joined,
    make_engine,
    make_gated,
    refusal_of,
    rendered,
    running,
)

from spul.serving.engine import Job
from spul.serving.errors import ApiError
from spul.serving.loading import without_prompts
from spul.serving.requests import Sampling

GREEDY = Sampling(temperature=0)
TEXTS = ["about jane is the film good", "the film is", "text of doe", "jane", "doe is good " * 3]
LONG = "the film is good and the plot is bad"
NUMS = [3, 8, 12, 1, 5]
OPTIONS = {"model": MODEL, "temperature": 0, "max_tokens": 8}
ADMIN = {"Authorization": f"Bearer {TOKEN}"}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_rows_of_prompts_refusals_and_the_base_that_come_together_are_answered_as_alone(monkeypatch, family):
    gated, calls = make_gated("other", family=family), []
    refusal = refusal_of(gated, "film")
    texts = [*TEXTS, "film of jane", "a film"]  # the prompt stands before the refusal
    names, nums = ["default", "no", "other", "default", "other", "default", "no"], [*NUMS, 4, 2]
    ids = [gated.tokenizer(text)["input_ids"] for text in texts]
    expected = [
        by_itself(refusal, one, num)[0] if name == "no" else alone(gated, one, name, num)[0]
        for one, name, num in zip(ids, names, nums, strict=True)
    ]
    assert expected[1] == " unknown film good"
    assert expected[-1] == " unknown film"  # cut where it has its most tokens
    engine, generate = make_engine(gated, refusals={"no": refusal}, gather_seconds=0.5), gated.unlearner.generate
    monkeypatch.setattr(gated.unlearner, "generate", lambda *a, **k: calls.append(len(a[0])) or generate(*a, **k))
    jobs = jobs_of(gated, texts, nums)
    assert answered(engine, jobs) == expected
    assert [job.prompt.get("name", "__base__") for job in jobs] == names
    assert calls == [5]


def test_where_refusals_alone_are_served_the_model_is_asked_only_what_no_gate_flags():
    plain = make_gated()
    gated = without_prompts(plain.get_base_model(), plain.tokenizer)
    refusal, seen = refusal_of(gated, "film"), []
    ids = [gated.tokenizer(text)["input_ids"] for text in ("a film", "about jane")]
    expected = [by_itself(refusal, one)[0] for one in ids]
    assert expected[1] == alone(plain, ids[1], "__base__")[0]
    gated.get_base_model().register_forward_pre_hook(lambda *_: seen.append(1))
    assert answered(make_engine(gated, refusals={"no": refusal}), [Job(ids[0], GREEDY, 8)]) == expected[:1]
    assert not seen
    jobs = [Job(one, GREEDY, 8) for one in ids]
    assert answered(make_engine(gated, refusals={"no": refusal}, gather_seconds=0.5), jobs) == expected
    assert seen


def test_without_prompts_requests_on_both_sides_of_the_switch_of_longrope_are_answered_as_alone():
    plain = make_gated()
    gated = without_prompts(longrope_unlearner().get_base_model(), plain.tokenizer)
    ids = [
        gated.tokenizer(text)["input_ids"][:num] for text, num in (("the film is good", 3), (LONG, 14), ("plot", 2))
    ]
    assert [len(one) for one in ids] == [3, 14, len(ids[2])]
    expected = [alone(gated, one, "__base__", 4)[0] for one in ids]
    jobs = [Job(one, GREEDY, 4) for one in ids]
    assert (
        answered(make_engine(gated, refusals={"no": refusal_of(gated, "jane")}, gather_seconds=0.5), jobs) == expected
    )


@pytest.mark.parametrize("stop", ["known", " film", "m g", "unknown film good", "no such text"])
def test_a_stop_text_ends_a_refusal_before_it_after_as_many_tokens_as_generate(stop):
    gated = make_gated()
    refusal, ids = refusal_of(gated, "film"), gated.tokenizer("a film")["input_ids"]
    engine = make_engine(gated, refusals={"no": refusal})

    async def run():
        engine.start()
        async with aclosing(engine.answer(Job(ids, Sampling(temperature=0, stop=(stop,)), 8))) as pieces:
            found = [piece async for piece in pieces]
        await engine.stop()
        return found

    found = asyncio.run(run())
    text, num = by_itself(refusal, ids, stop_strings=[stop])
    whole = "".join(piece.text for piece in found)
    assert whole == " unknown film good".split(stop)[0]
    assert text.startswith(whole)
    assert (found[-1].num_tokens, found[-1].finish_reason) == (num, "stop")


def test_a_refusal_that_is_revoked_while_it_is_read_is_read_to_its_end_and_one_that_waits_is_not_answered():
    gated = make_gated()
    refusal, ids = refusal_of(gated, "film"), gated.tokenizer("a film")["input_ids"]
    engine = make_engine(gated, refusals={"no": refusal})

    async def run():
        engine.start()
        async with aclosing(engine.answer(Job(ids, GREEDY, 8))) as pieces:
            text = (await anext(pieces)).text
            before = engine.served.routes
            [gone] = await engine.change(lambda served: served.revoke("no"))
            text += "".join([piece.text async for piece in pieces])
        with pytest.raises(ApiError, match="the prompts changed"):
            await joined(engine, Job(ids, GREEDY, 8, routes=before))
        found = text, gone["name"], await joined(engine, Job(ids, GREEDY, 8))
        await engine.stop()
        return found

    assert asyncio.run(run()) == (" unknown film good", "no", alone(gated, ids, "__base__")[0])


def test_a_refusal_that_is_closed_early_or_fails_leaves_the_engine_as_it_was(monkeypatch, caplog):
    gated = make_gated()
    refusal, ids = refusal_of(gated, "film"), gated.tokenizer("a film")["input_ids"]
    engine = make_engine(gated, refusals={"no": refusal})

    async def run():
        engine.start()
        pieces = engine.answer(Job(ids, GREEDY, 8))
        await anext(pieces)
        await pieces.aclose()
        with monkeypatch.context() as broken:
            broken.setattr(refusal, "refusal_ids", lambda ids: 1 / 0)
            with pytest.raises(ApiError) as caught:
                await joined(engine, Job(ids, GREEDY, 8))
        found = caught.value.status, engine.num_waiting, await joined(engine, Job(ids, GREEDY, 8))
        await engine.stop()
        return found

    assert asyncio.run(run()) == (500, 0, " unknown film good")
    assert "division by zero" in caplog.text


def test_a_request_on_which_the_gate_of_a_refusal_fails_is_refused():
    def broken(texts):
        raise RuntimeError("no light")

    gated = make_gated()
    engine = make_engine(gated, refusals={"no": refusal_of(gated, broken)})
    assert answered(engine, jobs_of(gated, ["good", "jane"], [8, 3])) == [
        *(" unknown film good", alone(gated, gated.tokenizer("jane")["input_ids"], "default", 3)[0])
    ]
    assert engine.served.gate_failures == 2


# ---- by OpenAI's API ----


def test_a_refusal_is_answered_whole_and_in_parts_with_usage_and_what_is_refused_is_refused():
    gated, events = make_gated(), []
    refusal, chat = refusal_of(gated), [{"role": "user", "content": "the plot"}]
    text, num = by_itself(refusal, gated.tokenizer("the plot")["input_ids"])
    said, num_said = by_itself(refusal, rendered(gated, chat))
    with running(make_engine(gated, refusals={"no": refusal}), events.append) as url:
        ask = client(url)
        found = ask.completions.create(prompt="the plot", **OPTIONS)
        assert (found.choices[0].text, found.choices[0].finish_reason) == (text, "stop")
        assert found.usage.completion_tokens == num == 4
        answer = ask.chat.completions.create(messages=chat, **OPTIONS)
        assert (answer.choices[0].message.content, answer.usage.completion_tokens) == (said, num_said)
        options = {**OPTIONS, "stream": True, "stream_options": {"include_usage": True}}
        chunks = list(ask.completions.create(prompt="the plot", **options))
        assert [one.choices[0].text for one in chunks[:-1]] == [" unknown", " film", " good", ""]
        assert (chunks[-2].choices[0].finish_reason, chunks[-1].usage) == ("stop", found.usage)
        parts = list(ask.chat.completions.create(messages=chat, **options))
        assert "".join(one.choices[0].delta.content for one in parts[:-1]) == said
        assert parts[0].choices[0].delta.role == "assistant"
        short = ask.completions.create(prompt="the plot", **OPTIONS | {"max_tokens": 2})
        assert (short.choices[0].text, short.choices[0].finish_reason) == (" unknown film", "length")
        for unsupported in ({"n": 3}, {"logprobs": 2}):
            with pytest.raises(openai.BadRequestError, match="not supported"):
                ask.completions.create(prompt="the plot", **OPTIONS, **unsupported)
        health = HTTP.get(f"{url}/health").json()
    assert (health["prompts"], health["gate_failures"]) == (2, 0)
    noted = [one for one in events if one["event"] == "answered"]
    assert [(one["request"], one["gate"], one["prompt_sha256"]) for one in noted] == [("no", "names", None)] * 5
    assert [one["completion_tokens"] for one in noted] == [num, num_said, num, num_said, 2]


def test_under_load_while_refusals_come_and_go_every_answer_is_the_one_that_its_entry_names(tmp_path):
    """Of prompts, refusals and the base; what each should be is computed one by one, without the server."""
    events, gated, plain, draws = [], make_gated("other"), make_gated("other"), random.Random(0)
    refusal_of(plain, "plot").save_pretrained(tmp_path / "no")
    requests = [f"{draws.choice(['jane', 'doe', 'good', 'plot', 'plot'])} {i}" for i in range(60)]
    done, body = threading.Event(), {"name": "no", "folder": "no"}

    def come_and_go(url):
        while not done.is_set():
            assert HTTP.post(f"{url}/admin/prompts", headers=ADMIN, json=body).status_code == 201
            done.wait(0.1)
            assert HTTP.delete(f"{url}/admin/prompts/no", headers=ADMIN).status_code == 200
            done.wait(0.1)

    def asked(i):
        options = {**OPTIONS, "prompt": requests[i], "max_tokens": 2 + i % 4}
        if i % 2:
            chunks = list(ask.completions.create(stream=True, **options))
            return chunks[0].id, "".join(one.choices[0].text for one in chunks)
        found = ask.completions.create(**options)
        return found.id, found.choices[0].text

    with running(make_engine(gated, tmp_path), events.append, TOKEN) as url, ThreadPoolExecutor(9) as pool:
        ask = client(url, max_retries=20)
        changing = pool.submit(come_and_go, url)
        try:
            found = list(ThreadPoolExecutor(8).map(asked, range(60)))
        finally:
            done.set()
        changing.result()
    given = {one["answer"]: one["request"] or "__base__" for one in events if one["event"] == "answered"}
    assert {"no", "__base__"} <= set(given.values())
    refusal = refusal_of(plain, "plot")
    for i, (key, text) in enumerate(found):
        name, ids, num = given[key], plain.tokenizer(requests[i])["input_ids"], 2 + i % 4
        if "plot" not in requests[i]:
            assert name == ("default" if "jane" in requests[i] else "other" if "doe" in requests[i] else "__base__")
        assert text == (by_itself(refusal, ids, num)[0] if name == "no" else alone(plain, ids, name, num)[0])
