"""Requests that were revoked: what keeps their prompts from being served, and what makes them requests again."""

from __future__ import annotations

import pytest

from spul.records import Ledger, LedgerEvent

SHA = "ab" * 32


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.jsonl"


@pytest.mark.parametrize("event", ["received", "trained"])
def test_a_revoked_request_is_one_again_once_it_is_received_or_trained_anew(path, event):
    ledger, other = Ledger(path), "ef" * 32
    ledger.check_not_revoked("1", SHA)  # there is no file
    for name, sha in (("1", SHA), ("2", other), ("3", SHA)):
        ledger.append(LedgerEvent("received", name))
        ledger.append(LedgerEvent("served", name, prompt_sha256=sha))
    ledger.check_not_revoked("1", SHA)
    ledger.append(LedgerEvent("revoked", "1"))
    ledger.append(LedgerEvent("answered", "1"))  # of a request that was under way
    for sha in (SHA, other, None):
        with pytest.raises(ValueError, match=r"'1' was revoked on 2.*--event received --request 1"):
            ledger.check_not_revoked("1", sha)
    with pytest.raises(ValueError, match=r"'1' was revoked .*, and 'renamed' has the same weights.*--request 1"):
        ledger.check_not_revoked("renamed", SHA)
    ledger.check_not_revoked("3", SHA)  # another request, which the ledger knows by the same weights
    ledger.check_not_revoked("2", other)
    ledger.check_not_revoked("new", None)
    ledger.append(LedgerEvent(event, "1", prompt_sha256=SHA))
    ledger.check_not_revoked("1", SHA)
    ledger.append(LedgerEvent("served", "1"))
    state = ledger.states()["1"]
    assert not state.served_again
    assert (state.answered, state.answered_after) == (1, 1)
    assert "answers under it: 1, 1 of them after it was revoked" in state.in_words()
    path.write_bytes(path.read_bytes().replace(b'"request": "2"', b'"request": "4"'))
    with pytest.raises(ValueError, match=r"not a whole ledger: line 3: it was edited: .* not [0-9a-f]{12}\.$"):
        ledger.check_not_revoked("2")


def test_earlier_weights_of_a_request_that_was_revoked_and_trained_anew_are_not_served(path):
    ledger, old = Ledger(path), "12" * 32
    ledger.append(LedgerEvent("trained", "1", prompt_sha256=SHA))
    ledger.append(LedgerEvent("trained", "1", prompt_sha256=old))
    ledger.check_not_revoked("1", SHA)  # trained twice, revoked never
    ledger.append(LedgerEvent("revoked", "1"))
    ledger.append(LedgerEvent("trained", "1", prompt_sha256=SHA))
    ledger.check_not_revoked("1", SHA)
    with pytest.raises(ValueError, match="trained anew"):
        ledger.check_not_revoked("1", old)


def test_earlier_weights_of_a_request_that_was_revoked_are_not_served_under_another_name(path):
    ledger, first, second = Ledger(path), "12" * 32, "34" * 32
    for sha in (first, second):
        for event in ("trained", "served"):
            ledger.append(LedgerEvent(event, "1", prompt_sha256=sha))
    ledger.append(LedgerEvent("received", "2"))
    for sha in (SHA, first):
        ledger.append(LedgerEvent("trained", "3", prompt_sha256=sha))
    ledger.append(LedgerEvent("trained", "3", prompt_sha256=SHA))
    ledger.check_not_revoked("2", first)
    ledger.append(LedgerEvent("revoked", "1"))
    for sha in (first, second):
        says = rf"'1' was revoked on 2.*, and '2' has the same weights, of SHA-256 {sha}.* trained --request 2 .*"
        with pytest.raises(ValueError, match=f"{says} --event received --request 1$"):
            ledger.check_not_revoked("2", sha)
    ledger.check_not_revoked("2", SHA)
    ledger.check_not_revoked("3", first)  # which had them, too, and may go back to them
    ledger.append(LedgerEvent("trained", "1", prompt_sha256=second))
    ledger.check_not_revoked("2", second)
    with pytest.raises(ValueError, match=r"'1' was revoked on .* trained --request 2 --adapter FOLDER$"):
        ledger.check_not_revoked("2", first)
    ledger.append(LedgerEvent("trained", "2", prompt_sha256=first))
    ledger.check_not_revoked("2", first)


