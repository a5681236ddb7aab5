"""`spul serve`: options to a server, what it says, and what refuses to start."""

from __future__ import annotations

import os
import re
import socket

import pytest
import torch
import uvicorn
from helpers import CONFIGS, build, make_tokenizer
from serve_folder import EVENTS, options, write_served
from servers import alone, client, make_gated, running_app

from spul import SoftPromptUnlearner
from spul.commands import serve
from spul.commands.serve import COMMANDS
from spul.commands.serve import build as server_of
from spul.models.loading import load_causal_lm
from spul.records import Ledger, LedgerEvent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_served(tmp_path_factory.mktemp("serve"))


@pytest.mark.parametrize(("prompts", "name"), [(["doe=@prompts/other"], "doe"), (["@prompts"], "other")])
def test_a_server_is_made_of_options(folder, prompts, name):
    EVENTS.clear()
    found = options(folder, "--prompts", *prompts, "--record", "serve_folder:record", "--admin_token_file", "@token",
                    "--prompts_dir", "@prompts", "--max_new_tokens", 20, "--device", "cpu")  # fmt: skip
    app, limits = server_of(found)
    assert (found.host, limits.max_new_tokens) == ("127.0.0.1", 20)
    gated = make_gated("other")
    with running_app(app) as (url, _):
        said = client(url).completions.create(model="tiny", prompt="text of doe", temperature=0, max_tokens=6)
    assert said.choices[0].text == alone(gated, gated.tokenizer("text of doe")["input_ids"], "other", 6)[0]
    assert [one["request"] for one in EVENTS if one["event"] == "answered"] == [name]


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ([], ValueError, r"no prompt to serve.*--prompts NAME=FOLDER"),
        (["--prompts", "a=@nothing"], FileNotFoundError, "is no folder"),
        (["--prompts", "a=@no-gate"], FileNotFoundError, "has no gate"),
        (["--prompts", "@no-gate"], FileNotFoundError, r"spul_gates.json\). Fit the gate .*spul gate fit --adapter"),
        (["--prompts", "@no"], ValueError, "no holds no prompt, and has no name here; give it one: --prompts NAME="),
        (["--prompts", "a=@no", "b=@prompts", "--always", "a"], ValueError, "'a' is always on"),
        (["--prompts", "@prompts", "a=@no-gate"], ValueError, "expected NAME=FOLDER"),
        (["--prompts", "a=@no-gate", "a=@no-gate"], ValueError, "each name once"),
        (["--prompts", "a/b=@no-gate", "--always", "a/b"], ValueError, "no prompt can be served by this name: 'a/b'"),
        (["--prompts", "@prompts", "--always", "other"], ValueError, "always goes with"),
        (["--prompts", "@prompts", "--engine", "other"], ValueError, "transformers"),
        (["--prompts", "@prompts", "--vllm_url", "http://127.0.0.1:1"], ValueError, "give --engine vllm as well"),
        (["--prompts", "@prompts", "--vllm_model", "m"], ValueError, "vllm_model is given, and the engine is transf"),
        (
            ["--prompts", "@prompts", "--engine", "vllm", "--vllm_url", "127.0.0.1:1"],
            ValueError,
            "vllm_url='127.0.0.1:1'; expected vLLM's address",
        ),
        (["--prompts", "@prompts", "--max_batch", "0"], ValueError, "max_batch=0"),
        (["--prompts", "@prompts", "--prompts_dir", "@prompts"], ValueError, "needs admin_token_file"),
        (["--prompts", "@prompts", "--record", "nothing:here"], ValueError, "is not found"),
        (["--prompts", "@prompts", "--record", "spul.serving.requests:MOST_STOPS"], ValueError, "expected a function"),
        (["--prompts", "@prompts", "--admin_token_file", "@nothing"], FileNotFoundError, "nothing"),
        (["--prompts", "@prompts", "--ledger", "@nothing/ledger.jsonl"], FileNotFoundError, "there is no folder"),
        (["--prompts", "@prompts", "--ledger", "@prompts"], ValueError, "is a folder"),
        (["--prompts", "@prompts", "--ledger", "@token"], ValueError, "is no entry of a ledger"),
        (["--prompts", "@prompts", "--device", "nonsense"], ValueError, "device='nonsense' cannot be used"),
        (["--prompts", "@prompts", "--device", "cuda:99"], ValueError, "device='cuda:99' cannot be used"),
        (["--prompts", "@prompts", "--timeout", "inf"], ValueError, "timeout=inf"),
        *(
            (
                ["--prompts", "@prompts", f"--{option}", name],
                ValueError,
                f"{option}='{name}'; expected a name .* such as '{example}', or none: leave it out",
            )
            for option, example in (
                *(("server_name", "gpu-1"), ("served_model_name", "opt-1.3b")),
                *(("vllm_model", "facebook/opt-1.3b"), ("host", "127.0.0.1")),
            )
            for name in ("", " ")
        ),
        (["--prompts", "@prompts", "--device", ""], ValueError, "device='' cannot be used"),
        (["--prompts", "@prompts", "--admin_token_file", "@empty"], ValueError, "has 0 characters"),
        (["--prompts", "@prompts", "--admin_token_file", "@utf-16"], ValueError, "utf-16 is no text in UTF-8"),
        (
            ["--prompts", "@prompts", "--engine", "vllm", "--vllm_key_file", "@two-lines"],
            ValueError,
            "two-lines has white space in it",
        ),
    ],
)
def test_what_is_unclear_does_not_start_and_loads_no_base(folder, arguments, error, says, tmp_path):
    with pytest.raises(error, match=says):
        server_of(options(folder, "--model", tmp_path / "no-base", *arguments))


