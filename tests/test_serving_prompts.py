"""Prompts that come and go by the server's endpoints, while requests are answered and wait."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from servers import (
    HTTP,
    MODEL,
    TOKEN,
    alone,
    client,
    make_engine,
    make_gated,
    prompt,
    running,
    until,
)

from spul.gates import NameGate
from spul.serving.requests import Limits
from spul.serving.server import make_app

GREEDY = {"model": MODEL, "temperature": 0, "max_tokens": 8}
ADMIN = {"Authorization": f"Bearer {TOKEN}"}


@pytest.fixture
def saved(tmp_path):
    """A folder with a prompt and its gate to add: `new`, on requests about the plot."""
    folder = tmp_path / "prompts"
    model = make_gated("new", new=lambda texts: ["plot" in text for text in texts])
    prompt(model.unlearner, "new", 7)
    model.unlearner.save_pretrained(str(folder), selected_adapters=["new"])
    NameGate(["plot"]).save(folder / "new" / "gate")
    return folder


def test_a_prompt_whose_entry_cannot_be_recorded_is_not_served(saved):
    broken = False

    def record(event):
        if broken:
            raise OSError("the disk is full")

    engine = make_engine(make_gated(), saved)
    with running(engine, record, TOKEN) as url:
        broken = True
        said = HTTP.post(f"{url}/admin/prompts", headers=ADMIN, json={"name": "new", "folder": "new"})
        assert said.status_code == 500
        assert "was not added" in said.text
        assert list(engine.served.served) == ["default"]
        said = HTTP.delete(f"{url}/admin/prompts/default", headers=ADMIN)
        assert said.status_code == 500
        assert "was revoked" in said.text
        assert not engine.served.served
        broken = False


def test_a_prompt_is_added_and_revoked_by_who_has_the_token(saved):
    events, gated = [], make_gated()
    ids = gated.tokenizer("the plot is good")["input_ids"]
    with running(make_engine(gated, saved), events.append, TOKEN) as url:

        def call():
            return client(url).completions.create(prompt="the plot is good", **GREEDY).choices[0].text

        before = call()
        path, body = f"{url}/admin/prompts", {"name": "new", "folder": "new"}
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": TOKEN}):
            refused = [HTTP.get(path, headers=headers), HTTP.post(path, headers=headers, json=body),
                       HTTP.delete(f"{path}/default", headers=headers)]  # fmt: skip
            assert [one.status_code for one in refused] == [401] * 3
        added = HTTP.post(path, headers=ADMIN, json=body)
        assert (added.status_code, added.json()["gate"]) == (201, "names")
        assert HTTP.post(path, headers=ADMIN, json=body).status_code == 409
        under = call()
        assert under == alone(gated, ids, "new")[0] != before
        assert HTTP.delete(f"{path}/nobody", headers=ADMIN).status_code == 404
        gone = HTTP.delete(f"{path}/new", headers=ADMIN).json()["revoked"]
        assert [one["name"] for one in gone] == ["new"]
        assert call() == before
        listed = HTTP.get(path, headers=ADMIN).json()
        assert [[one["name"] for one in listed[kind]] for kind in ("served", "revoked")] == [["default"], ["new"]]
        assert HTTP.get(f"{url}/health").json()["revoked"] == 1
        assert HTTP.delete(f"{path}/default", headers=ADMIN).status_code == 200  # the last one: every request is bare
        assert client(url).completions.create(prompt="jane", **GREEDY).choices[0].text
        assert HTTP.post(path, headers=ADMIN, json=body).status_code == 201
        assert call() == under
    assert [(one["event"], one["request"]) for one in events] == [
        ("served", "default"), ("answered", None), ("served", "new"), ("answered", "new"), ("revoked", "new"),
        ("answered", None), ("revoked", "default"), ("answered", None), ("served", "new"), ("answered", "new"),
        ("stopped", "new"),
    ]  # fmt: skip
    assert events[2]["prompt_sha256"] == gated.unlearner.spul_configs["new"].weights_sha256 is not None


def test_after_the_last_prompt_one_of_another_kind_is_added(saved):
    gated = make_gated(prompt_type="p_tuning")
    with running(make_engine(gated, saved), admin_token=TOKEN) as url:
        path, body = f"{url}/admin/prompts", {"name": "new", "folder": "new"}
        refused = HTTP.post(path, headers=ADMIN, json=body)
        assert (refused.status_code, "one model holds prompts of one kind" in refused.text) == (400, True)
        assert HTTP.delete(f"{path}/default", headers=ADMIN).status_code == 200
        assert HTTP.post(path, headers=ADMIN, json=body).status_code == 201
        ids = gated.tokenizer("the plot is good")["input_ids"]
        found = client(url).completions.create(prompt="the plot is good", **GREEDY).choices[0].text
        assert found == alone(gated, ids, "new")[0] != alone(gated, ids, "__base__")[0]


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_whose_prompt_gives_way_to_another_of_its_name_while_it_waits_is_refused(saved, stream):
    held, seen, events = {word: threading.Event() for word in ("good", "film")}, set(), []

    def gate(texts):
        for word in held:
            if any(word in text for text in texts):
                seen.add(word)
                assert held[word].wait(60)
        return ["jane" in text for text in texts]

    model = make_gated(default=gate)
    model.load_adapter(saved / "new", "new")
    engine = make_engine(model, saved, max_batch=1)
    with running(engine, events.append, TOKEN) as url, ThreadPoolExecutor(5) as pool:
        ask = client(url).completions.create
        others = [pool.submit(ask, prompt="good", **GREEDY)]
        until(lambda: "good" in seen)
        others.append(pool.submit(ask, prompt="film", **GREEDY))
        until(lambda: engine.num_waiting == 1)
        waits = pool.submit(ask, prompt="the plot", stream=stream, **GREEDY)
        until(lambda: engine.num_waiting == 2)
        gone = pool.submit(HTTP.delete, f"{url}/admin/prompts/new", headers=ADMIN)
        until(lambda: engine._changes)
        held["good"].set()
        assert gone.result().status_code == 200
        until(lambda: "film" in seen)
        body = {"name": "new", "folder": "new"}
        added = pool.submit(HTTP.post, f"{url}/admin/prompts", headers=ADMIN, json=body)
        until(lambda: engine._changes)
        held["film"].set()
        with pytest.raises(openai.InternalServerError, match="the prompts changed while the request waited") as caught:
            waits.result()
        assert (caught.value.status_code, caught.value.code) == (503, "prompts_changed")
        assert added.result().status_code == 201
        assert all(one.result().choices[0].finish_reason for one in others)
        assert ask(prompt="the plot", **GREEDY).choices[0].text  # who asks again is answered under the new one
    assert [one["event"] for one in events if one["request"] == "new"] == [
        *("served", "revoked", "served", "answered", "stopped")
    ]


def test_under_load_while_prompts_come_and_go_every_answer_is_that_of_its_own_prompt(saved):
    """200 requests at concurrency 16; what each should be is computed one by one, without the server."""
    events, gated, plain = [], make_gated("other"), make_gated("other")
    plain.load_adapter(saved / "new", "new")
    draws, subjects = random.Random(0), ["jane", "doe", "good film", "plot"]
    requests = [f"{draws.choice(subjects)} {'is good ' * draws.randrange(4)}{i}" for i in range(200)]
    done, changes = threading.Event(), []

    def come_and_go(url):
        path = f"{url}/admin/prompts"
        while not done.is_set():
            start = time.monotonic()
            assert HTTP.post(path, headers=ADMIN, json={"name": "new", "folder": "new"}).status_code == 201
            added = time.monotonic()
            time.sleep(0.2)
            end = time.monotonic()
            assert HTTP.delete(f"{path}/new", headers=ADMIN).status_code == 200
            changes.append((start, added, end, time.monotonic()))
            time.sleep(0.2)

    def answered(i):
        start = time.monotonic()
        options = {**GREEDY, "prompt": requests[i], "max_tokens": 3 + i % 8}
        if i % 2:
            chunks = list(ask.completions.create(stream=True, **options))
            return chunks[0].id, "".join(one.choices[0].text for one in chunks), start, time.monotonic()
        found = ask.completions.create(**options)
        return found.id, found.choices[0].text, start, time.monotonic()

    with running(make_engine(gated, saved), events.append, TOKEN) as url, ThreadPoolExecutor(17) as pool:
        ask = client(url, max_retries=20)  # who waits while its prompt is revoked is refused, and asks again
        changing = pool.submit(come_and_go, url)
        try:
            found = list(ThreadPoolExecutor(16).map(answered, range(200)))
        finally:
            done.set()
        changing.result()
    given = {one["answer"]: one["request"] for one in events if one["event"] == "answered"}
    assert len(given) == len(found) == 200
    of_plot = {"new": 0, "__base__": 0}
    for i, (key, text, start, end) in enumerate(found):
        name = given[key] or "__base__"
        if "plot" in requests[i]:
            of_plot[name] += 1
            if any(added < start and end < gone for _, added, gone, _ in changes):
                assert name == "new"
            if all(end < begun or gone < start for begun, *_, gone in changes):
                assert name == "__base__"
        else:
            assert name == ("default" if "jane" in requests[i] else "other" if "doe" in requests[i] else "__base__")
        assert text == alone(plain, plain.tokenizer(requests[i])["input_ids"], name, 3 + i % 8)[0], requests[i]
    assert min(of_plot.values()) > 0
    assert len(changes) > 2


def test_a_short_token_is_refused():
    with pytest.raises(ValueError, match="16 or more"):
        make_app(make_engine(make_gated()), MODEL, Limits(), admin_token="short")
    for token in ("long enough but spaced", "lang-genug-aber-ä", "\ufefflong-enough-but-marked"):
        with pytest.raises(ValueError, match="white space in it, or a character outside ASCII"):
            make_app(make_engine(make_gated()), MODEL, Limits(), admin_token=token)