@pytest.mark.parametrize("retrained", [SHA, None])
def test_weights_that_are_not_known_count_as_earlier_ones_of_a_request_that_was_trained_anew(path, retrained):
    ledger = Ledger(path)
    for name, sha in (("1", "12" * 32), ("2", "34" * 32), ("3", None)):
        ledger.append(LedgerEvent("trained", name, prompt_sha256=sha))
    for name in ("1", "3"):
        ledger.append(LedgerEvent("revoked", name))
    ledger.append(LedgerEvent("received", "1"))
    ledger.check_not_revoked("1")  # not trained anew
    ledger.append(LedgerEvent("trained", "1", prompt_sha256=retrained))
    says = r"'1' was revoked on 2.* lacks their SHA-256 .*--ledger \S+ --event trained --request 1 --adapter FOLDER$"
    with pytest.raises(ValueError, match=says):
        ledger.check_not_revoked("1")
    ledger.check_not_revoked("1", has_weights=False)
    ledger.append(LedgerEvent("trained", "3"))
    for name in ("2", "3", "new"):  # never replaced; trained anew, and no entry has weights to tell by; not there
        ledger.check_not_revoked(name)
    ledger.append(LedgerEvent("revoked", "1"))
    with pytest.raises(ValueError, match="'1' was revoked on 2"):
        ledger.check_not_revoked("1", has_weights=False)


def test_where_an_entry_does_not_say_what_was_trained_anew_earlier_weights_are_not_served(path):
    ledger, first, new = Ledger(path), "12" * 32, "34" * 32
    for sha in (first, SHA):
        ledger.append(LedgerEvent("trained", "1", prompt_sha256=sha))
    ledger.append(LedgerEvent("trained", "1"))
    assert not ledger.states()["1"].is_replaced(None)  # never revoked
    ledger.append(LedgerEvent("revoked", "1"))
    ledger.append(LedgerEvent("received", "1"))
    assert not ledger.states()["1"].is_replaced(SHA)  # not trained anew
    ledger.append(LedgerEvent("trained", "1"))
    for sha in (first, SHA):
        with pytest.raises(ValueError, match=rf"without the SHA-256 of its weights; this prompt has {sha}.*--adapter"):
            ledger.check_not_revoked("1", sha)
    ledger.check_not_revoked("1", new)
    ledger.append(LedgerEvent("served", "1", prompt_sha256=new))
    state = ledger.states()["1"]
    assert [state.is_replaced(sha) for sha in (first, SHA, new, None)] == [True, True, False, True]
    ledger.append(LedgerEvent("trained", "1", prompt_sha256=SHA))
    ledger.check_not_revoked("1", SHA)
    for event in ("revoked", "trained"):
        ledger.append(LedgerEvent(event, "1"))
    assert ledger.states()["1"].is_replaced(new)  # by now one of before, too


def test_what_is_made_for_a_request_does_not_make_one_again_that_was_revoked_meanwhile(path):
    ledger, other = Ledger(path), Ledger(path)
    assert ledger.revocations("1") == 0  # there is no file
    ledger.append(LedgerEvent("received", "1"), revocations=0)
    ledger.append(LedgerEvent("trained", "1"), revocations=ledger.revocations("1"))
    since = ledger.revocations("1")
    for event in ("revoked", "received", "revoked"):
        other.append(LedgerEvent(event, "1"))
    before = path.read_bytes()
    says = r"'1' was revoked on 2.* after the work began that 'trained' is of.*--event trained --request 1 --adapter"
    for num in (since, 1):
        with pytest.raises(ValueError, match=says):
            ledger.append(LedgerEvent("trained", "1"), revocations=num)
    assert path.read_bytes() == before
    ledger.append(LedgerEvent("trained", "2"), revocations=0)  # another request
    ledger.append(LedgerEvent("trained", "1"), revocations=ledger.revocations("1"))  # begun after the withdrawal
    assert ledger.states()["1"].revoked is None
    for event in ("revoked", "received"):
        other.append(LedgerEvent(event, "1"))
    ledger.append(LedgerEvent("trained", "1"), revocations=2)  # it is a request again, by hand
    assert ledger.verify() == []
    with pytest.raises(ValueError, match="revocations=True; expected a number"):
        ledger.append(LedgerEvent("trained", "1"), revocations=True)


def test_a_revocation_whose_line_break_a_killed_writer_did_not_write_counts(path):
    for event in ("received", "revoked"):
        Ledger(path).append(LedgerEvent(event, "1"))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="'1' was revoked on 2"):
        Ledger(path).append(LedgerEvent("trained", "1"), revocations=0)
