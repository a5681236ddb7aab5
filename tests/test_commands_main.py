"""`spul NAME ...`: the table, errors in one line, exit statuses."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from helpers import build
from safetensors import SafetensorError
from transformers import TrainingArguments

import spul
from spul.commands import main as module
from spul.commands import names
from spul.commands.command import Command
from spul.commands.main import BAD_OPTIONS, INTERRUPTED, TABLE, UNREAD, commands_of, main
from spul.commands.options import OptionsParser, parse, training_argument_names
from spul.commands.shared import option
from spul.evaluation.attacks.usual import usual_names
from spul.evaluation.measures import MEASURES
from spul.records import Ledger
from spul.records.ledger_lines import next_line
from spul.training.methods import METHODS, unlearning_method

ROOT = Path(spul.__file__).parents[1]
OWN = ("train", "evaluate", "combine", "gate", "lm-eval")


KERNEL = "gemm_4bit_forward"


@dataclass(kw_only=True)
class Options:
    model: str = option("the base", ...)


@pytest.fixture
def toy(monkeypatch):
    """The command `spul gate` replaced by one that does what a test says."""

    def put(run, **more):
        commands = {"": Command(Options, run, "spul toy --model M", "A toy."), **more}
        monkeypatch.setattr(module, "commands_of", lambda name: commands)

    return put


# ---- the table ----


def test_the_message_of_the_4bit_kernel_comes_once_a_model_in_4bit_is_loaded_and_not_before(tmp_path):
    pytest.importorskip("bitsandbytes")
    build("llama").save_pretrained(tmp_path)
    code = (
        "import logging, sys; from spul.commands.main import main; main(['--help'])\n"
        "from spul.models.loading import load_causal_lm\n"
        f"logging.getLogger('bitsandbytes.backends.cpu.ops').warning('no {KERNEL} here')\n"  # not every CPU's import
        "logging.getLogger('bitsandbytes.other').warning('another message')\n"
        "load_causal_lm(sys.argv[1]); print('loaded', file=sys.stderr)\n"
        "load_causal_lm(sys.argv[1], bits=4); load_causal_lm(sys.argv[1], bits=4)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, cwd=ROOT)
    before, after = done.stderr.split("loaded\n")
    assert (done.returncode, "another message" in before, KERNEL in before) == (0, True, False)
    assert after.count(f"no {KERNEL} here") == 1


def test_help_lists_every_command_and_loads_neither_torch_nor_transformers():
    code = (
        "import sys; from spul.commands.main import main; main(['--help']); "
        "print(*(name for name in ('torch', 'transformers', 'peft') if name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    *lines, loaded = done.stdout.splitlines()
    assert (loaded, done.stderr) == ("", "")
    for name, purpose in TABLE.items():
        assert [line.split(maxsplit=1)[1] for line in lines if line.split()[:1] == [name]] == [purpose]


def test_what_options_and_files_show_is_refused_before_torch_is_imported(tmp_path):
    rows, others = tmp_path / "rows.jsonl", tmp_path / "retain.jsonl"
    for path in (rows, others):
        path.write_text('{"prompt": "a", "completion": " b"}\n')
    needed = ["--model", "m", "--forget", str(rows), "--retain", str(others), "--output-dir", str(tmp_path / "out")]
    fit = ["gate", "fit", "--kind", "text", "--retain", str(others)]
    serve = ["serve", "--model", "m", "--prompts"]
    evaluate = ["evaluate", *needed, "--test-forget", str(rows), "--test-retain", str(others)]
    key = ["--digest-key", str(rows)]
    both = [*needed, "--start", "near", "--instruction", "decline", "--save-steps", "3"]
    refused = {
        "did you mean save_steps": ["train", *needed, "--save-step", "3"],
        "are required: --output_dir/--output-dir": ["train", "--seed", "1", *needed[:-2]],
        "did you mean NPO": ["train", *needed, "--method", "NPOO"],
        "--num-train-epochs is nan": ["train", *needed, "--num-train-epochs", "nan", "--no-skip-memory-metrics"],
        "none.jsonl does not exist; its folder has retain.jsonl, rows.jsonl": [
            *("train", *needed, "--save-steps", "3", "--test-forget", str(tmp_path / "none.jsonl"))
        ],
        "--start and --instruction both": ["train", *both],
        "and the name of the request that is noted": ["train", *needed, "--ledger", str(rows)],
        "rows.jsonl' is no entry": ["train", *needed, "--ledger", str(rows), "--request", "1"],
        "there is no file 'no.key' with a digest_key": ["train", *needed, "--digest-key", "no.key"],
        "rows.jsonl' holds no --digest-key": ["combine", *needed, "--generic", "a", "--prompts", "a", "b", *key],
        "retain.jsonl' is a file; expected a folder": ["train", *needed, "--reference-dir", str(others)],
        "--completion-template goes with --prompt-template": ["train", *needed, "--completion-template", "{a}"],
        "or --inputs alone": ["combine", *needed, "--inputs", str(rows), "--prompts", "a"],
        "gone.jsonl does not exist": [
            *("evaluate", *needed, "--test-forget", str(tmp_path / "gone.jsonl"), "--test-retain", str(rows))
        ],
        "of an evidence pack; name its folder: --evidence DIR": [*evaluate, "--request", "1"],
        "retain.jsonl' is no entry": [*evaluate, "--evidence", "pack", "--ledger", str(others), "--request", "1"],
        "--refusal is given without the folder": [*fit, "--refusal", "no", "--forget", str(rows)],
        "give forget and retain, a file of each": [*fit, "--adapter", str(tmp_path)],
        "lost.jsonl does not exist": [*fit, "--adapter", str(tmp_path), "--forget", str(tmp_path / "lost.jsonl")],
        "rows.jsonl is given to --forget and to --test-retain": [*evaluate[:-1], str(rows)],
        "expected the base, by name or folder: --model BASE": [
            *("gate", "fit", "--adapter", str(tmp_path), "--kind", "states", *needed[2:6])
        ],
        "there is nothing to check": ["gate", "check", "--adapter", "a"],
        "there is no prompt to serve": serve[:-1],
        "of the prompt '2026-017', is no folder": [*serve, f"2026-017={tmp_path / 'gone'}"],
        "is no entry of a ledger": [*serve, str(tmp_path), "--ledger", str(rows)],
        "--prompts-dir is for adding prompts, which needs --admin-token-file": [*serve, "a", "--prompts-dir", "b"],
        "token does not exist; its folder has": [*serve, str(tmp_path), "--admin-token-file", str(tmp_path / "token")],
        "is a folder with files in it": [
            *("export", "vllm", "--model", "m", "--adapter", "a", "--output-dir", str(tmp_path))
        ],
    }
    code = (
        "import json, sys; from spul.commands.main import main\n"
        "for arguments in json.loads(sys.argv[1]): main(arguments)\n"
        "print(*(name for name in ('torch', 'peft', 'datasets') if name in sys.modules))"
    )
    given = json.dumps(list(refused.values()))
    done = subprocess.run([sys.executable, "-c", code, given], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "\n", "none is loaded"
    lines = done.stderr.splitlines()
    assert len(lines) == len(refused)
    for line, said in zip(lines, refused, strict=True):
        assert said in line


def test_the_names_of_training_arguments_are_those_of_the_class():
    assert training_argument_names() == {field.name for field in dataclasses.fields(TrainingArguments)}


@pytest.mark.parametrize("name", OWN)
def test_every_command_of_this_module_has_a_purpose_and_an_example_of_its_own_name(name):
    for sub, one in commands_of(name).items():
        assert one.purpose.endswith(".")
        assert one.example.startswith(" ".join(filter(None, ("spul", name, sub))))


@pytest.mark.parametrize("name", [name for name in OWN if name != "lm-eval"])
def test_help_shows_the_example_and_the_example_parses(name, capsys):
    for sub, one in commands_of(name).items():
        words = [name, *([sub] if sub else [])]
        with pytest.raises(SystemExit) as done:
            main([*words, "--help"])
        assert done.value.code == 0
        assert one.example in capsys.readouterr().out
        arguments = shlex.split(one.example)[1 + len(words) :]
        assert parse(one, ["spul", *words], arguments) is not None


def test_help_of_a_command_loads_no_torch():
    code = (
        "import contextlib, sys; from spul.commands.main import main\n"
        "for words in ('train', 'combine', 'evaluate', 'gate fit', 'gate check', 'serve', 'ledger add'):\n"
        "    with contextlib.suppress(SystemExit): main([*words.split(), '--help'])\n"
        "print(*(name for name in ('torch', 'peft', 'datasets') if name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.stdout.splitlines()[-1], done.stderr) == ("", "")


@pytest.mark.parametrize("name", [name for name in OWN if name != "lm-eval"])
def test_help_of_every_option_begins_small_and_has_no_full_stop(name):
    for one in commands_of(name).values():
        texts = [str(action.help) for action in OptionsParser(one, ["spul", name])._actions]
        texts = [text for text in texts if text != argparse.SUPPRESS]
        assert len(texts) > 1
        assert not [text for text in texts if text.endswith(".")]
        assert not [text for text in texts if not text[0].islower() and not text.split()[0].isupper()]


def shown(capsys, *words):
    with pytest.raises(SystemExit):
        main([*words, "--help"])
    return " ".join(capsys.readouterr().out.split())


def test_names_that_options_take_are_those_of_the_registries():
    assert [*names.MEASURES] == [*MEASURES]
    assert [*names.ATTACKS] == usual_names(of_caller=False)
    assert {*METHODS} - {*names.METHODS} == {"RMU"}
    assert all(unlearning_method(name, "prompt") for name in names.METHODS)


@pytest.mark.parametrize(
    ("command", "option"), [("train", "method"), ("evaluate", "measures"), ("evaluate", "attacks")]
)
def test_help_names_all_that_an_option_takes_as_it_is_typed(command, option, capsys):
    said = shown(capsys, command)
    assert ", ".join(map(shlex.quote, names.NAMES[option])) in said


def test_help_shows_a_default_that_is_a_text_as_it_is_typed(capsys):
    said = shown(capsys, "train")
    assert "(default: ' {answer}')" in said
    assert "(default: SPUL)" in said


def test_python_m_spul_is_the_same_program():
    done = subprocess.run([sys.executable, "-m", "spul", "--version"], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"spul {spul.__version__}\n", "")


def test_a_command_whose_module_is_missing_is_an_error_that_says_so(monkeypatch, capsys):
    monkeypatch.setitem(TABLE, "no-such-command", "nothing")
    assert main(["no-such-command"]) == BAD_OPTIONS
    assert "no module spul.commands.no_such_command" in capsys.readouterr().err


def test_an_unknown_command_names_those_that_are_near(capsys):
    assert main(["trian"]) == BAD_OPTIONS
    assert capsys.readouterr().err == "spul: there is no command 'trian'; did you mean train?\n"
    assert main(["xyz"]) == BAD_OPTIONS
    assert capsys.readouterr().err.endswith(", lm-eval.\n")
    assert main(["gate", "fitt"]) == BAD_OPTIONS
    assert "did you mean fit?\n" in capsys.readouterr().err


# ---- statuses ----


def test_the_status_is_the_commands_own_or_0(toy):
    toy(lambda options: None)
    assert main(["gate", "--model", "m"]) == 0
    toy(lambda options: 7)
    assert main(["gate", "--model", "m"]) == 7


@pytest.mark.parametrize(
    "error", [ValueError, FileNotFoundError, OSError, ImportError, SafetensorError, FloatingPointError]
)
def test_errors_of_options_and_files_are_one_line_and_status_2(toy, error, capsys, monkeypatch):
    def run(options):
        raise error("bad\n  thing")

    toy(run)
    assert main(["gate", "--model", "m"]) == BAD_OPTIONS
    assert capsys.readouterr().err == "spul gate: bad thing\n"
    monkeypatch.setenv("SPUL_TRACEBACK", "1")
    assert main(["gate", "--model", "m"]) == BAD_OPTIONS
    assert "Traceback" in capsys.readouterr().err


def test_control_characters_in_an_error_are_shown_escaped(toy, capsys):
    def run(options):
        raise ValueError("row 1 is 'a\x1b[2J\u202e'")

    toy(run)
    assert main(["gate", "--model", "m"]) == BAD_OPTIONS
    assert capsys.readouterr().err == "spul gate: row 1 is 'a\\x1b[2J\\u202e'\n"


def test_other_errors_keep_their_traceback(toy):
    def run(options):
        raise RuntimeError("a bug")

    toy(run)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["gate", "--model", "m"])


def test_an_interrupted_command_has_status_130(toy):
    def run(options):
        raise KeyboardInterrupt

    toy(run)
    assert main(["gate", "--model", "m"]) == INTERRUPTED == 130


@pytest.mark.parametrize("requests", [1, 2000])  # few wait for the end to be written
def test_an_output_that_nobody_reads_any_more_ends_the_command_in_silence(tmp_path, requests):
    entry, lines = None, b""
    for i in range(requests):
        entry, line = next_line(entry, {"event": "received", "request": str(i)})
        lines += line
    (tmp_path / "ledger.jsonl").write_bytes(lines)
    end, output = os.pipe()
    os.close(end)
    show = [sys.executable, "-m", "spul", "ledger", "show", "--ledger", str(tmp_path / "ledger.jsonl")]
    done = subprocess.run(show, stdout=output, stderr=subprocess.PIPE, cwd=ROOT)
    os.close(output)
    assert (done.returncode, done.stderr) == (UNREAD, b"")


def test_an_output_that_lacks_a_letter_or_is_closed_is_no_error_since_what_was_done_was_done(tmp_path):
    path = tmp_path / "l\xe9dger.jsonl"
    add = [sys.executable, "-m", "spul", "ledger", "add", "--ledger", str(path)]
    add += ["--event", "received", "--request", "1"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(add, capture_output=True, cwd=ROOT, env=environment)
    assert (done.returncode, done.stderr) == (0, b"")
    assert rb"l\xe9dger.jsonl, entry 0:" in done.stdout
    closed = subprocess.run(["sh", "-c", 'exec "$@" >&-', "sh", *add], stderr=subprocess.PIPE, cwd=ROOT)
    assert (closed.returncode, closed.stderr) == (0, b"")
    assert len(Ledger(path).entries()) == 2


def test_a_command_without_options_gets_its_arguments_as_they_are(monkeypatch):
    given = []
    one = Command(None, given.append, "spul gate", "A toy.")
    monkeypatch.setattr(module, "commands_of", lambda name: {"": one})
    assert main(["gate", "--any", "thing", "--help"]) == 0
    assert given == [["--any", "thing", "--help"]]
