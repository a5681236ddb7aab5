"""`spul export`: options to files."""

from __future__ import annotations

import json
import shutil
import warnings

import pytest
import torch
from helpers import CONFIGS, build, make_tokenizer
from servers import make_gated
from transformers import HfArgumentParser

from spul import SoftPromptUnlearner
from spul.commands import export, serve

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


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("differs", ["base", "record"])
def test_a_prompt_of_another_base_is_exported_only_if_that_is_asked_for(kind, differs, saved, tmp_path):
    shutil.copytree(saved, tmp_path / "saved")
    if differs == "base":
        other = build("llama")
        with torch.no_grad():
            other.lm_head.weight += 1
        other.save_pretrained(tmp_path / "saved" / "base")
    else:
        (tmp_path / "saved" / "adapter" / "spul_config.json").unlink()
    with pytest.raises(ValueError, match=r"neither forget nor retain on this base.*--allow-other-base"):
        run(kind, tmp_path / "saved", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the loader's, of the same
        run(kind, tmp_path / "saved", tmp_path / "out", "--allow-other-base")
    assert FILES[kind] <= {path.name for path in (tmp_path / "out").iterdir()}


def test_the_embeddings_of_the_base_can_be_left_out(saved, tmp_path):
    run("vllm", saved, tmp_path / "out", "--no_with_embeddings")
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES["vllm"] - {"embeddings.safetensors"}


def test_wrong_options_are_refused_before_anything_is_loaded(tmp_path, capsys):
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="new or empty"):
        run("vllm", tmp_path / "nowhere", tmp_path)
    for folder in ("note.txt", "note.txt/new", "note.txt/deep/new"):
        with pytest.raises(FileExistsError, match=r"note\.txt' is a file"):
            run("vllm", tmp_path / "nowhere", tmp_path / folder)
    with pytest.raises(SystemExit, match="2"):
        run("vllm", tmp_path / "nowhere", tmp_path, "--dtype", "int8")
    assert "invalid choice: 'int8'" in capsys.readouterr().err


def test_a_base_that_is_nowhere_is_named(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "saved")
    shutil.rmtree(tmp_path / "saved" / "base")
    with pytest.raises(OSError, match=r"base' is no folder here, and the Hub gave no model of this name"):
        run("vllm", tmp_path / "saved", tmp_path / "out")


def damaged(folder, kind):
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    if kind == "other kind":
        config = {"peft_type": "LORA", "r": 8, "task_type": "CAUSAL_LM"}
    elif kind == "no length":
        del config["num_virtual_tokens"]
    else:
        config["num_virtual_tokens"] = "many"
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("kind", ["other kind", "no length", "length is text"])
def test_a_folder_that_is_no_prompt_is_refused_before_the_base_is_loaded(kind, saved, tmp_path):
    shutil.copytree(saved / "adapter", tmp_path / "adapter")
    damaged(tmp_path / "adapter", kind)
    where, base = tmp_path / "adapter", str(tmp_path / "no-base")
    parsed = HfArgumentParser(export.VllmOptions).parse_args_into_dataclasses
    with pytest.raises(ValueError, match="adapter"):
        export.run_vllm(*parsed(["--model", base, "--adapter", str(where), "--output_dir", str(tmp_path / "out")]))
    options = HfArgumentParser(serve.ServeOptions).parse_args_into_dataclasses
    with pytest.raises(ValueError, match="adapter"):
        serve.build(*options(["--model", base, "--prompts", f"a={where}", "--always", "a"]))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", FILES)
def test_a_prefix_is_refused_by_its_folder_and_type_before_the_base_is_loaded(kind, saved, tmp_path):
    base = type(build("llama")).from_pretrained(saved / "base")
    SoftPromptUnlearner(base, CONFIGS["prefix_tuning"]()).save_pretrained(str(tmp_path / "adapter"))
    with pytest.raises(
        ValueError, match=r"adapter holds a prompt of prefix_tuning: .* prompt_tuning or p_tuning alone"
    ):
        run(kind, tmp_path, tmp_path / "out")  # there is no base beside it
    assert not (tmp_path / "out").exists()


def test_gates_and_other_prompts_that_are_not_exported_are_named(saved, tmp_path, capsys):
    gated = make_gated("other")
    gated.unlearner.float()
    gated.save_pretrained(tmp_path / "prompts")
    shutil.copytree(saved / "base", tmp_path / "base")
    (tmp_path / "prompts").rename(tmp_path / "adapter")
    run("vllm", tmp_path, tmp_path / "out", "--no_with_embeddings")
    said = capsys.readouterr().out.splitlines()[0]
    assert said.startswith("Not in the export: its gate, so that every request gets the prompt; the prompts 'other'")
    run("vllm", saved, tmp_path / "again", "--no_with_embeddings")
    assert "Not in" not in capsys.readouterr().out


@pytest.mark.parametrize("kind", FILES)
def test_the_example_is_one_that_the_parser_takes(kind):
    command = export.COMMANDS[kind]
    _, _, named, *flags = command.example.split()
    assert named == kind
    HfArgumentParser(command.options).parse_args_into_dataclasses(flags)