def test_an_address_that_is_taken_or_another_machines_is_said_before_anything_is_loaded(folder, tmp_path):
    given = ("--prompts", "@prompts", "--model", tmp_path / "no-base")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=rf"cannot listen at --host 127\.0\.0\.1 --port {port} \(.*in use"):
            COMMANDS[""].run(options(folder, *given, "--port", port))
    with pytest.raises(OSError, match=r"cannot listen at --host 192\.0\.2\.1 --port 0 "):
        COMMANDS[""].run(options(folder, *given, "--host", "192.0.2.1", "--port", 0))


def test_a_host_of_several_addresses_listens_at_all_of_them(monkeypatch):
    def found(host, port, *args, **kwargs):
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (one, port)) for one in ("127.0.0.1", "127.0.0.2")]

    monkeypatch.setattr(socket, "getaddrinfo", found)
    with socket.create_server(("127.0.0.2", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=rf"cannot listen at --host localhost --port {port} \(.*in use"):
            serve._check_listens("localhost", port)
    serve._check_listens("localhost", port)


def test_a_token_may_come_through_a_pipe_as_shells_pass_the_output_of_a_program(folder):
    end, other = os.pipe()
    os.write(other, b"a-token-of-more-than-32-characters\n")
    os.close(other)
    server_of(options(folder, "--prompts", "@prompts", "--admin_token_file", f"/dev/fd/{end}"))
    assert os.read(end, 1) == b""
    os.close(end)


def test_prompts_that_lie_in_the_folder_of_one_that_is_served_are_warned_of(folder, caplog):
    server_of(options(folder, "--prompts", "a=@prompts"))
    assert "prompts also holds the prompts ['other'], which are not served" in caplog.text
    caplog.clear()
    server_of(options(folder, "--prompts", "a=@prompts", "b=@prompts/other"))
    assert not caplog.text


def test_a_prompt_without_a_gate_is_served_if_it_is_to_be_always_on(folder):
    app, _ = server_of(options(folder, "--prompts", "a=@no-gate", "--always", "a"))
    gated = make_gated("other")
    with running_app(app) as (url, _):
        said = client(url).completions.create(model="tiny", prompt="good", temperature=0, max_tokens=6)
    assert said.choices[0].text == alone(gated, gated.tokenizer("good")["input_ids"], "other", 6)[0]


@pytest.mark.parametrize("always", [(), ("--always", "no")])
def test_a_refusal_is_served_as_a_prompt_is_by_the_folder_that_it_was_saved_to(folder, always):
    app, _ = server_of(options(folder, "--prompts", "no=@no", "--device", "cpu", *always))
    gated = make_gated()
    base = alone(gated, gated.tokenizer("the plot")["input_ids"], "__base__", 6)[0]
    with running_app(app) as (url, _):
        ask = client(url).completions.create
        said = [ask(model="tiny", prompt=text, temperature=0, max_tokens=6) for text in ("a film", "the plot")]
    refusal = " unknown film good"
    assert [one.choices[0].text for one in said] == [refusal, refusal if always else base]


def test_a_prompt_of_a_quantized_base_is_served_over_one(folder, tmp_path):
    pytest.importorskip("bitsandbytes")
    build("llama").save_pretrained(tmp_path / "tiny")  # bitsandbytes takes no float64
    make_tokenizer().save_pretrained(tmp_path / "tiny")
    base = load_causal_lm(tmp_path / "tiny", bits=4)
    unlearner = SoftPromptUnlearner(base, CONFIGS["prompt_tuning"]())
    unlearner.save_pretrained(str(tmp_path / "prompt"))
    given = ["--model", tmp_path / "tiny", "--prompts", f"a={tmp_path / 'prompt'}", "--always", "a", "--device", "cpu"]
    with pytest.raises(ValueError, match="neither forget nor retain on this base"):
        server_of(options(folder, *given))
    app, _ = server_of(options(folder, *given, "--bits", 4))
    tokenizer = make_tokenizer()
    ids = torch.tensor([tokenizer("good")["input_ids"]])
    out = unlearner.eval().generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    with running_app(app) as (url, _):
        said = client(url).completions.create(model="tiny", prompt="good", temperature=0, max_tokens=6)
    assert said.choices[0].text == tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def test_vllm_is_chosen_by_an_option(folder):
    app, _ = server_of(options(folder, "--prompts", "@prompts", "--engine", "vllm"))
    with running_app(app) as (url, _):
        assert [one.id for one in client(url).models.list()] == ["tiny"]


def test_what_is_served_is_said_before_the_server_starts(folder, tmp_path, monkeypatch, capsys):
    said = []
    monkeypatch.setattr(uvicorn, "run", lambda app, **given: said.extend(capsys.readouterr().out.splitlines()))
    monkeypatch.setattr(serve, "_check_listens", lambda host, port: None)
    ledger = Ledger(tmp_path / "ledger.jsonl")
    events = {"17": ["received"], "19": ["received"], "18": ["trained", "served", "stopped"]}
    for event, name in ((event, name) for name, some in events.items() for event in some):
        ledger.append(LedgerEvent(event, name))
    named = ("--prompts", "17=@prompts/other", "19=@no", "18=@no-gate", "--always", "18")
    COMMANDS[""].run(options(folder, *named, "--ledger", ledger.path, "--device", "cpu"))
    COMMANDS[""].run(options(folder, "--prompts", "@prompts", "--device", "cpu"))
    progress = [line for line in said if line.startswith(("checking ", "loading ", "the base "))]
    what = "2 prompts and 1 refusal"
    assert progress[:2] == [
        *("checking options and prompts", f"loading the base {folder}/tiny on cpu, for {what}: 17, 19, 18"),
    ]
    assert re.fullmatch(rf"the base is loaded, after \d+ s; loading {what}, and what turns them on", progress[2])
    assert progress[4] == f"loading the base {folder}/tiny on cpu, for 2 prompts: default, other"
    assert (len(progress), said[:3], said[6:9]) == (6, progress[:3], progress[3:])  # each before what is served
    assert [line for line in said if line not in progress] == [
        f"17: {folder}/prompts/other, prompt_tuning of 6 virtual tokens; gate: names; ledger: never served",
        f"19: {folder}/no, fixed refusal; gate: names; ledger: never served",
        f"18: {folder}/no-gate, prompt_tuning of 6 virtual tokens; always on; ledger: no longer served",
        f"default: {folder}/prompts, prompt_tuning of 5 virtual tokens; gate: names; no ledger",
        f"other: {folder}/prompts/other, prompt_tuning of 6 virtual tokens; gate: names; no ledger",
    ]


def test_which_base_is_loaded_is_said_before_it_is(folder, tmp_path, capsys):
    given = options(folder, "--model", tmp_path / "no-base", "--prompts", "17=@prompts/other", "--device", "cpu")
    with pytest.raises(OSError, match="no-base"):
        server_of(given)
    assert capsys.readouterr().out == f"loading the base {tmp_path}/no-base on cpu, for 1 prompt: 17\n"


def test_it_binds_to_this_machine_unless_told_and_warns_otherwise(folder, monkeypatch, caplog):
    calls = []
    monkeypatch.setattr(uvicorn, "run", lambda app, **given: calls.append(given))
    monkeypatch.setattr(serve, "_check_listens", lambda host, port: None)
    COMMANDS[""].run(options(folder, "--prompts", "@prompts"))
    assert (calls[0]["host"], calls[0]["port"], caplog.text) == ("127.0.0.1", 8080, "")
    COMMANDS[""].run(options(folder, "--prompts", "@prompts", "--host", "0.0.0.0"))
    assert "asks for no key" in caplog.text
