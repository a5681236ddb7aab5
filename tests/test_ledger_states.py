"""The states of requests: served since when and by which servers, revoked, answered, as the ledger's entries say."""

from __future__ import annotations

import pytest

from spul.records import DataSummary, Ledger, LedgerEvent
from spul.records.ledger_lines import next_line
from spul.records.ledger_states import entry_in_words

SHA = "ab" * 32
ROWS = DataSummary(12, "cd" * 32)
AGAIN = "the base answers again what no other gate flags"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.jsonl"


def test_the_state_of_a_request_says_since_when_it_is_served_and_whether_it_was_revoked(path):
    ledger = Ledger(path)
    received = ledger.append(LedgerEvent("received", "1", rows=ROWS))
    trained = ledger.append(LedgerEvent("trained", "1", adapter="forget-1", prompt_sha256=SHA, base_fingerprint=SHA))
    ledger.append(LedgerEvent("received", "2"))
    ledger.append(LedgerEvent("served", "2", at="2025-03-01T10:30:00+01:00"))
    served = ledger.append(LedgerEvent("served", "1", gate="names"))
    again = ledger.append(LedgerEvent("served", "1"))  # as after a restart: it is still the same service
    one, two = ledger.states()["1"], ledger.states()["2"]
    assert (one.rows, one.adapter, one.prompt_sha256, one.base_fingerprint, one.gate) == (
        *(ROWS, "forget-1", SHA, SHA, "names"),
    )
    assert (one.served, two.served, one.revoked) == ([(served.time, None)], [("2025-03-01T09:30:00Z", None)], None)
    assert one.in_words()[-1] == f"now: served since {served.time}"
    stopped = ledger.append(LedgerEvent("stopped", "1", evaluation=SHA))
    assert ledger.states()["1"].in_words()[-1] == "now: no longer served"
    ledger.append(LedgerEvent("served", "1", at="2025-01-01T00:00:00Z"))
    answers = [
        ledger.append(LedgerEvent("answered", "1", at=f"2025-01-0{i}T00:00:00Z", note=note))
        for i, note in ((2, "once"), (3, "by hand"), (4, None))
    ]
    ledger.append(LedgerEvent("revoked", "1", at="2025-02-01T00:00:00Z", note="at their\nwish"))
    one = ledger.states()["1"]
    assert one.served == [(served.time, stopped.time), ("2025-01-01T00:00:00Z", "2025-02-01T00:00:00Z")]
    assert (one.revoked, one.evaluation, one.served_again) == ("2025-02-01T00:00:00Z", SHA, False)
    assert one.in_words() == [
        f"rows: 12, HMAC-SHA256 {ROWS.digest}",
        *("adapter: forget-1", f"SHA-256 of the prompt: {SHA}", f"fingerprint of the base: {SHA}", "gate: names"),
        f"SHA-256 of the evaluation: {SHA}",
        *(f"{received.time} received", f"{trained.time} trained", f"{served.time} served", f"{again.time} served"),
        *(f"{stopped.time} stopped", "2025-01-01T00:00:00Z served"),
        f"{answers[0].at} to {answers[-1].at} answered 3 times: by hand",
        "2025-02-01T00:00:00Z revoked: at their wish",
        *("answers under it: 3", f"now: revoked since 2025-02-01T00:00:00Z: {AGAIN}"),
    ]
    ledger.append(LedgerEvent("served", "1"))
    assert ledger.states()["1"].in_words()[-1] == "SERVED AFTER IT WAS REVOKED"


@pytest.mark.parametrize("event", ["trained", "evaluated"])
def test_rows_counted_without_the_owners_key_leave_the_digest_of_the_rows_that_were_received(path, event):
    ledger = Ledger(path)
    ledger.append(LedgerEvent("received", "1", rows=ROWS))
    ledger.append(LedgerEvent(event, "1", rows=DataSummary(10, None)))
    assert ledger.states()["1"].rows == ROWS
    keyed = DataSummary(10, "ef" * 32)
    ledger.append(LedgerEvent(event, "1", rows=keyed))
    assert ledger.states()["1"].rows == keyed
    anew = DataSummary(12, None)
    ledger.append(LedgerEvent("received", "1", rows=anew))
    assert ledger.states()["1"].rows == anew


def test_a_prompt_that_is_another_than_the_evaluated_one_is_said_until_it_is_evaluated(path):
    ledger, other = Ledger(path), "cd" * 32
    ledger.append(LedgerEvent("trained", "1", prompt_sha256=SHA))
    ledger.append(LedgerEvent("evaluated", "1", prompt_sha256=SHA, evaluation=SHA))
    assert not any("another prompt" in line for line in ledger.states()["1"].in_words())
    ledger.append(LedgerEvent("served", "1", prompt_sha256=other))
    assert f"the evaluation is of another prompt, SHA-256 {SHA}" in ledger.states()["1"].in_words()
    ledger.append(LedgerEvent("evaluated", "1", prompt_sha256=other, evaluation=other))
    assert not any("another prompt" in line for line in ledger.states()["1"].in_words())


