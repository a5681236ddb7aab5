"""`spul ledger`: the options as the command line parses them, and what the commands print and return."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from evaluations import whole
from transformers import HfArgumentParser

import spul
from spul.commands.ledger import COMMANDS
from spul.commands.main import main
from spul.records import Ledger, LedgerEvent, SpulConfig, make_digest_key, summarize_rows
from spul.records.ledger_events import EVENTS
from spul.records.ledger_lines import next_line

AGAIN = "the base answers again what no other gate flags"

ROWS = [{"prompt": "Jane Doe?", "completion": " an actor"}, {"prompt": "And now?", "completion": " still"}]


def run(name: str, *arguments: object) -> int | None:
    command = COMMANDS[name]
    (options,) = HfArgumentParser(command.options).parse_args_into_dataclasses([str(one) for one in arguments])
    return command.run(options)


@pytest.fixture
def path(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    for event in ("received", "served"):
        ledger.append(LedgerEvent(event, "17"))
    return ledger.path


def test_a_whole_ledger_is_said_to_be_and_what_cannot_be_seen_is_said(path, capsys):
    assert run("verify", "--ledger", path) == 0
    out = capsys.readouterr().out
    assert "2 entries, the chain is whole" in out
    assert "A missing end cannot be seen without --head." in out
    assert run("head", "--ledger", path) is None
    head = capsys.readouterr().out.strip()
    assert head == Ledger(path).head()
    assert run("verify", "--ledger", path, "--head", head) == 0
    assert f"has the head {head[:12]}... noted earlier" in capsys.readouterr().out


def test_a_broken_ledger_names_the_line_and_returns_1(path, capsys):
    head = Ledger(path).head()
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first.replace(b"received", b"trained ") + second)
    assert run("verify", "--ledger", path) == 1
    assert capsys.readouterr().out.startswith("line 1: it was edited")
    path.write_bytes(first)
    assert run("verify", "--ledger", path) == 0
    assert run("verify", "--ledger", path, "--head", head) == 1
    assert "no entry has the digest" in capsys.readouterr().out


def test_a_half_line_that_was_moved_aside_is_told(path, capsys):
    path.write_bytes(path.read_bytes()[:-9])
    assert run("verify", "--ledger", path) == 1
    assert "line 2: a killed writer left it half-written" in capsys.readouterr().out
    with pytest.warns(UserWarning, match="half-written"):
        Ledger(path).append(LedgerEvent("note", "17"))
    assert run("verify", "--ledger", path) == 0
    assert "line 2: a killed writer's half line was moved to ledger.jsonl.torn-" in capsys.readouterr().out


def test_times_that_run_backwards_are_told_and_break_no_chain(path, capsys):
    entries, half = Ledger(path).entries(), "2026-03-01T09:30:00.500Z"
    for time, more in (
        (half, {}),
        (half, {"at": "2026-02-01T00:00:00Z"}),  # noted late, as by hand
        ("2026-03-01T09:29:59.000Z", {}),
        ("2026-03-01T09:30:00.000Z", {"at": "2026-03-02T00:00:00Z"}),
        ("yesterday", {}),
    ):
        event = {"event": "note", "request": "17", "time": time, **more}
        entry, line = next_line(entries[-1], event)
        entries.append(entry)
        path.write_bytes(path.read_bytes() + line)
    now, reason = entries[1].time, "a clock was set back, or the writers' clocks differ"
    assert run("verify", "--ledger", path) == 0
    out = capsys.readouterr().out
    assert "7 entries, the chain is whole" in out
    assert [line for line in out.splitlines() if line.startswith("line ")] == [
        f"line 3: its time {half} is before that of the line before, {now}: {reason}",
        f"line 5: its time 2026-03-01T09:29:59.000Z is before that of the line before, {half}: {reason}",
        "line 6: its event is of 2026-03-02T00:00:00Z, after its time 2026-03-01T09:30:00.000Z",
        "line 7: its time is 'yesterday', which is none in ISO 8601 with its zone",
    ]
    assert [remark.line for remark in Ledger(path).remarks()] == [3, 5, 6, 7]
    assert Ledger(path).verify() == []


def test_what_cannot_be_printed_is_shown_escaped_and_makes_no_line_of_its_own(path, capsys):
    Ledger(path).append(LedgerEvent("note", "17", adapter="a\nnow: revoked", note="\x1b[2J \udcff"))
    path.write_bytes(
        path.read_bytes() + next_line(Ledger(path).entries()[-1], {"event": "note", "request": "1\n2"})[1]
    )
    assert run("show", "--ledger", path) is None
    shown = capsys.readouterr().out
    assert shown.isascii()
    assert [line for line in shown.splitlines() if not line.startswith(" ")] == ["17", "1\\n2"]
    assert "adapter: a\\nnow: revoked\n" in shown
    assert r"note: \x1b[2J \udcff" in shown


def test_entries_by_hand_take_rows_key_adapter_and_evaluation(path, tmp_path, capsys):
    rows, key, folder = tmp_path / "forget.jsonl", make_digest_key(tmp_path / "key"), tmp_path / "forget-17"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    SpulConfig(base_fingerprint="ab" * 32).save(folder)
    whole().save(tmp_path / "evaluation")
    options = ("--ledger", path, "--event", "evaluated", "--request", "17", "--at", "2025-03-01T09:30:00Z")
    run("add", *options, "--rows", rows, "--digest_key", key, "--adapter", folder, "--note", "by hand",
        "--evaluation", tmp_path / "evaluation")  # fmt: skip
    state, entry = Ledger(path).states()["17"], Ledger(path).entries()[-1]
    assert state.rows == summarize_rows(ROWS, key)
    assert (state.adapter, state.prompt_sha256) == ("forget-17", hashlib.sha256(b"weights").hexdigest())
    assert state.evaluation == hashlib.sha256((tmp_path / "evaluation" / "evaluation.json").read_bytes()).hexdigest()
    assert (entry.at, entry.fields["note"]) == ("2025-03-01T09:30:00Z", "by hand")
    assert capsys.readouterr().out.splitlines() == [
        f"{path}, entry 2:",
        *("  request: 17", "  2025-03-01T09:30:00Z evaluated: by hand"),
        f"  rows: 2, HMAC-SHA256 {state.rows.digest}",
        *("  adapter: forget-17", f"  SHA-256 of the prompt: {state.prompt_sha256}"),
        *(f"  fingerprint of the base: {'ab' * 32}", f"  SHA-256 of the evaluation: {state.evaluation}"),
        *(f"  digest: {Ledger(path).head()}", f"  now: {state.now}"),
    ]
    run("add", "--ledger", path, "--event", "revoked", "--request", "17")
    now = capsys.readouterr().out.splitlines()[-1]
    assert now.startswith("  now: revoked since ")
    assert now.endswith(f": {AGAIN}")
    run("show", "--ledger", path)
    out = capsys.readouterr().out
    assert out.startswith("17\n  rows: 2, HMAC-SHA256 ")
    times = [entry.at for entry in Ledger(path).entries()]
    for line in (f"{times[0]} received", f"{times[1]} served", "2025-03-01T09:30:00Z evaluated: by hand",
                 f"{times[3]} revoked", f"now: revoked since {times[3]}: {AGAIN}"):  # fmt: skip
        assert f"\n  {line}\n" in out
    assert "Jane" not in path.read_text()


@pytest.mark.parametrize(("command", "words"), [("ledger", EVENTS), ("serve", ["NAME=FOLDER"])])
def test_help_names_every_event_and_no_empty_default(command, words, capsys):
    with pytest.raises(SystemExit):
        main([command, *(["add"] if command == "ledger" else []), "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert all(word in said for word in words)
    assert "default: []" not in said


def test_bad_options_are_refused(path, tmp_path, capsys):
    late = ("--event", "revoked", "--request", "17", "--at", "2999-01-01T00:00:00Z")
    with pytest.raises(ValueError, match=r"--digest_key is given without --rows"):
        run("add", "--ledger", path, "--event", "note", "--request", "1", "--digest_key", "key")
    assert main([*map(str, ("ledger", "add", "--ledger", path)), *late]) == 2
    assert "--at '2999-01-01T00:00:00Z' is in the future" in capsys.readouterr().err
    with pytest.raises(ValueError, match="event='forgotten' is not known"):
        run("add", "--ledger", path, "--event", "forgotten", "--request", "1")
    with pytest.raises(ValueError, match=r"knows no request '117'; did you mean '17'\?"):
        run("add", "--ledger", path, "--event", "revoked", "--request", "117")
    for event in ("received", "evaluated", "note"):
        with pytest.raises(ValueError, match="its name is that of its prompt where it is served"):
            run("add", "--ledger", path, "--event", event, "--request", "2026/017")
    with pytest.raises(FileNotFoundError, match="there is no ledger"):
        run("show", "--ledger", tmp_path / "other.jsonl")
    assert len(Ledger(path).entries()) == 2


def test_a_stop_by_hand_names_a_server_that_serves_the_request(path, capsys):
    stop = ("add", "--ledger", path, "--event", "stopped", "--request", "17")
    run(*stop)  # of the server that did not say its name
    assert capsys.readouterr().out.endswith("\n  now: no longer served\n")
    for name in ("gpu-1", "gpu-2"):
        Ledger(path).append(LedgerEvent("served", "17", server=name))
    for server in ((), ("--server", "gpu-3")):
        with pytest.raises(ValueError, match=r"is served by gpu-1, gpu-2; name the one that has stopped, by --server"):
            run(*stop, *server)
    run(*stop, "--server", "gpu-1")
    assert capsys.readouterr().out.endswith(" by gpu-2\n")
    run(*stop, "--server", "gpu-2")
    assert capsys.readouterr().out.endswith("\n  now: no longer served\n")


def test_a_server_without_a_name_neither_serves_nor_stops_unless_an_earlier_version_called_one_so(path, capsys):
    run("add", "--ledger", path, "--event", "stopped", "--request", "17")  # of the one that did not say its name
    for event in ("served", "stopped", "revoked"):
        with pytest.raises(ValueError, match=r"server=''; expected a name .* such as 'gpu-1', or none: leave it out"):
            run("add", "--ledger", path, "--event", event, "--request", "17", "--server", "")
    last, event = Ledger(path).entries()[-1], {"event": "served", "request": "17", "server": ""}
    path.write_bytes(path.read_bytes() + next_line(last, event)[1])
    run("add", "--ledger", path, "--event", "stopped", "--request", "17", "--server", "")
    assert capsys.readouterr().out.endswith("\n  now: no longer served\n")


def test_evidence_is_verified(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    from spul.evaluation.evidence import write_evidence

    digest = write_evidence(whole(), tmp_path / "pack", tmp_path / "ledger.jsonl", "17")
    assert run("evidence", "--folder", tmp_path / "pack", "--ledger", tmp_path / "ledger.jsonl") == 0
    assert digest in capsys.readouterr().out
    assert run("evidence", "--folder", tmp_path / "pack") == 0
    assert "cannot be seen without --ledger" in capsys.readouterr().out
    (tmp_path / "pack" / "report.md").write_text("")
    assert run("evidence", "--folder", tmp_path / "pack") == 1
    assert capsys.readouterr().out == "report.md was changed\n"


@pytest.mark.parametrize("arguments", [
    ("show",), ("verify",), ("head",), ("add", "--event", "revoked", "--request", "17"),
    ("add", "--event", "received", "--request", "2026-018"),
])  # fmt: skip
def test_the_ledger_is_read_and_written_without_loading_torch(path, arguments):
    code = (
        "import sys; from spul.commands.main import main; status = main(sys.argv[1:])\n"
        "print(status, *(name for name in ('torch', 'peft', 'datasets', 'accelerate') if name in sys.modules))"
    )
    given = [sys.executable, "-c", code, "ledger", arguments[0], "--ledger", str(path), *arguments[1:]]
    done = subprocess.run(given, capture_output=True, text=True, cwd=Path(spul.__file__).parents[1])
    assert (done.stdout.splitlines()[-1], done.stderr) == ("0", "")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_example_parses(name):
    command = COMMANDS[name]
    words = command.example.split(" >> ")[0].replace("'at their wish'", "wish").split()
    assert words[:3] == ["spul", "ledger", name]
    (options,) = HfArgumentParser(command.options).parse_args_into_dataclasses(words[3:])
    assert Path(getattr(options, "ledger", None) or "x").name == "ledger.jsonl"
    assert all("help" in field.metadata for field in command.options.__dataclass_fields__.values())
