"""`spul serve --ledger`: what is noted in the ledger, and what its entries keep from being served."""

from __future__ import annotations

import json
import shutil

import openai
import pytest
from serve_folder import EVENTS, options, write_served
from servers import HTTP, alone, client, make_gated, running_app

from spul.commands.main import main as spul_main
from spul.commands.serve import build as server_of
from spul.records import Ledger, LedgerEvent
from spul.records.spul_config import read_spul_config
from spul.records.weights import file_digest


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_served(tmp_path_factory.mktemp("serve"))


def test_the_ledger_has_what_is_served_answered_and_revoked(folder, tmp_path, capsys):
    EVENTS.clear()
    ledger = Ledger(tmp_path / "ledger.jsonl")
    path = ledger.path
    for name in ("2026-017", "2026-018"):
        ledger.append(LedgerEvent("received", name))
    given = options(folder, "--prompts", "2026-017=@prompts/other", "--ledger", path, "--prompts_dir", "@prompts",
                    "--record", "serve_folder:record", "--admin_token_file", "@token")  # fmt: skip
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
    with pytest.raises(ValueError, match=r"no request 'default', .*--prompts REQUEST=.*prompts, and one for each"):
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


def test_a_refusal_is_noted_revoked_and_put_back_as_a_prompt_is_and_no_entry_has_a_digest_of_its_texts(
    folder, tmp_path, caplog
):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.append(LedgerEvent("received", "1"))
    given = ("--prompts", "1=@no", "--ledger", ledger.path, "--device", "cpu")
    app, _ = server_of(options(folder, *given, "--admin_token_file", "@token", "--prompts_dir", folder))
    admin = {"Authorization": "Bearer a-token-of-the-administrator"}
    with running_app(app) as (url, _):

        def ask():
            said = client(url).completions.create(model="tiny", prompt="a film", max_tokens=6, temperature=0)
            return said.choices[0].text

        assert ask() == " unknown film good"
        ledger.append(LedgerEvent("revoked", "1"))
        assert ask() != " unknown film good"
        assert "No longer served: '1'" in caplog.text
        added = HTTP.post(f"{url}/admin/prompts", headers=admin, json={"name": "1", "folder": "no"})
        assert (added.status_code, "was revoked on" in added.json()["error"]["message"]) == (400, True)
        ledger.append(LedgerEvent.of_adapter("trained", "1", folder / "prompts" / "other"))  # a request again
        assert ask() == " unknown film good"
    assert "was trained anew" not in caplog.text
    entries = [entry for entry in ledger.entries() if entry.event in ("served", "answered") and entry.request]
    assert [(entry.event, entry.fields["adapter"], entry.fields["gate"]) for entry in entries] == [
        (event, "no", "names") for event in ("served", "answered", "served", "answered")
    ]
    assert not any("prompt_sha256" in entry.fields for entry in entries)
    text = ledger.path.read_text()
    digests = [file_digest(folder / "no" / name) for name in ("spul_rival.json", "gate/gate.json")]
    assert not any(one in text for one in ("unknown", "film", *digests))
    server_of(options(folder, *given))  # no weights, so none from before
    ledger.append(LedgerEvent("revoked", "1"))
    with pytest.raises(ValueError, match=r"'1' was revoked on .* its prompt is not served"):
        server_of(options(folder, *given))
