"""`spul serve`: options to a server, and what refuses to start."""

from __future__ import annotations

import json
import re
import shutil

import openai
import pytest
import torch
import uvicorn
from helpers import CHAT_TEMPLATE, CONFIGS, build, make_tokenizer
from servers import HTTP, alone, client, make_gated, running_app
from transformers import HfArgumentParser

from spul import SoftPromptUnlearner
from spul.commands.main import main as spul_main
from spul.commands.serve import COMMANDS
from spul.commands.serve import build as server_of
from spul.models.loading import load_causal_lm
from spul.records import Ledger, LedgerEvent
from spul.records.spul_config import read_spul_config

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
    (found / "token").write_text("\ufeffa-token-of-the-administrator\n", encoding="utf-8")
    (found / "empty").write_text("")
    (found / "utf-16").write_text("a-token-of-the-administrator", encoding="utf-16")
    (found / "two-lines").write_text("a-token\nof-the-administrator")
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
    assert [one["request"] for one in EVENTS if one["event"] == "answered"] == [name]


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ([], ValueError, r"no prompt to serve.*--prompts NAME=FOLDER"),
        (["--prompts", "a=@nothing"], FileNotFoundError, "is no folder"),
        (["--prompts", "a=@no-gate"], FileNotFoundError, "has no gate"),
        (["--prompts", "@no-gate"], FileNotFoundError, "spul_gates.json"),
        (["--prompts", "@prompts", "a=@no-gate"], ValueError, "expected NAME=FOLDER"),
        (["--prompts", "a=@no-gate", "a=@no-gate"], ValueError, "each name once"),
        (["--prompts", "a/b=@no-gate", "--always", "a/b"], ValueError, "no prompt can be served by this name: 'a/b'"),
        (["--prompts", "@prompts", "--always", "other"], ValueError, "always goes with"),
        (["--prompts", "@prompts", "--engine", "other"], ValueError, "transformers"),
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
        (["--prompts", "@prompts", "--port", "65536"], ValueError, "port=65536; expected 0 to"),
        (["--prompts", "@prompts", "--port", "-1"], ValueError, "port=-1; expected 0 to"),
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
        (["--prompts", "@prompts", "--vllm_key_file", "@two-lines"], ValueError, "two-lines has white space in it"),
    ],
)
def test_what_is_unclear_does_not_start_and_loads_no_base(folder, arguments, error, says, tmp_path):
    with pytest.raises(error, match=says):
        server_of(options(folder, "--model", tmp_path / "no-base", *arguments))


def test_prompts_that_lie_in_the_folder_of_one_that_is_served_are_warned_of(folder, caplog):
    server_of(options(folder, "--prompts", "a=@prompts"))
    assert "prompts also holds the prompts ['other'], which are not served" in caplog.text
    caplog.clear()
    server_of(options(folder, "--prompts", "a=@prompts", "b=@prompts/other"))
    assert not caplog.text


