"""The ledger of requests: a chain of lines that shows every change, and that killed or simultaneous writers keep."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
from filelock import FileLock

from spul.records import DataSummary, Ledger, LedgerEvent, ledger_file
from spul.records import ledger as module

SHA = "ab" * 32
ROWS = DataSummary(12, "cd" * 32)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.jsonl"


def filled(path: Path, num: int = 6) -> Ledger:
    ledger = Ledger(path)
    for i in range(num):
        ledger.append(LedgerEvent("note", f"request {i % 2}", note=f"remark {i}, “quoted” \u2028\n"))
    return ledger


def lines_of(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


def resealed(line: bytes, first: str = "", **changes) -> bytes:
    """A line with other fields, after the text `first`, and the digest that fits them."""
    record = json.loads(line) | changes
    del record["digest"]
    content = f"{{{first}{json.dumps(record)[1:]}"
    return f'{content[:-1]}, "digest": "{hashlib.sha256(content.encode()).hexdigest()}"}}\n'.encode()


# ---- the chain ----


def test_every_line_has_its_number_time_the_digest_of_the_line_before_and_its_own(path):
    filled(path)
    previous = "0" * 64
    for i, line in enumerate(lines_of(path)):
        record = json.loads(line)
        content, digest = line.decode().rstrip("\n")[:-1].rsplit(', "digest": ', 1)
        assert record["digest"] == digest.strip('"') == hashlib.sha256((content + "}").encode()).hexdigest()
        assert (record["sequence"], record["previous"]) == (i, previous)
        assert record["time"].endswith("Z")
        assert record["note"] == f"remark {i}, “quoted” \u2028\n"
        previous = record["digest"]
    assert Ledger(path).verify() == []
    assert Ledger(path).head() == previous
    assert [entry.sequence for entry in Ledger(path).entries()] == list(range(6))


def test_an_edit_of_any_byte_is_found_on_its_line(path):
    ledger = filled(path, 3)
    whole, lines = path.read_bytes(), lines_of(path)
    for i in range(0, len(whole) - 1, 7):  # the last line break aside
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :])
        number = 1 + sum(i >= len(b"".join(lines[: k + 1])) for k in range(3))
        faults = ledger.verify()
        assert faults, i
        assert faults[0].line <= number <= faults[-1].line + 1, i
        with pytest.raises(ValueError, match=r"not a whole ledger: line \d"):
            ledger.entries()


@pytest.mark.parametrize(
    ("change", "line", "reason"),
    [
        (lambda lines: [*lines[:2], lines[2].replace(b"remark", b"REMARK"), *lines[3:]], 3, "it was edited"),
        (
            lambda lines: [*lines[:2], resealed(lines[2], note="another"), *lines[3:]],
            4,
            "it does not continue entry 2, which was written anew",
        ),
        (lambda lines: [*lines[:2], *lines[3:]], 3, "entry 2 is missing before entry 3"),
        (lambda lines: lines[3:], 1, "entries 0 to 2 are missing before entry 3"),
        (lambda lines: [lines[1], lines[0], *lines[2:]], 2, "entry 0 stands after entry 1: moved, or twice"),
        (lambda lines: [*lines[:3], lines[2], *lines[3:]], 4, "entry 2 stands after entry 2: moved, or twice"),
        (lambda lines: [*lines[:2], b"\n", *lines[3:]], 3, "it is no entry of a ledger"),
        (lambda lines: [*lines[:2], b"{}\n", *lines[3:]], 3, "it is no entry of a ledger"),
        (lambda lines: [*lines[:2], resealed(lines[2], rows=7), *lines[3:]], 3, "it is no entry of a ledger"),
        (lambda lines: [*lines[:2], resealed(lines[2], prompt_tokens="7"), *lines[3:]], 3, "it is no entry of a"),
        (lambda lines: [*lines[:2], resealed(lines[2], '"event": "revoked", '), *lines[3:]], 3, "it is no entry of a"),
        (lambda lines: [*lines[:2], resealed(lines[2], format=2), *lines[3:]], 3, "it is no entry of a ledger"),
        (lambda lines: [resealed(lines[0], previous=SHA), *lines[1:]], 1, "it does not continue entry -1"),
    ],
)
def test_an_edited_missing_or_moved_line_is_named(path, change, line, reason):
    ledger = filled(path)
    path.write_bytes(b"".join(change(lines_of(path))))
    found = {fault.line: fault.reason for fault in ledger.verify()}
    assert reason in found.get(line, ""), found


def test_a_missing_end_is_seen_by_a_head_noted_elsewhere_and_only_by_it(path):
    ledger = filled(path)
    early, head = json.loads(lines_of(path)[2])["digest"], ledger.head()
    assert ledger.verify(early) == ledger.verify(head) == []  # later entries may follow a head
    path.write_bytes(b"".join(lines_of(path)[:-1]))
    assert ledger.verify() == ledger.verify(early) == []
    (fault,) = ledger.verify(head)
    assert str(fault).startswith(f"no entry has the digest {head}")


def test_a_ledger_written_anew_is_seen_by_a_head_noted_elsewhere(path):
    head = filled(path).head()
    path.unlink()
    assert filled(path).verify(head) != []


# ---- killed writers ----


@pytest.mark.parametrize("num", [1, 3])
def test_a_last_line_cut_at_any_byte_is_seen_moved_aside_and_the_chain_goes_on(tmp_path, num, recwarn, monkeypatch):
    monkeypatch.setattr(module.os, "fsync", lambda descriptor: None)  # slow, and nothing to this test
    whole = tmp_path / "whole.jsonl"
    filled(whole, num)
    *before, last = lines_of(whole)
    for length in range(1, len(last) + 1):
        path = tmp_path / f"{length}.jsonl"
        path.write_bytes(b"".join(before) + last[:length])
        ledger = Ledger(path)
        faults = ledger.verify()
        if length == len(last):
            assert faults == []
            continue
        assert [fault.line for fault in faults] == [num]
        assert len(ledger.entries()) == num - 1
        ledger.append(LedgerEvent("received", "request-0"))
        assert ledger.verify() == []
        events = [entry.event for entry in ledger.entries()]
        if length == len(last) - 1:  # the line break alone was missing
            assert events == ["note"] * num + ["received"]
            continue
        assert events == ["note"] * (num - 1) + ["recovered", "received"]
        recovered = ledger.entries()[-2].fields
        assert (tmp_path / recovered["torn_file"]).read_bytes() == last[:length]
        assert recovered["torn_sha256"] == hashlib.sha256(last[:length]).hexdigest()
    assert "was half-written, as by a killed process" in str(recwarn.pop(UserWarning).message)


def test_zeros_that_a_power_cut_left_at_the_end_are_moved_aside(path):
    ledger = filled(path)
    with path.open("ab") as file:
        file.write(bytes(9000))
    with pytest.warns(UserWarning, match="9000 bytes"):
        ledger.append(LedgerEvent("note", "x"))
    assert ledger.verify() == []
    assert len(ledger.entries()) == 8


def append_until_killed(path: str, count: int) -> None:
    for i in range(count):
        Ledger(path).append(LedgerEvent("note", str(os.getpid()), note=str(i) * 50))


def forked(*arguments):
    process = multiprocessing.get_context("fork").Process(target=append_until_killed, args=arguments)
    process.start()
    return process


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_four_writers_at_once_lose_nothing(path):
    processes = [forked(str(path), 25) for _ in range(4)]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    entries = Ledger(path).entries()
    assert len(entries) == 100
    for process in processes:  # each writer's entries, all of them, in its order
        notes = [entry.fields["note"] for entry in entries if entry.request == str(process.pid)]
        assert notes == [str(i) * 50 for i in range(25)]


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning", "ignore:the last line of:UserWarning")
def test_a_killed_writer_leaves_a_chain_that_another_goes_on_with(path):
    for _ in range(3):
        process = forked(str(path), 100_000)
        size = path.stat().st_size if path.exists() else 0
        deadline = time.monotonic() + 30
        while (path.stat().st_size if path.exists() else 0) < size + 2000 and time.monotonic() < deadline:
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        Ledger(path).append(LedgerEvent("note", "after"))  # the lock is free
        assert Ledger(path).verify() == []
    assert sum(entry.request == "after" for entry in Ledger(path).entries()) == 3


def test_a_full_disk_leaves_the_file_as_it_was(path, monkeypatch):
    ledger = filled(path)
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        ledger.append(LedgerEvent("note", "x"))
    assert path.read_bytes() == before


def test_a_writer_waits_for_another_only_so_long(path, monkeypatch):
    monkeypatch.setattr(module, "SECONDS", 0.05)
    with FileLock(f"{path}.lock"), pytest.raises(TimeoutError):
        Ledger(path).append(LedgerEvent("note", "x"))


def test_only_the_end_of_a_long_file_is_read_to_append(path, monkeypatch):
    ledger = Ledger(path)
    for i in range(5):
        ledger.append(LedgerEvent("note", "x", note="y" * (3000 + i)))  # lines of about a block
    read = []
    really = ledger_file._read
    monkeypatch.setattr(ledger_file, "_read", lambda file, size: read.append(size) or really(file, size))
    ledger.append(LedgerEvent("note", "x"))
    assert sum(read) <= 2 * ledger_file.BLOCK < path.stat().st_size
    assert ledger.verify() == []
    read.clear()
    # No ledger: one line, which is not read anew for each of its blocks.
    path.write_bytes(b"x" * 1000 * ledger_file.BLOCK)
    with pytest.warns(UserWarning, match="half-written"):
        Ledger(path).append(LedgerEvent("note", "x"))
    assert len(read) <= 11


def test_a_whole_ledger_is_read_without_a_lock_and_a_half_line_waits_for_its_writer(path, monkeypatch):
    ledger = filled(path)
    whole = path.read_bytes()
    Path(f"{path}.lock").unlink(missing_ok=True)

    def refused(*arguments, **options):
        raise PermissionError("read-only")

    monkeypatch.setattr(module, "FileLock", refused)
    assert ledger.verify() == []
    path.write_bytes(whole[:-5])
    with pytest.raises(PermissionError):
        ledger.verify()
    monkeypatch.setattr(module.os, "access", lambda place, mode: mode != os.W_OK)  # who may only read
    assert [fault.line for fault in ledger.verify()] == [6]

    class Finished:
        """The lock once the writer has finished its line."""

        def __enter__(self):
            path.write_bytes(whole)

        def __exit__(self, *error):
            pass

    monkeypatch.undo()
    monkeypatch.setattr(Ledger, "_lock", lambda self: Finished())
    assert ledger.verify() == []


@pytest.mark.parametrize("last", [b"{}\n", b"not mine\n", b"\n"])
def test_nothing_is_appended_to_a_file_that_is_no_ledger(path, last):
    path.write_bytes(last)
    for write in (Ledger(path).check_goes_on, lambda: Ledger(path).append(LedgerEvent("note", "1"))):
        with pytest.raises(ValueError, match="is no entry of a ledger"):
            write()
    assert path.read_bytes() == last


def test_whether_a_ledger_goes_on_is_seen_without_an_entry(path, monkeypatch):
    Ledger(path).check_goes_on()
    assert not path.exists()
    Ledger(path).append(LedgerEvent("note", "1"))
    whole = path.read_bytes()
    for content in (whole, whole + whole[:9], whole[:-1]):  # what a killed writer leaves is mended by the next entry
        path.write_bytes(content)
        Ledger(path).check_goes_on()
        assert path.read_bytes() == content

    def read_only(self, mode="r", **options):
        raise PermissionError(f"Permission denied: {self}")

    monkeypatch.setattr(Path, "open", read_only)
    with pytest.raises(PermissionError, match=r"ledger\.jsonl"):
        Ledger(path).check_goes_on()


@pytest.mark.parametrize("event", ["served", "answered", "stopped", "revoked"])
def test_what_follows_is_not_noted_of_a_request_that_no_entry_names(path, event, monkeypatch):
    ledger = Ledger(path)
    with pytest.raises(ValueError, match=r"knows no request '2026-071'\. .*--event received --request 2026-071"):
        ledger.append(LedgerEvent(event, "2026-071"))
    assert not path.exists()
    Ledger(path).append(LedgerEvent("received", "2026-017"))  # by another process
    with pytest.raises(ValueError, match="knows no request '2026-071'; did you mean '2026-017'"):
        ledger.append(LedgerEvent(event, "2026-071"))
    ledger.append(LedgerEvent(event, "2026-017"))
    monkeypatch.setattr(Ledger, "_lines", None)  # answers are many: the file is not read for each
    ledger.append(LedgerEvent(event, "2026-017"))
    monkeypatch.undo()
    path.write_bytes(path.read_bytes()[:-1])  # of a whole line whose break a killed writer did not write
    Ledger(path).append(LedgerEvent(event, "2026-017"))
    assert [entry.event for entry in ledger.entries()] == ["received", event, event, event]
    assert ledger.verify() == []


@pytest.mark.parametrize("event", ["received", "trained", "evaluated", "note"])
def test_what_may_come_first_makes_a_request_known(path, event):
    Ledger(path).append(LedgerEvent(event, "1"))
    Ledger(path).append(LedgerEvent("served", "1"))
    Ledger(path).append(LedgerEvent("answered", None, answer="a"))  # of no request
    assert len(Ledger(path).entries()) == 3


@pytest.mark.parametrize("request_name", ["1", None])
def test_a_ledger_that_is_gone_is_not_begun_anew(path, request_name):
    ledger = Ledger(path)
    ledger.append(LedgerEvent("received", "1"))
    ledger.append(LedgerEvent("served", "1"))
    away = path.rename(path.with_name("away.jsonl"))
    with pytest.raises(FileNotFoundError, match=r"is gone.*put it back"):
        ledger.append(LedgerEvent("answered", request_name))
    with pytest.raises(FileNotFoundError, match=r"is gone.*put it back"):
        ledger.check_goes_on()
    with pytest.raises(FileNotFoundError, match=r"is gone.*put it back"):
        ledger.append(LedgerEvent("received", "1"))
    assert not path.exists()
    away.rename(path)
    ledger.append(LedgerEvent("answered", request_name))
    assert [entry.event for entry in ledger.entries()] == ["received", "served", "answered"]


@pytest.mark.parametrize("num", [0, 1, 3])
def test_a_ledger_that_lost_entries_is_not_gone_on_with(path, num):
    ledger, other = filled(path, 3), Ledger(path)
    other.check_known("request 0")
    whole = path.read_bytes()
    path.write_bytes(b"".join(lines_of(path)[:num]))
    if num == 3:  # as many, written anew
        path.write_bytes(b"".join(lines_of(path)[:2]))
        Ledger(path).append(LedgerEvent("note", "request 0"))
    cut = path.read_bytes()
    with pytest.raises(ValueError, match=r"lacks entries that it had.*put it back"):
        ledger.append(LedgerEvent("note", "request 0"))
    if num < 3:  # seen also by who only looked
        with pytest.raises(ValueError, match="lacks entries that it had"):
            other.append(LedgerEvent("note", "request 0"))
        with pytest.raises(ValueError, match="lacks entries that it had"):
            other.check_goes_on()
    assert path.read_bytes() == cut
    path.write_bytes(whole)
    other.append(LedgerEvent("note", "request 0"))  # whoever else writes on
    ledger.append(LedgerEvent("revoked", "request 0"))
    assert [len(Ledger(path).entries()), Ledger(path).verify()] == [5, []]


def test_writers_that_reach_a_ledger_by_a_link_wait_for_the_others(path, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SECONDS", 0.1)
    filled(path, 1)
    (tmp_path / "links").mkdir()
    link = tmp_path / "links" / "ledger.jsonl"
    link.symlink_to(path)
    with FileLock(f"{path}.lock"), pytest.raises(TimeoutError):
        Ledger(link).append(LedgerEvent("note", "1"))
    Ledger(link).append(LedgerEvent("note", "1"))
    path.write_bytes(path.read_bytes() + b'{"half')
    with pytest.warns(UserWarning, match="half-written"):
        Ledger(link).append(LedgerEvent("note", "1"))
    assert Ledger(path).verify() == []
    assert [one.name for one in (tmp_path / "links").iterdir()] == ["ledger.jsonl"]
    link.unlink()
    link.symlink_to(tmp_path / "nowhere" / "ledger.jsonl")
    with pytest.raises(FileNotFoundError, match="make it first"):
        Ledger(link)


def test_a_device_keeps_no_entry_and_is_refused():
    with pytest.raises(ValueError, match="no file that keeps what is written"):
        Ledger("/dev/null")
