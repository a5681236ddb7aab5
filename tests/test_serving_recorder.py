"""A server and its ledger: what is revoked while a request waits, received anew, and noted by several servers."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import openai
import pytest
from servers import HTTP, MODEL, TOKEN, SlowGate, alone, client, make_engine, make_gated, prompt, running_app, until

from spul.gates import GatedUnlearner, NameGate
from spul.records import Ledger, LedgerEvent, LedgerFollower
from spul.serving.server import make_app

ADMIN = {"Authorization": f"Bearer {TOKEN}"}
GREEDY = {"model": MODEL, "temperature": 0, "max_tokens": 6}


@pytest.fixture
def ledger(tmp_path):
    found = Ledger(tmp_path / "ledger.jsonl")
    for name in ("default", "other"):
        found.append(LedgerEvent("received", name))
    return found


@contextmanager
def serving(ledger, engine, server=None, record=None):
    """The address of a server of an engine that notes what it does in a ledger, and follows it."""
    states = LedgerFollower(ledger.path).states
    note = record or (lambda event: ledger.append(LedgerEvent(**event)))
    app = make_app(engine, MODEL, record=note, admin_token=TOKEN, states=states, server=server)
    with running_app(app) as (url, _):
        yield url


def asked(url, text, **options):
    return client(url).completions.create(prompt=text, **GREEDY, **options)


def names_of(ledger, name):
    """Events of a request, in order."""
    return [entry.event for entry in ledger.entries() if entry.request == name]


# ---- revoked while a request waits ----


@pytest.mark.parametrize("by", ["another program", "another program, and a request follows", "the endpoint"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_request_whose_prompt_is_revoked_while_it_waits_is_refused_before_its_first_token(ledger, by, stream):
    gate = SlowGate("jane")
    engine = make_engine(make_gated("other", default=gate), max_batch=1)
    plain = make_gated("other")
    bare, under = (
        alone(plain, plain.tokenizer(text)["input_ids"], name, 6)[0]
        for text, name in (("of doe", "__base__"), ("about jane", "default"))
    )
    with serving(ledger, engine) as url, ThreadPoolExecutor(6) as pool:
        first = pool.submit(asked, url, "the plot")
        until(lambda: gate.seen)
        waits = pool.submit(asked, url, "of doe", stream=stream)
        until(lambda: engine.num_waiting == 1)
        others = pool.submit(asked, url, "about jane")
        until(lambda: engine.num_waiting == 2)
        if by == "the endpoint":
            change = pool.submit(HTTP.delete, f"{url}/admin/prompts/other", headers=ADMIN)
        else:
            ledger.append(LedgerEvent("revoked", "other"))
        if by.endswith("follows"):
            change = pool.submit(HTTP.get, f"{url}/admin/prompts", headers=ADMIN)
        if not by.endswith("program"):
            until(lambda: engine._changes)
        gate.go.set()
        with pytest.raises(openai.InternalServerError, match="the prompts changed while the request waited") as caught:
            waits.result()
        assert (caught.value.status_code, caught.value.code) == (503, "prompts_changed")
        assert caught.value.response.headers["Retry-After"] == "1"
        assert first.result().choices[0].finish_reason
        assert others.result().choices[0].text == under  # its own prompt is still served
        if not by.endswith("program"):
            assert change.result().status_code == 200
        assert asked(url, "of doe").choices[0].text == bare
    assert "answered" not in names_of(ledger, "other")
    assert ledger.states()["other"].answered_after == 0


def test_a_request_that_is_read_by_its_gates_when_its_prompt_is_revoked_is_refused(ledger):
    gate = SlowGate("jane")
    with serving(ledger, make_engine(make_gated("other", default=gate))) as url, ThreadPoolExecutor(1) as pool:
        reads = pool.submit(asked, url, "of doe")
        until(lambda: gate.seen)
        ledger.append(LedgerEvent("revoked", "other"))
        gate.go.set()
        with pytest.raises(openai.InternalServerError, match="the prompts changed"):
            reads.result()
    assert names_of(ledger, "other") == ["received", "served", "revoked", "stopped"]


def test_where_the_ledger_cannot_be_read_any_more_what_waits_is_not_answered(ledger):
    gate = SlowGate("jane")
    with serving(ledger, make_engine(make_gated("other", default=gate))) as url, ThreadPoolExecutor(1) as pool:
        reads = pool.submit(asked, url, "of doe")
        until(lambda: gate.seen)
        whole = ledger.path.read_bytes()
        ledger.path.write_bytes(whole + b"not an entry\n")
        gate.go.set()
        with pytest.raises(openai.InternalServerError, match="the record of revoked prompts could not be read"):
            reads.result()
        ledger.path.write_bytes(whole)
        assert asked(url, "of doe").id
    assert names_of(ledger, "other").count("answered") == 1


# ---- received anew ----


def test_a_prompt_whose_request_is_received_anew_is_served_again_where_it_stood(ledger, caplog):
    engine, plain = make_engine(make_gated("other")), make_gated("other")
    ids = plain.tokenizer("jane or doe")["input_ids"]  # both gates flag it
    texts = {name: alone(plain, ids, name, 6)[0] for name in ("default", "other", "__base__")}
    assert len(set(texts.values())) == 3
    steps = [("revoked", "default", "other"), ("revoked", "other", "__base__"), ("received", "other", "other"),
             ("received", "default", "default")]  # fmt: skip
    with serving(ledger, engine) as url:
        assert asked(url, "jane or doe").choices[0].text == texts["default"]
        for event, name, then in steps:
            ledger.append(LedgerEvent(event, name))
            assert asked(url, "jane or doe").choices[0].text == texts[then]
        listed = HTTP.get(f"{url}/admin/prompts", headers=ADMIN).json()
    assert ([one["name"] for one in listed["served"]], listed["withheld"]) == (["default", "other"], [])
    assert "Served again: 'other', since the request 'other' is one again" in caplog.text
    assert names_of(ledger, "other") == [
        *("received", "served", "answered", "revoked", "stopped", "received", "served", "answered", "stopped")
    ]
    assert not ledger.states()["other"].served_again


def test_a_request_that_is_revoked_and_received_between_two_looks_is_noted_as_served_anew(ledger):
    with serving(ledger, make_engine(make_gated("other"))) as url:
        for event in ("revoked", "received"):
            ledger.append(LedgerEvent(event, "other"))
        assert ledger.states()["other"].servers == {}
        asked(url, "of doe")
        asked(url, "of doe")
        assert ledger.states()["other"].now.startswith("served since ")
    assert names_of(ledger, "other") == [
        *("received", "served", "revoked", "received", "stopped", "served", "answered", "answered", "stopped")
    ]


def test_a_server_that_starts_after_a_request_was_received_anew_serves_it_without_more_ado(ledger, caplog):
    for event in ("revoked", "received"):
        ledger.append(LedgerEvent(event, "other"))
    with serving(ledger, make_engine(make_gated("other"))) as url:
        asked(url, "of doe")
    assert names_of(ledger, "other") == ["received", "revoked", "received", "served", "answered", "stopped"]
    assert not caplog.text


def test_a_request_that_was_trained_anew_waits_for_its_other_prompt_which_takes_the_place(ledger, tmp_path, caplog):
    new = make_gated("other")
    prompt(new.unlearner, "other", 7)
    new.unlearner.save_pretrained(str(tmp_path / "prompts"), selected_adapters=["other"])
    NameGate(["doe"]).save(tmp_path / "prompts" / "other" / "gate")
    ids = new.tokenizer("of doe")["input_ids"]
    bare, under = (alone(new, ids, name, 6)[0] for name in ("__base__", "other"))
    old = make_gated("other")
    old.save_pretrained(tmp_path / "old")
    engine = make_engine(old, tmp_path / "prompts")
    with serving(ledger, engine) as url:
        ledger.append(LedgerEvent("revoked", "other"))
        ledger.append(LedgerEvent.of_adapter("trained", "other", tmp_path / "prompts" / "other"))
        for _ in range(2):
            assert asked(url, "of doe").choices[0].text == bare
        assert caplog.text.count("The request 'other' was trained anew, as another prompt: add that one.") == 1
        body = {"name": "other", "folder": "nothing"}
        assert HTTP.post(f"{url}/admin/prompts", headers=ADMIN, json=body).status_code == 400
        assert list(engine.served.withheld) == ["other"]
        added = HTTP.post(f"{url}/admin/prompts", headers=ADMIN, json=body | {"folder": "other"})
        assert added.status_code == 201
        assert asked(url, "of doe").choices[0].text == under
        assert engine.served.withheld == {}


def test_while_the_prompt_that_takes_a_withheld_ones_place_loads_requests_are_answered(ledger, tmp_path, monkeypatch):
    make_gated("other").save_pretrained(tmp_path / "prompts")
    engine, loads, go = make_engine(make_gated("other"), tmp_path / "prompts"), threading.Event(), threading.Event()
    change = engine.change

    async def slow_change(action):
        loads.set()
        assert await asyncio.to_thread(go.wait, 60)
        return await change(action)

    with serving(ledger, engine) as url, ThreadPoolExecutor(2) as pool:
        ledger.append(LedgerEvent("revoked", "other"))
        ledger.append(LedgerEvent.of_adapter("trained", "other", tmp_path / "prompts" / "other"))
        asked(url, "of doe")
        assert list(engine.served.withheld) == ["other"]
        monkeypatch.setattr(engine, "change", slow_change)
        body = {"name": "other", "folder": "other"}
        added = pool.submit(HTTP.post, f"{url}/admin/prompts", headers=ADMIN, json=body)
        until(loads.is_set)
        try:
            assert pool.submit(asked, url, "of doe").result(20).choices[0].finish_reason
        finally:
            go.set()
        assert added.result().status_code == 201
        assert engine.served.withheld == {}


def test_a_withheld_prompt_stays_so_while_no_entry_says_what_was_trained_anew(ledger, tmp_path, caplog):
    model = make_gated("other")
    model.save_pretrained(tmp_path / "prompts")
    plain = make_gated("other")
    bare, under = (alone(plain, plain.tokenizer("of doe")["input_ids"], name, 6)[0] for name in ("__base__", "other"))
    with serving(ledger, make_engine(model)) as url:
        for event in ("revoked", "trained", "received"):  # in no order does it say which weights
            ledger.append(LedgerEvent(event, "other"))
            assert asked(url, "of doe").choices[0].text == bare
        warned = "The request 'other' was trained anew, as a prompt whose weights no entry names: add that one, or, if"
        assert caplog.text.count(warned) == 1
        assert "spul ledger add --ledger FILE --event trained --request other --adapter FOLDER" in caplog.text
        ledger.append(LedgerEvent.of_adapter("trained", "other", tmp_path / "prompts" / "other"))
        assert asked(url, "of doe").choices[0].text == under  # the entry names the one that is withheld
    assert not ledger.states()["other"].served_again


def test_a_prompt_that_comes_back_and_cannot_be_noted_is_not_served(ledger):
    broken = False

    def record(event):
        if broken:
            raise OSError("the disk is full")
        ledger.append(LedgerEvent(**event))

    engine = make_engine(make_gated("other"))
    with serving(ledger, engine, record=record) as url:
        ledger.append(LedgerEvent("revoked", "other"))
        asked(url, "of doe")
        ledger.append(LedgerEvent("received", "other"))
        broken = True
        with pytest.raises(openai.InternalServerError, match="could not be recorded"):
            asked(url, "of doe")
        assert list(engine.served.served) == ["default"]
        broken = False
        asked(url, "of doe")
        assert list(engine.served.served) == ["default", "other"]


def test_a_withheld_prompt_that_is_revoked_by_the_endpoint_does_not_come_back(ledger):
    engine = make_engine(make_gated("other"))
    with serving(ledger, engine) as url:
        ledger.append(LedgerEvent("revoked", "other"))
        asked(url, "of doe")
        stopped = engine.served.revoked[-1]
        assert HTTP.delete(f"{url}/admin/prompts/other", headers=ADMIN).json() == {"revoked": [stopped]}
        assert engine.served.revoked == [stopped]  # once
        ledger.append(LedgerEvent("received", "other"))
        asked(url, "of doe")
    entries = [entry for entry in ledger.entries() if entry.request == "other"]
    assert [entry.event for entry in entries] == ["received", "served", "revoked", "stopped", "revoked", "received"]
    assert entries[4].fields == {**entries[3].fields, "event": "revoked"}  # as any other, with weights and base
    assert not ledger.states()["other"].served_again


# ---- combined prompts ----


@pytest.fixture
def combined(ledger):
    """An engine of two prompts and `both`, for requests that the gates of both flag."""
    ledger.append(LedgerEvent("received", "both"))
    plain = make_gated("other", "both")
    gates = {name: plain.gates[name] for name in ("default", "other")}
    parts = {("default", "other"): "both"}
    return make_engine(GatedUnlearner(plain.unlearner, plain.tokenizer, gates, combined=parts))


@pytest.mark.parametrize("first", ["both", "other"])
def test_a_combined_prompt_that_is_revoked_while_a_part_is_withheld_does_not_come_back_with_it(
    ledger, combined, first, caplog
):
    texts = combined_texts()
    with serving(ledger, combined) as url:
        assert asked(url, "jane or doe").choices[0].text == texts["both"]
        for name in (first, "other" if first == "both" else "both"):
            ledger.append(LedgerEvent("revoked", name))
            asked(url, "good")
        ledger.append(LedgerEvent("received", "other"))
        for _ in range(2):
            assert asked(url, "jane or doe").choices[0].text == texts["default"]
        assert list(combined.served.served) == ["default", "other"]
        ledger.append(LedgerEvent("received", "both"))
        assert asked(url, "jane or doe").choices[0].text == texts["both"]
    state = ledger.states()["both"]
    assert (state.served_again, state.answered_after) == (False, 0)
    assert [one for one in names_of(ledger, "both") if one != "revoked"] == [
        *("received", "served", "answered", "stopped", "received", "served", "answered", "stopped")
    ]
    if first == "other":
        assert "Not to be served again with its parts: 'both', since it was revoked on 2" in caplog.text


def test_a_combined_prompt_is_never_noted_as_served_where_it_and_its_part_change_between_two_looks(ledger, combined):
    with serving(ledger, combined) as url:
        for event, name in (("revoked", "other"), ("revoked", "both"), ("received", "other")):
            ledger.append(LedgerEvent(event, name))
        assert asked(url, "jane or doe").choices[0].text == combined_texts()["default"]
        ledger.append(LedgerEvent("revoked", "other"))
        asked(url, "good")
        ledger.append(LedgerEvent("received", "both"))  # its part is withheld still
        asked(url, "good")
        assert (list(combined.served.withheld), combined.served.idle) == (["other"], ["both"])
        ledger.append(LedgerEvent("received", "other"))
        assert asked(url, "jane or doe").choices[0].text == combined_texts()["both"]
    assert not ledger.states()["both"].served_again
    assert names_of(ledger, "both").count("served") == 2


@pytest.mark.parametrize("name", ["both", "other"])
def test_a_combined_prompt_that_is_deleted_while_a_part_is_withheld_is_noted_as_revoked(ledger, combined, name):
    with serving(ledger, combined) as url:
        ledger.append(LedgerEvent("revoked", "other"))
        asked(url, "good")
        gone = HTTP.delete(f"{url}/admin/prompts/{name}", headers=ADMIN).json()["revoked"]
        assert {one["name"] for one in gone} == {name, "both"}
        ledger.append(LedgerEvent("received", "other"))
        assert asked(url, "jane or doe").choices[0].text == combined_texts()["default"]
    assert names_of(ledger, "both") == ["received", "served", "stopped", "revoked"]


def combined_texts():
    plain = make_gated("other", "both")
    ids = plain.tokenizer("jane or doe")["input_ids"]
    found = {name: alone(plain, ids, name, 6)[0] for name in ("default", "other", "both", "__base__")}
    assert len(set(found.values())) == 4
    return found


# ---- several servers ----


def test_a_request_is_served_until_the_last_of_its_servers_stops(ledger):
    one, two = (make_engine(make_gated("other")) for _ in range(2))
    with serving(ledger, one, "gpu-1") as first:
        with serving(ledger, two, "gpu-2") as second:
            assert ledger.states()["other"].now.endswith(" by gpu-1, gpu-2")
            asked(second, "of doe")
        assert ledger.states()["other"].now.endswith(" by gpu-1")
        asked(first, "of doe")
    assert ledger.states()["other"].now == "no longer served"
    assert len(ledger.states()["other"].served) == 1
    noted = [entry.fields.get("server") for entry in ledger.entries() if entry.event in ("served", "stopped")]
    assert noted == ["gpu-1"] * 2 + ["gpu-2"] * 4 + ["gpu-1"] * 2


def test_what_one_server_revokes_the_other_stops_to_serve(ledger):
    engines = [make_engine(make_gated("other")) for _ in range(2)]
    with serving(ledger, engines[0], "a") as one, serving(ledger, engines[1], "b") as two:
        assert HTTP.delete(f"{one}/admin/prompts/other", headers=ADMIN).status_code == 200
        asked(two, "of doe")
        assert ledger.states()["other"].now.startswith("revoked since ")
    noted = [(entry.event, entry.fields.get("server")) for entry in ledger.entries() if entry.request == "other"]
    assert noted == [("received", None), ("served", "a"), ("served", "b"), ("revoked", "a"), ("stopped", "b")]