def test_the_ledger_has_what_is_served_answered_and_revoked(folder, tmp_path, capsys):
    EVENTS.clear()
    ledger = Ledger(tmp_path / "ledger.jsonl")
    path = ledger.path
    for name in ("2026-017", "2026-018"):
        ledger.append(LedgerEvent("received", name))
    given = options(folder, "--prompts", "2026-017=@prompts/other", "--ledger", path, "--record", f"{__name__}:record",
                    "--admin_token_file", "@token", "--prompts_dir", "@prompts")  # fmt: skip
    app, _ = server_of(given)
    admin = {"Authorization": "Bearer a-token-of-the-administrator"}
    with running_app(app) as (url, _):
        ask = client(url).completions
        said = [ask.create(model="tiny", prompt=text, max_tokens=3, temperature=0) for text in ("of doe", "the plot")]
        added = {"name": "2026-018", "folder": "other", "always": True}
        assert HTTP.post(f"{url}/admin/prompts", headers=admin, json=added).status_code == 201
        said += list(ask.create(model="tiny", prompt="the plot", max_tokens=3, temperature=0, stream=True))[-1:]
        assert HTTP.delete(f"{url}/admin/prompts/2026-017", headers=admin).status_code == 200
    entries = ledger.entries()[2:]
    assert [(entry.event, entry.request, entry.fields.get("answer")) for entry in entries] == [
        ("served", "2026-017", None),
        ("answered", "2026-017", said[0].id),
        ("answered", None, said[1].id),
        ("served", "2026-018", None),
        ("answered", "2026-018", said[2].id),
        ("revoked", "2026-017", None),
        ("stopped", "2026-018", None),
    ]
    assert [one["event"] for one in EVENTS] == [entry.event for entry in entries]  # other recorders, too
    first, bare = (entry.fields for entry in entries[1:3])
    record = read_spul_config(folder / "prompts" / "other")
    assert (first["prompt_sha256"], first["base_fingerprint"], first["gate"], first["finish"]) == (
        *(record.weights_sha256, record.base_fingerprint, "names", "length"),
    )
    assert (first["prompt_tokens"], first["completion_tokens"]) == (said[0].usage.prompt_tokens, 3)
    assert first["adapter"] == "other"  # the folder, as `trained` names it
    assert not {"adapter", "prompt_sha256", "gate"} & set(bare)
    text = path.read_text()
    assert not any(word in text for word in ("doe", "plot", said[0].choices[0].text.strip()))
    states = ledger.states()
    assert (states["2026-017"].answered, states["2026-018"].answered) == (1, 1)
    assert states["2026-017"].revoked == states["2026-017"].served[0][1] is not None
    assert spul_main(["ledger", "verify", "--ledger", str(path), "--head", ledger.head()]) == 0
    out = capsys.readouterr().out
    assert "9 entries, the chain is whole" in out
    assert "2 received, 2 served, 3 answered (1 without a prompt), 1 revoked, 1 stopped" in out


def test_what_the_ledger_says_was_revoked_is_neither_started_with_nor_added(folder, tmp_path):
    path = tmp_path / "ledger.jsonl"
    record = read_spul_config(folder / "prompts" / "other")
    ledger = Ledger(path)
    ledger.append(LedgerEvent.of_adapter("trained", "2026-017", folder / "prompts" / "other"))
    ledger.append(LedgerEvent("revoked", "2026-017"))
    without_base = ["--model", tmp_path / "no-base"]
    for name in ("2026-017", "renamed"):
        with pytest.raises(ValueError, match=rf"'2026-017' was revoked on .*{path}.*--event received"):
            server_of(options(folder, *without_base, "--prompts", f"{name}=@prompts/other", "--ledger", path))
    several = ("--prompts", "@prompts", "--ledger", path)
    with pytest.raises(ValueError, match="knows no request 'default'"):
        server_of(options(folder, *without_base, *several))
    for name in ("default", "other"):
        ledger.append(LedgerEvent("received", name))
    with pytest.raises(ValueError, match=r"'2026-017' was revoked on .* and 'other' has the same weights"):
        server_of(options(folder, *several))
    ledger.append(LedgerEvent("received", "2026-017"))
    app, _ = server_of(options(folder, "--prompts", "2026-017=@prompts/other", "--ledger", path, "--admin_token_file",
                               "@token", "--prompts_dir", "@prompts"))  # fmt: skip
    admin = {"Authorization": "Bearer a-token-of-the-administrator"}
    with running_app(app) as (url, _):
        assert HTTP.delete(f"{url}/admin/prompts/2026-017", headers=admin).status_code == 200
        again = {"name": "2026-017", "folder": "other"}
        for body in (again, again | {"name": "renamed"}):
            said = HTTP.post(f"{url}/admin/prompts", headers=admin, json=body)
            assert said.status_code == 400
            assert "'2026-017' was revoked on " in said.json()["error"]["message"]
        assert HTTP.get(f"{url}/health").json()["prompts"] == 0
        for body in ({"folder": "other"}, again | {"folder": 3}, again | {"folder": "nothing"}):
            assert HTTP.post(f"{url}/admin/prompts", headers=admin, json=body).status_code == 400
        ledger.append(LedgerEvent("received", "2026-017"))
        assert HTTP.post(f"{url}/admin/prompts", headers=admin, json=again).status_code == 201
    assert ledger.states()["2026-017"].prompt_sha256 == record.weights_sha256
    assert not ledger.states()["2026-017"].served_again