def remarks_of(ledger):
    return [line for line in ledger.states()["1"].in_words() if "the evaluation" in line and "SHA-256 of" not in line]


def test_a_prompt_that_is_trained_anew_has_nothing_of_the_one_before_it(path):
    """As a fixed refusal, of which an entry gives no digest."""
    ledger = Ledger(path)
    ledger.append(
        LedgerEvent("trained", "1", adapter="forget-1", prompt_sha256=SHA, base_fingerprint=SHA, gate="text")
    )
    ledger.append(LedgerEvent("evaluated", "1", adapter="forget-1", prompt_sha256=SHA, evaluation=SHA))
    ledger.append(LedgerEvent("revoked", "1"))
    ledger.append(LedgerEvent("trained", "1", adapter="refusal", gate="names"))
    ledger.append(LedgerEvent("served", "1", adapter="refusal", gate="names", base_fingerprint="34" * 32))
    state = ledger.states()["1"]
    assert (state.adapter, state.prompt_sha256, state.gate, state.base_fingerprint) == (
        *("refusal", None, "names", "34" * 32),
    )
    assert remarks_of(ledger) == [f"the evaluation may be of another prompt, SHA-256 {SHA}"]
    ledger.append(LedgerEvent("evaluated", "1", adapter="refusal", evaluation="12" * 32))
    assert remarks_of(ledger) == []
    ledger.append(LedgerEvent("trained", "1"))  # by hand, without a word of which
    state = ledger.states()["1"]
    assert (state.adapter, state.prompt_sha256, state.gate, state.base_fingerprint) == (None,) * 4
    assert remarks_of(ledger) == ["the evaluation may be of another prompt, adapter refusal"]


def test_a_prompt_that_is_served_without_a_training_has_nothing_of_the_one_before_it(path):
    ledger, other = Ledger(path), "12" * 32
    ledger.append(LedgerEvent("trained", "1", adapter="forget-1", prompt_sha256=SHA, gate="text"))
    ledger.append(LedgerEvent("served", "1", server="a"))  # nothing that tells it from what was trained
    assert ledger.states()["1"].prompt_sha256 == SHA
    ledger.append(LedgerEvent("served", "1", adapter="refusal", server="b"))
    state = ledger.states()["1"]
    assert (state.adapter, state.prompt_sha256, state.gate) == ("refusal", None, None)
    ledger.append(LedgerEvent("served", "1", adapter="forget-2", prompt_sha256=other, server="c"))
    assert ledger.states()["1"].adapter == "forget-2"
    ledger.append(LedgerEvent("served", "1", adapter="moved", prompt_sha256=other, gate="names", server="c"))
    ledger.append(LedgerEvent("stopped", "1", adapter="forget-1", prompt_sha256=SHA, server="a"))  # others go on
    state = ledger.states()["1"]
    assert (state.adapter, state.prompt_sha256, state.gate) == ("moved", other, "names")


def test_a_server_that_gives_up_an_earlier_prompt_leaves_what_was_trained_since(path):
    ledger, other = Ledger(path), "12" * 32
    ledger.append(LedgerEvent("trained", "1", adapter="p1", prompt_sha256=SHA, base_fingerprint=SHA))
    ledger.append(LedgerEvent("served", "1", adapter="p1", prompt_sha256=SHA, server="a"))
    ledger.append(LedgerEvent("trained", "1", adapter="p2", prompt_sha256=other, base_fingerprint=other))
    ledger.append(LedgerEvent("evaluated", "1", adapter="p2", prompt_sha256=other, evaluation=other))
    ledger.append(LedgerEvent("stopped", "1", adapter="p1", prompt_sha256=SHA, base_fingerprint=SHA, server="a"))
    state = ledger.states()["1"]
    assert (state.adapter, state.prompt_sha256, state.base_fingerprint) == ("p2", other, other)
    assert (state.now, remarks_of(ledger)) == ("no longer served", [])
    ledger.append(LedgerEvent("stopped", "1", adapter="p1", prompt_sha256=SHA, evaluation=SHA, server="a"))
    assert remarks_of(ledger) == [f"the evaluation is of another prompt, SHA-256 {SHA}"]


