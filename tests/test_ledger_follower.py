"""A ledger that is read on while others write it: the states are those of the whole file, read line by line."""

from __future__ import annotations

from pathlib import Path

import pytest

from spul.records import Ledger, LedgerEvent, LedgerFollower


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.jsonl"


def test_the_states_are_those_of_the_whole_file_after_every_entry(path):
    follower, ledger = LedgerFollower(path), Ledger(path)
    assert (follower.states(), follower.revoked()) == ({}, {})
    for event in ("received", "served", "answered", "answered", "revoked", "trained", "served", "stopped", "revoked"):
        for name in ("1", "2"):
            entry = ledger.append(LedgerEvent(event, name))
            ledger.append(LedgerEvent("answered", None, answer="a"))
            assert follower.states() == ledger.states()
            assert (name in follower.revoked()) == (event == "revoked")
    assert follower.revoked()["2"] == entry.at
    assert follower.states() == LedgerFollower(path).states()


def test_only_new_lines_are_read(path, monkeypatch):
    ledger, follower = Ledger(path), LedgerFollower(path)
    ledger.append(LedgerEvent("received", "1"))
    follower.states()
    opened, really = [], Path.open
    monkeypatch.setattr(Path, "open", lambda self, *given, **more: opened.append(self) or really(self, *given, **more))
    follower.states()
    assert opened == []
    path.write_bytes(b"x" * len(path.read_bytes()))  # what was read is not read again
    opened.clear()
    follower.states()
    assert opened == []


def test_a_line_counts_once_it_is_whole(path):
    ledger, follower = Ledger(path), LedgerFollower(path)
    ledger.append(LedgerEvent("received", "1"))
    ledger.append(LedgerEvent("revoked", "1"))
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for end in (0, 5, first - 1, first, first + 5, len(whole) - 1):
        path.write_bytes(whole[:end])
        assert follower.revoked() == {}
    path.write_bytes(whole)
    assert list(follower.revoked()) == ["1"]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda path, other: path.unlink(), FileNotFoundError, r"ledger\.jsonl"),
        (lambda path, other: path.write_bytes(b""), ValueError, "entries that were read are missing"),
        (lambda path, other: path.write_bytes(path.read_bytes() + b"{}\n"), ValueError, "what follows entry 0 does"),
        (
            lambda path, other: path.write_bytes(path.read_bytes() + other.read_bytes().split(b"\n")[1] + b"\n"),
            ValueError,
            "what follows entry 0 does not continue it",
        ),
        (lambda path, other: path.write_bytes(path.read_bytes() * 2), ValueError, "what follows entry 0 does"),
    ],
)
def test_a_ledger_that_does_not_go_on_as_it_was_raises_until_it_does(path, tmp_path, change, error, message):
    ledger, follower, other = Ledger(path), LedgerFollower(path), Ledger(tmp_path / "other.jsonl")
    for name in ("1", "2"):
        other.append(LedgerEvent("note", name))
    ledger.append(LedgerEvent("received", "1"))
    follower.states()
    whole = path.read_bytes()
    change(path, other.path)
    for _ in range(2):
        with pytest.raises(error, match=message):
            follower.states()
    path.write_bytes(whole)
    ledger.append(LedgerEvent("revoked", "1"))
    assert list(follower.revoked()) == ["1"]