@pytest.mark.parametrize("name", ["default", "other"])
def test_earlier_weights_in_a_folder_of_several_prompts_are_not_started_with(folder, tmp_path, name):
    ledger, prompts = Ledger(tmp_path / "ledger.jsonl"), tmp_path / "prompts"
    shutil.copytree(folder / "prompts", prompts)
    own = prompts if name == "default" else prompts / name
    for one, where in (("default", prompts), ("other", prompts / "other")):
        ledger.append(LedgerEvent.of_adapter("trained", one, where))
    ledger.append(LedgerEvent("revoked", name))
    ledger.append(LedgerEvent("trained", name, prompt_sha256="34" * 32))
    given = options(folder, "--model", tmp_path / "no-base", "--prompts", prompts, "--ledger", ledger.path)
    sha = read_spul_config(own).weights_sha256
    with pytest.raises(ValueError, match=rf"'{name}' was revoked on .* trained anew .*; this prompt has {sha}"):
        server_of(given)
    record = own / "spul_config.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"weights_sha256": None}))
    with pytest.raises(ValueError, match=rf"'{name}' was revoked on .* its record lacks their SHA-256"):
        server_of(given)
    ledger.append(LedgerEvent("trained", name, prompt_sha256=sha))
    shutil.copy((folder / "prompts") / record.relative_to(prompts), record)
    with pytest.raises(OSError, match="no-base"):  # all that the ledger asks is given
        server_of(given)


