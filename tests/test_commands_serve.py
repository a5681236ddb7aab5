"""`spul serve`: options to a server, and what refuses to start."""

from __future__ import annotations

import shutil

import pytest
import torch
import uvicorn
from helpers import CHAT_TEMPLATE, build, make_tokenizer
from servers import alone, client, make_gated, running_app
from transformers import HfArgumentParser

from spul.commands.serve import COMMANDS
from spul.commands.serve import build as server_of

EVENTS = []


def record(event):
    EVENTS.append(event)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base in `tiny`, and in `prompts` two prompts of it behind gates."""
    found = tmp_path_factory.mktemp("serve")
    build("llama", torch.float64).save_pretrained(found / "tiny")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(found / "tiny")
    make_gated("other").save_pretrained(found / "prompts")
    shutil.copytree(found / "prompts" / "other", found / "no-gate")
    shutil.rmtree(found / "no-gate" / "gate")
    (found / "token").write_text("a-token-of-the-administrator\n")
    return found


def options(folder, *arguments):
    given = [str(one).replace("@", f"{folder}/") for one in arguments]
    [found] = HfArgumentParser(COMMANDS[""].options).parse_args_into_dataclasses(["--model", f"{folder}/tiny", *given])
    return found


@pytest.mark.parametrize(("prompts", "name"), [(["doe=@prompts/other"], "doe"), (["@prompts"], "other")])
def test_a_server_is_made_of_options(folder, prompts, name):
    EVENTS.clear()
    found = options(folder, "--prompts", *prompts, "--record", f"{__name__}:record", "--admin_token_file", "@token",
                    "--prompts_dir", "@prompts", "--max_new_tokens", 20, "--device", "cpu")  # fmt: skip
    app, limits = server_of(found)
    assert (found.host, limits.max_new_tokens) == ("127.0.0.1", 20)
    gated = make_gated("other")
    with running_app(app) as (url, _):
        said = client(url).completions.create(model="tiny", prompt="text of doe", temperature=0, max_tokens=6)
    assert said.choices[0].text == alone(gated, gated.tokenizer("text of doe")["input_ids"], "other", 6)[0]
    assert [one["prompt"] for one in EVENTS if one["event"] == "answered"] == [name]


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ([], ValueError, r"no prompt to serve.*--prompts NAME=FOLDER"),
        (["--prompts", "a=@nothing"], FileNotFoundError, "is no folder"),
        (["--prompts", "a=@no-gate"], FileNotFoundError, "has no gate"),
        (["--prompts", "@no-gate"], FileNotFoundError, "spul_gates.json"),
        (["--prompts", "@prompts", "a=@no-gate"], ValueError, "expected NAME=FOLDER"),
        (["--prompts", "a=@no-gate", "a=@no-gate"], ValueError, "each name once"),
        (["--prompts", "a/b=@no-gate", "--always", "a/b"], ValueError, "a prompt's name"),
        (["--prompts", "@prompts", "--always", "other"], ValueError, "always goes with"),
        (["--prompts", "@prompts", "--engine", "other"], ValueError, "transformers"),
        (["--prompts", "@prompts", "--max_batch", "0"], ValueError, "max_batch=0"),
        (["--prompts", "@prompts", "--prompts_dir", "@prompts"], ValueError, "needs admin_token_file"),
        (["--prompts", "@prompts", "--record", "nothing:here"], ValueError, "is not found"),
        (["--prompts", "@prompts", "--record", "spul.serving.requests:MOST_STOPS"], ValueError, "expected a function"),
        (["--prompts", "@prompts", "--admin_token_file", "@nothing"], FileNotFoundError, "nothing"),
    ],
)
def test_what_is_unclear_does_not_start(folder, arguments, error, says):
    with pytest.raises(error, match=says):
        server_of(options(folder, *arguments))


def test_a_prompt_without_a_gate_is_served_if_it_is_to_be_always_on(folder):
    app, _ = server_of(options(folder, "--prompts", "a=@no-gate", "--always", "a"))
    gated = make_gated("other")
    with running_app(app) as (url, _):
        said = client(url).completions.create(model="tiny", prompt="good", temperature=0, max_tokens=6)
    assert said.choices[0].text == alone(gated, gated.tokenizer("good")["input_ids"], "other", 6)[0]


def test_vllm_is_chosen_by_an_option(folder):
    app, _ = server_of(options(folder, "--prompts", "@prompts", "--engine", "vllm"))
    with running_app(app) as (url, _):
        assert [one.id for one in client(url).models.list()] == ["tiny"]


def test_it_binds_to_this_machine_unless_told_and_warns_otherwise(folder, monkeypatch, caplog):
    calls = []
    monkeypatch.setattr(uvicorn, "run", lambda app, **given: calls.append(given))
    COMMANDS[""].run(options(folder, "--prompts", "@prompts"))
    assert (calls[0]["host"], calls[0]["port"], caplog.text) == ("127.0.0.1", 8080, "")
    COMMANDS[""].run(options(folder, "--prompts", "@prompts", "--host", "0.0.0.0"))
    assert "asks for no key" in caplog.text
