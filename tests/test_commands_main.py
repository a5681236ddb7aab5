"""`spul NAME ...`: the table, flags and files of options, errors in one line, exit statuses."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from helpers import build
from safetensors import SafetensorError
from transformers import TrainingArguments

import spul
from spul.commands import main as module
from spul.commands import names
from spul.commands.command import Command
from spul.commands.main import BAD_OPTIONS, INTERRUPTED, TABLE, commands_of, main
from spul.commands.options import OptionsParser, parse, training_argument_names
from spul.commands.shared import option
from spul.evaluation.attacks.usual import usual_names
from spul.evaluation.measures import MEASURES
from spul.training.methods import METHODS, unlearning_method

ROOT = Path(spul.__file__).parents[1]
OWN = ("train", "evaluate", "combine", "gate", "lm-eval")


KERNEL = "gemm_4bit_forward"


@dataclass(kw_only=True)
class Options:
    model: str = option("the base", ...)
    files: list[str] | None = option("files")
    rate: float = option("a rate", 0.5)
    steps: int | None = option("steps")
    quiet: bool = option("whether to be quiet", False)
    loud: bool = option("whether to be loud", True)
    kind: str = field(default="a", metadata={"help": "kind", "choices": ["a", "b"]})


def command(run=lambda options: None) -> Command:
    return Command(Options, run, "spul toy --model M", "A toy.")


def read(*arguments: str) -> Options:
    return parse(command(), ["spul", "toy"], list(arguments))


@pytest.fixture
def toy(monkeypatch):
    """The command `spul gate` replaced by one that does what a test says."""

    def put(run, **more):
        commands = {"": command(run), **more}
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
        "--completion-template goes with --prompt-template": ["train", *needed, "--completion-template", "{a}"],
        "or --inputs alone": ["combine", *needed, "--inputs", str(rows), "--prompts", "a"],
        "gone.jsonl does not exist": [
            *("evaluate", *needed, "--test-forget", str(tmp_path / "gone.jsonl"), "--test-retain", str(rows))
        ],
        "of an evidence pack; name its folder: --evidence DIR": [*evaluate, "--request", "1"],
        "knows no request '1'": [*evaluate, "--evidence", "pack", "--ledger", str(rows), "--request", "1"],
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


def test_a_command_without_options_gets_its_arguments_as_they_are(monkeypatch):
    given = []
    one = Command(None, given.append, "spul gate", "A toy.")
    monkeypatch.setattr(module, "commands_of", lambda name: {"": one})
    assert main(["gate", "--any", "thing", "--help"]) == 0
    assert given == [["--any", "thing", "--help"]]


# ---- options ----


def test_flags_are_read_with_underscores_or_hyphens(tmp_path):
    found = read("--model", "m", "--files", "a", "b", "--rate", "1e-3", "--quiet", "--no-loud")
    assert found == Options(model="m", files=["a", "b"], rate=1e-3, quiet=True, loud=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "the following arguments are required: --model"),
        (("--model", "m", "--rte", "1"), r"unknown option or value '--rte'; did you mean rate\?$"),
        (("--model", "m", "--zzzzzz", "1"), r"spul toy --help lists the options\.$"),
        (("--model", "m", "--mod", "x"), "unknown option or value '--mod'"),
        (("--model", "m", "--rate", "much"), "argument --rate: invalid float value: 'much'"),
        (("--model", "m", "--kind", "c"), "invalid choice: 'c'"),
        (("--model", "m", "--config"), "argument --config: expected one argument"),
        (("--model", "m", "--files", "a", "--files", "b"), "--files is given twice; .*: --files A B"),
        (("--model", "m", "--model=n"), "--model is given twice"),
        (("--model", "m", "--loud", "--no_loud"), "--loud and --no_loud are one"),
    ],
)
def test_flags_that_cannot_be_read_are_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        read(*arguments)


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_a_file_of_options_is_read_as_its_flags_would_be(tmp_path):
    text = "model: m\nfiles: [' a', -b]\nrate: 1e-3\nsteps: 3\nquiet: true\nloud: false\nkind: b\n"
    found = read("--config", write(tmp_path / "c.yaml", text))
    expected = Options(model="m", files=[" a", "-b"], rate=1e-3, steps=3, quiet=True, loud=False, kind="b")
    assert found == expected


def test_values_in_a_file_are_taken_as_they_are_written(tmp_path):
    """YAML itself makes booleans of yes and no, and numbers of 017 and 12:30."""
    text = "model: 017\nfiles: [no, yes, 12:30, 2026-03-01, 1e3, 'null', ~x]\nsteps: 1_000\n"
    found = read("--config", write(tmp_path / "é c.yaml", "\ufeff" + text))
    assert found.model == "017"
    assert found.files == ["no", "yes", "12:30", "2026-03-01", "1e3", "null", "~x"]
    assert found.steps == 1000


def test_flags_win_over_the_file_and_a_later_file_over_an_earlier(tmp_path):
    first = write(tmp_path / "1.yaml", "model: one\nrate: 1\nsteps: null\n")
    second = write(tmp_path / "2.yaml", "model: two\nfiles: x\n")
    found = read("--rate", "3", "--config", first, "--config", second)
    assert found == Options(model="two", files=["x"], rate=3.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modle: m", r"unknown option 'modle'; did you mean model\?$"),
        ("help: true", "unknown option 'help'"),
        ("rate: much", "rate is 'much'; could not convert string to float"),
        ("rate: [1, 2]", "expected a single value"),
        ("kind: c", "expected one of a, b"),
        ("quiet: perhaps", "quiet is 'perhaps'"),
        ("[1, 2]", "holds a sequence; expected options by name"),
        ("", "holds nothing; expected options by name"),
        ("files: [a, null]", "expected a value, not null"),
        ("files: [[a]]", "expected a single value"),
        ("files: a\nfiles: b", "files is given twice"),
        ("steps: 1.5", "steps is '1.5'"),
        ("steps: {[a]: b}", "steps is a mapping"),
        ("model: !!python/name:os.system {}", "model is a mapping; could not determine a constructor"),
        ("a: b: c", "is not YAML"),
    ],
)
def test_keys_and_values_of_a_file_that_are_none_are_errors(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read("--model", "m", "--config", write(tmp_path / "c.yaml", text))


def test_a_file_of_options_that_is_missing_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.yaml does not exist; its folder has nothing in it"):
        read("--config", str(tmp_path / "none.yaml"))
    with pytest.raises(FileNotFoundError, match="is a folder; expected a file"):
        read("--config", str(tmp_path))


def test_options_of_training_arguments_are_read_and_left_out_of_help(tmp_path, capsys):
    one = commands_of("train")[""]
    base = ["--model", "m", "--forget", "f", "--retain", "r", "--output-dir", str(tmp_path), "--use-cpu", "true"]
    settings = write(tmp_path / "c.yaml", "adam_beta2: 0.9\nlr_scheduler_kwargs: {num_cycles: 2}\n")
    found = parse(one, ["spul", "train"], [*base, "--config", settings, "--weight-decay", "0.01"])
    assert (found.adam_beta2, found.weight_decay) == (0.9, 0.01)
    assert found.lr_scheduler_kwargs == {"num_cycles": 2}
    assert found.learning_rate is None
    for shows_all in (False, True):
        with pytest.raises(SystemExit):
            parse(one, ["spul", "train"], ["--help-all" if shows_all else "--help"])
        said = capsys.readouterr().out
        assert ("--adam_beta2" in said) is shows_all
        assert "--forget_fraction" in said


def test_a_mistyped_flag_that_is_required_is_named_with_those_of_a_near_name(capsys):
    assert main(["train", "--model", "m", "--foget", "f.jsonl", "--retain", "r.jsonl", "--output-dir", "out"]) == 2
    assert "unknown option or value '--foget'; did you mean forget or test_forget?\n" in capsys.readouterr().err
