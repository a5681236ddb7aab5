"""`spul export`: options to files."""

from __future__ import annotations

import json

import pytest
from helpers import CONFIGS, build, make_tokenizer
from transformers import HfArgumentParser

from spul import SoftPromptUnlearner
from spul.commands import export

FILES = {
    "vllm": {"facts.json", "prompt.safetensors", "soft_prompt.py", "embeddings.safetensors"},
    "checkpoint": {"spul_export.json", "model.safetensors", "tokenizer.json", "config.json", "generation_config.json"},
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A base and a prompt, as folders."""
    folder = tmp_path_factory.mktemp("saved")
    build("llama").save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "base")
    base = type(build("llama")).from_pretrained(folder / "base")
    SoftPromptUnlearner(base, CONFIGS["prompt_tuning"]()).save_pretrained(str(folder / "adapter"))
    return folder


def run(kind, saved, output, *flags):
    command = export.COMMANDS[kind]
    given = ["--model", str(saved / "base"), "--adapter", str(saved / "adapter"), "--output-dir", str(output), *flags]
    (options,) = HfArgumentParser(command.options).parse_args_into_dataclasses(given)
    assert not command.run(options)


@pytest.mark.parametrize("kind", FILES)
def test_each_kind_writes_its_files_and_says_how_to_serve_them(kind, saved, tmp_path, capsys):
    run(kind, saved, tmp_path / "out")
    assert FILES[kind] <= {path.name for path in (tmp_path / "out").iterdir()}
    printed = capsys.readouterr().out
    assert str(tmp_path / "out") in printed
    assert {"vllm": "--enable-prompt-embeds", "checkpoint": "transformers serve"}[kind] in printed


def test_the_type_of_the_base_is_that_of_the_export(saved, tmp_path):
    run("checkpoint", saved, tmp_path / "out", "--dtype", "bfloat16")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_the_embeddings_of_the_base_can_be_left_out(saved, tmp_path):
    run("vllm", saved, tmp_path / "out", "--no_with_embeddings")
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES["vllm"] - {"embeddings.safetensors"}


def test_wrong_options_are_refused_before_anything_is_loaded(tmp_path):
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="new or empty"):
        run("vllm", tmp_path / "nowhere", tmp_path)
    for folder in ("note.txt", "note.txt/new", "note.txt/deep/new"):
        with pytest.raises(FileExistsError, match=r"note\.txt' is a file"):
            run("vllm", tmp_path / "nowhere", tmp_path / folder)
    with pytest.raises(ValueError, match=r"dtype='int8'; expected one of auto"):
        run("vllm", tmp_path / "nowhere", tmp_path, "--dtype", "int8")


@pytest.mark.parametrize("kind", FILES)
def test_the_example_is_one_that_the_parser_takes(kind):
    command = export.COMMANDS[kind]
    _, _, named, *flags = command.example.split()
    assert named == kind
    HfArgumentParser(command.options).parse_args_into_dataclasses(flags)