@pytest.mark.parametrize("event", ["served", "answered", "evaluated"])
def test_an_entry_of_the_same_adapter_without_its_weights_is_of_the_same_prompt(path, event):
    """As of a saved prompt whose record lacks their digest."""
    ledger = Ledger(path)
    ledger.append(LedgerEvent("trained", "1", adapter="p1", prompt_sha256=SHA, base_fingerprint=SHA))
    ledger.append(LedgerEvent("evaluated", "1", adapter="p1", prompt_sha256=SHA, evaluation=SHA))
    ledger.append(LedgerEvent(event, "1", adapter="p1", evaluation="12" * 32 if event == "evaluated" else None))
    state = ledger.states()["1"]
    assert (state.adapter, state.prompt_sha256, state.base_fingerprint) == ("p1", SHA, SHA)
    assert remarks_of(ledger) == []
    ledger.append(LedgerEvent("trained", "1", adapter="p1"))  # anew: as which weights is not known
    assert ledger.states()["1"].prompt_sha256 is None
    assert remarks_of(ledger) == [f"the evaluation may be of another prompt, SHA-256 {SHA}"]


def test_weights_that_a_later_entry_gives_are_those_that_were_evaluated_under_that_name(path):
    ledger = Ledger(path)
    ledger.append(LedgerEvent("trained", "1", adapter="p1"))
    ledger.append(LedgerEvent("evaluated", "1", adapter="p1", evaluation=SHA))
    ledger.append(LedgerEvent("served", "1", adapter="p1", prompt_sha256=SHA))
    assert (ledger.states()["1"].prompt_sha256, remarks_of(ledger)) == (SHA, [])
    ledger.append(LedgerEvent("served", "1", adapter="p1", prompt_sha256="12" * 32))
    assert remarks_of(ledger) == [f"the evaluation is of another prompt, SHA-256 {SHA}"]


def test_an_evaluation_of_what_has_no_weights_is_not_one_of_the_prompt_that_follows(path):
    ledger = Ledger(path)
    ledger.append(LedgerEvent("trained", "1", adapter="refusal", gate="names"))
    ledger.append(LedgerEvent("evaluated", "1", adapter="refusal", evaluation=SHA))
    assert remarks_of(ledger) == []
    for event in ("trained", "served"):
        ledger.append(LedgerEvent(event, "1", adapter="forget-1", prompt_sha256=SHA))
        assert remarks_of(ledger) == ["the evaluation may be of another prompt, adapter refusal"]
    ledger.append(LedgerEvent("evaluated", "1", evaluation=SHA))  # by hand
    assert remarks_of(ledger) == ["the evaluation may be of another prompt: its entry names none"]
    ledger.append(LedgerEvent("evaluated", "1", prompt_sha256=SHA, evaluation=SHA))
    assert remarks_of(ledger) == []


def test_an_evaluation_of_another_prompt_does_not_name_the_one_that_is_served(path):
    ledger, other = Ledger(path), "12" * 32
    ledger.append(LedgerEvent("evaluated", "1", adapter="forget-1", prompt_sha256=SHA, evaluation=SHA))
    assert ledger.states()["1"].prompt_sha256 == SHA  # all that is known by now
    for event in ("trained", "served"):
        ledger.append(LedgerEvent(event, "1", adapter="forget-1", prompt_sha256=SHA))
    ledger.append(
        LedgerEvent("evaluated", "1", adapter="2", prompt_sha256=other, base_fingerprint=other, evaluation=other)
    )
    state = ledger.states()["1"]
    assert (state.adapter, state.prompt_sha256, state.base_fingerprint) == ("forget-1", SHA, None)
    assert remarks_of(ledger) == [f"the evaluation is of another prompt, SHA-256 {other}"]


def test_a_request_that_was_served_says_that_no_entry_gives_an_evaluation_until_one_does(path):
    ledger, said = Ledger(path), "it was served, and no entry gives an evaluation"
    ledger.append(LedgerEvent("trained", "1", prompt_sha256=SHA))
    ledger.append(LedgerEvent("trained", "2"))
    assert said not in ledger.states()["1"].in_words()  # nobody was answered under it
    for event in ("served", "stopped", "revoked"):
        ledger.append(LedgerEvent(event, "1"))
        assert said in ledger.states()["1"].in_words()
    ledger.append(LedgerEvent("answered", "2"))
    assert said in ledger.states()["2"].in_words()
    ledger.append(LedgerEvent("evaluated", "1", prompt_sha256=SHA, evaluation=SHA))
    assert said not in ledger.states()["1"].in_words()