def test_earlier_weights_whose_record_lacks_their_sha_256_are_not_added(folder, tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    shutil.copytree(folder / "prompts" / "other", tmp_path / "prompts" / "old")
    record = tmp_path / "prompts" / "old" / "spul_config.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"weights_sha256": None}))
    for name in ("1", "2"):
        ledger.append(LedgerEvent("trained", name, prompt_sha256="12" * 32))
    ledger.append(LedgerEvent("revoked", "2"))
    ledger.append(LedgerEvent("trained", "2", prompt_sha256="34" * 32))
    app, _ = server_of(options(folder, "--prompts", "1=@prompts/other", "--ledger", ledger.path,
                               "--admin_token_file", "@token", "--prompts_dir", tmp_path / "prompts"))  # fmt: skip
    admin = {"Authorization": "Bearer a-token-of-the-administrator"}
    with running_app(app) as (url, _):
        said = HTTP.post(f"{url}/admin/prompts", headers=admin, json={"name": "2", "folder": "old"})
        assert said.status_code == 400
        assert "its record lacks their SHA-256" in said.json()["error"]["message"]
        assert HTTP.get(f"{url}/health").json()["prompts"] == 1


def test_what_the_ledger_does_not_take_is_not_answered(folder, tmp_path):
    path = tmp_path / "ledger.jsonl"
    Ledger(path).append(LedgerEvent("received", "1"))
    app, _ = server_of(options(folder, "--prompts", "1=@prompts/other", "--ledger", path))
    with running_app(app) as (url, _):
        ask = client(url).completions
        assert ask.create(model="tiny", prompt="of doe", max_tokens=3).id
        whole = path.read_bytes()
        path.write_bytes(whole + b"not an entry\n")
        with pytest.raises(openai.InternalServerError) as caught:
            ask.create(model="tiny", prompt="of doe", max_tokens=3)
        assert "the record of revoked prompts could not be read" in str(caught.value)
        said = HTTP.get(f"{url}/health")
        assert (said.status_code, said.json()["status"]) == (503, "ledger unreadable")
        path.write_bytes(whole)
        assert HTTP.get(f"{url}/health").status_code == 200
        assert ask.create(model="tiny", prompt="of doe", max_tokens=3).id
    assert Ledger(path).verify() == []
    assert Ledger(path).states()["1"].answered == 2


def test_a_ledger_that_is_gone_is_not_begun_anew_when_the_server_stops(folder, tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.append(LedgerEvent("received", "1"))
    app, _ = server_of(options(folder, "--prompts", "1=@prompts/other", "--ledger", ledger.path))
    with running_app(app) as (url, _):
        ledger.path.rename(tmp_path / "away.jsonl")
        with pytest.raises(openai.InternalServerError, match="the record of revoked prompts could not be read"):
            client(url).completions.create(model="tiny", prompt="of doe", max_tokens=3)
    assert not ledger.path.exists()


def test_a_prompt_is_served_only_by_the_name_of_a_request_that_the_ledger_knows(folder, tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    given = ("--ledger", ledger.path, "--admin_token_file", "@token", "--prompts_dir", "@prompts")
    ledger.append(LedgerEvent("received", "2026-017"))
    with pytest.raises(ValueError, match="knows no request '2026-071'; did you mean '2026-017'"):
        server_of(options(folder, "--model", tmp_path / "no-base", "--prompts", "2026-071=@prompts/other", *given))
    app, _ = server_of(options(folder, "--prompts", "2026-017=@prompts/other", *given))
    admin = {"Authorization": "Bearer a-token-of-the-administrator"}
    with running_app(app) as (url, _):
        said = HTTP.post(f"{url}/admin/prompts", headers=admin, json={"name": "2026-071", "folder": "other"})
        assert (said.status_code, HTTP.get(f"{url}/health").json()["prompts"]) == (400, 1)
    assert "knows no request '2026-071'" in said.json()["error"]["message"]
    assert [entry.event for entry in ledger.entries()] == ["received", "served", "stopped"]


def test_what_another_program_revokes_in_the_ledger_is_served_no_longer(folder, tmp_path, caplog):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    for name in ("1", "2"):
        ledger.append(LedgerEvent("received", name))
    app, _ = server_of(options(folder, "--prompts", "1=@prompts/other", "--ledger", ledger.path,
                               "--admin_token_file", "@token", "--prompts_dir", "@prompts"))  # fmt: skip
    gated, admin = make_gated("other"), {"Authorization": "Bearer a-token-of-the-administrator"}
    ids = gated.tokenizer("of doe")["input_ids"]
    under, bare = (alone(gated, ids, name, 6)[0] for name in ("other", "__base__"))
    assert under != bare
    with running_app(app) as (url, _):

        def ask():
            said = client(url).completions.create(model="tiny", prompt="of doe", max_tokens=6, temperature=0)
            return said.choices[0].text

        assert ask() == under
        ledger.append(LedgerEvent("revoked", "2"))  # of another: nothing changes
        assert ask() == under
        assert not caplog.text
        ledger.append(LedgerEvent("revoked", "1"))
        assert ask() == bare
        assert "No longer served: '1', since the request '1' was revoked on 2" in caplog.text
        assert HTTP.get(f"{url}/health").json()["prompts"] == 0
        ledger.append(LedgerEvent("received", "1"))
        again = {"name": "1", "folder": "other"}
        assert HTTP.post(f"{url}/admin/prompts", headers=admin, json=again).status_code == 201
        assert ask() == under
        ledger.append(LedgerEvent("revoked", "1"))
        listed = HTTP.get(f"{url}/admin/prompts", headers=admin).json()
        assert ([one["name"] for one in listed["served"]], len(listed["revoked"])) == ([], 2)
    assert [entry.event for entry in ledger.entries() if entry.request == "1"] == [
        *("received", "served", "answered", "answered", "revoked", "stopped"),
        *("received", "served", "answered", "revoked", "stopped"),
    ]
    state = ledger.states()["1"]
    assert (state.served_again, state.answered_after) == (False, 0)


def test_a_prompt_without_a_gate_is_served_if_it_is_to_be_always_on(folder):
    app, _ = server_of(options(folder, "--prompts", "a=@no-gate", "--always", "a"))
    gated = make_gated("other")
    with running_app(app) as (url, _):
        said = client(url).completions.create(model="tiny", prompt="good", temperature=0, max_tokens=6)
    assert said.choices[0].text == alone(gated, gated.tokenizer("good")["input_ids"], "other", 6)[0]


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
    ledger = Ledger(tmp_path / "ledger.jsonl")
    for event, name in (("received", "17"), ("trained", "18"), ("served", "18"), ("stopped", "18")):
        ledger.append(LedgerEvent(event, name))
    named = ("--prompts", "17=@prompts/other", "18=@no-gate", "--always", "18")
    COMMANDS[""].run(options(folder, *named, "--ledger", ledger.path, "--device", "cpu"))
    COMMANDS[""].run(options(folder, "--prompts", "@prompts", "--device", "cpu"))
    progress = [line for line in said if line.startswith(("checking ", "loading ", "the base "))]
    assert progress[:2] == [
        *("checking options and prompts", f"loading the base {folder}/tiny on cpu, for 2 prompts: 17, 18"),
    ]
    assert re.fullmatch(r"the base is loaded, after \d+ s; loading 2 prompts and what turns them on", progress[2])
    assert progress[4] == f"loading the base {folder}/tiny on cpu, for 2 prompts: default, other"
    assert (len(progress), said[:3], said[5:8]) == (6, progress[:3], progress[3:])  # each before what is served
    assert [line for line in said if line not in progress] == [
        f"17: {folder}/prompts/other, prompt_tuning of 6 virtual tokens, gate names, in the ledger never served",
        f"18: {folder}/no-gate, prompt_tuning of 6 virtual tokens, always on, in the ledger no longer served",
        f"default: {folder}/prompts, prompt_tuning of 5 virtual tokens, gate names, no ledger",
        f"other: {folder}/prompts/other, prompt_tuning of 6 virtual tokens, gate names, no ledger",
    ]


def test_which_base_is_loaded_is_said_before_it_is(folder, tmp_path, capsys):
    given = options(folder, "--model", tmp_path / "no-base", "--prompts", "17=@prompts/other", "--device", "cpu")
    with pytest.raises(OSError, match="no-base"):
        server_of(given)
    assert capsys.readouterr().out == f"loading the base {tmp_path}/no-base on cpu, for 1 prompt: 17\n"


@pytest.mark.parametrize(
    ("more", "name"), [(("--port", 8123), "/127.0.0.1:8123"), (("--server_name", "gpu-1"), "gpu-1")]
)
def test_a_server_has_a_name_in_the_ledger_which_is_the_same_after_a_restart(folder, tmp_path, more, name):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.append(LedgerEvent("received", "1"))
    for _ in range(2):
        app, _ = server_of(options(folder, "--prompts", "1=@prompts/other", "--ledger", ledger.path, *more))
        with running_app(app):
            assert ledger.states()["1"].now.endswith(name)
    found = {entry.fields.get("server") for entry in ledger.entries()[1:]}
    assert len(found) == 1
    assert ledger.states()["1"].now == "no longer served"


def test_it_binds_to_this_machine_unless_told_and_warns_otherwise(folder, monkeypatch, caplog):
    calls = []
    monkeypatch.setattr(uvicorn, "run", lambda app, **given: calls.append(given))
    COMMANDS[""].run(options(folder, "--prompts", "@prompts"))
    assert (calls[0]["host"], calls[0]["port"], caplog.text) == ("127.0.0.1", 8080, "")
    COMMANDS[""].run(options(folder, "--prompts", "@prompts", "--host", "0.0.0.0"))
    assert "asks for no key" in caplog.text