def test_answers_are_counted_by_request_and_those_without_a_prompt_are_of_none(path):
    ledger = Ledger(path)
    ledger.append(LedgerEvent("trained", "1", adapter="out"))
    assert ledger.states()["1"].in_words()[-1] == "now: never served"
    for i in range(3):
        ledger.append(LedgerEvent("answered", "1", adapter="out", answer=f"a-{i}", finish="stop", prompt_tokens=0))
    bare = ledger.append(LedgerEvent("answered", None, answer="a-3", finish="error 504", completion_tokens=7))
    assert (bare.request, bare.fields["completion_tokens"], "adapter" in bare.fields) == (None, 7, False)
    assert [(state.request, state.answered) for state in ledger.states().values()] == [("1", 3)]
    assert "answers under it: 3" in ledger.states()["1"].in_words()
    assert ledger.verify() == []


def test_a_ledger_of_earlier_versions_is_read_by_todays_names(path):
    """They wrote the adapter as `prompt`, and a server the request's name there."""
    event = LedgerEvent("trained", "1", prompt_sha256=SHA).to_dict()
    first, line = next_line(None, event | {"prompt": "forget-1"})
    second, other = next_line(first, {"event": "served", "request": "1", "prompt": "1"})
    path.write_bytes(line + other)
    ledger = Ledger(path)
    assert ledger.verify() == []
    assert (ledger.states()["1"].adapter, ledger.states()["1"].served) == ("forget-1", [(second.time, None)])
    ledger.append(LedgerEvent("served", "1", adapter="moved"))
    assert ledger.verify() == []
    assert ledger.states()["1"].adapter == "moved"
    path.write_bytes(line + next_line(first, {"event": "served", "request": "1", "prompt": 1})[1])
    assert [fault.line for fault in ledger.verify()] == [2]


def test_a_request_is_served_while_any_server_that_noted_a_start_has_noted_no_stop(path):
    ledger = Ledger(path)
    ledger.append(LedgerEvent("received", "1"))

    def noted(event, server=None):
        entry = ledger.append(LedgerEvent(event, "1", server=server))
        return entry.at, ledger.states()["1"]

    since, state = noted("served", "b")
    assert (state.now, str(state.history[-1])) == (f"served since {since} by b", f"{since} served by b")
    assert noted("served", "a")[1].now == f"served since {since} by a, b"
    assert noted("served")[1].now == f"served since {since} by a, b"  # one that does not say who it is
    assert noted("stopped", "c")[1].now == f"served since {since} by a, b"
    assert noted("stopped", "b")[1].now == f"served since {since} by a"
    assert noted("stopped")[1].now == f"served since {since} by a"
    assert noted("served", "a")[1].now == f"served since {since} by a"  # killed, and started anew
    until, state = noted("stopped", "a")
    assert (state.now, state.served, state.servers) == ("no longer served", [(since, until)], {})
    since, state = noted("served", "b")
    noted("served", "a")
    assert len(ledger.states()["1"].served) == 2
    until, state = noted("revoked", "a")  # the stop of b, which comes later, changes nothing
    assert (state.now, state.served[-1], state.servers) == (f"revoked since {until}: {AGAIN}", (since, until), {})
    noted("received")
    since, state = noted("served", "a")
    assert noted("stopped", "b")[1].now == f"served since {since} by a"


def test_the_times_of_revocations_and_what_was_trained_since_the_last_are_known(path):
    ledger = Ledger(path)
    ledger.append(LedgerEvent("trained", "1", prompt_sha256="12" * 32))
    assert ledger.states()["1"].retrained == "12" * 32
    first = ledger.append(LedgerEvent("revoked", "1"))
    ledger.append(LedgerEvent("received", "1"))
    assert (ledger.states()["1"].retrained, ledger.states()["1"].revocations) == (None, [first.at])
    second = ledger.append(LedgerEvent("revoked", "1"))
    ledger.append(LedgerEvent("trained", "1", prompt_sha256=SHA))
    assert (ledger.states()["1"].retrained, ledger.states()["1"].revocations) == (SHA, [first.at, second.at])


def test_an_entry_in_words_says_all_that_it_holds(path):
    event = LedgerEvent("served", "1", ROWS, "out", SHA, SHA, "names", SHA, "2026-03-01T09:30:00Z", "n", server="a")
    Ledger(path).append(LedgerEvent("received", "1"))
    entry = Ledger(path).append(event)
    assert entry_in_words(entry) == [
        *("request: 1", "2026-03-01T09:30:00Z served by a: n", f"rows: 12, HMAC-SHA256 {ROWS.digest}", "adapter: out"),
        *(f"SHA-256 of the prompt: {SHA}", f"fingerprint of the base: {SHA}", "gate: names"),
        *(f"SHA-256 of the evaluation: {SHA}", f"digest: {entry.digest}"),
    ]
