"""Prompts loaded behind their gates: what has no gate or does not fit the base is refused."""

from __future__ import annotations

import shutil

import pytest
import torch
from helpers import build, make_tokenizer
from servers import make_gated, two_prompts

from spul.gates import NameGate, attach_gate
from spul.records.digests import fingerprint
from spul.serving import loading
from spul.serving.errors import ApiError
from spul.serving.loading import always, load_gated, load_prompts
from spul.serving.served import ServedPrompts


@pytest.fixture
def folder(tmp_path):
    return two_prompts(tmp_path)


def base():
    return build("llama", torch.float64)


def test_named_prompts_and_a_saved_folder_are_loaded_behind_their_gates(folder):
    texts = ["about jane", "the plot", "good"]
    named = load_prompts(base(), make_tokenizer(), {"jane-doe": folder / "jane", "new": folder / "new"})
    assert named.route(texts) == ["jane-doe", "new", "__base__"]
    assert load_gated(base(), make_tokenizer(), folder).route(texts) == ["default", "new", "__base__"]
    found = load_prompts(base(), make_tokenizer(), {"a": folder / "jane", "b": folder / "new"}, always_on=["b"])
    assert found.route(texts) == ["a", "b", "b"]
    kinds = {name: one["gate"] for name, one in ServedPrompts(found).served.items()}
    assert kinds == {"a": "names", "b": "always"}


def test_without_prompt_or_gate_nothing_is_served(folder):
    with pytest.raises(ValueError, match="no prompt to serve"):
        load_prompts(base(), make_tokenizer(), {})
    shutil.rmtree(folder / "jane" / "gate")
    with pytest.raises(FileNotFoundError, match=r"no gate/gate.json.*always on"):
        load_prompts(base(), make_tokenizer(), {"a": folder / "jane"})
    with pytest.raises(ValueError, match="are no prompts"):
        load_prompts(base(), make_tokenizer(), {"a": folder / "jane"}, always_on=["b"])
    gated = make_gated()
    gated.delete_adapter("default")
    with pytest.raises(ValueError, match="no prompt to serve"):
        ServedPrompts(gated)


def test_a_gate_that_was_not_saved_with_its_prompt_is_refused(folder):
    NameGate(["nobody"]).save(folder / "jane" / "gate")  # nothing says which gate the prompt had
    assert load_prompts(base(), make_tokenizer(), {"a": folder / "jane"}).route(["jane"]) == ["__base__"]
    NameGate(["nobody"]).save(folder / "gate")
    with pytest.raises(ValueError, match="'default' are not those that were saved together"):
        load_prompts(base(), make_tokenizer(), {"a": folder})
    found = load_prompts(base(), make_tokenizer(), {"a": folder}, always_on=["a"])  # no gate is asked
    assert found.route(["any"]) == ["a"]
    attach_gate(NameGate(["film"]), folder)
    assert load_prompts(base(), make_tokenizer(), {"a": folder}).route(["film"]) == ["a"]


def test_a_gate_of_one_prompt_of_several_is_refused_that_was_not_saved_with_it(folder, tmp_path):
    NameGate(["nobody"]).save(folder / "new" / "gate")
    (tmp_path / "link").symlink_to(folder / "new")
    for one in (folder / "new", tmp_path / "link"):
        with pytest.raises(ValueError, match=r"'new' are not those that were saved together.*--adapter-name new\)"):
            load_prompts(base(), make_tokenizer(), {"a": one})
    assert load_prompts(base(), make_tokenizer(), {"a": folder / "new"}, always_on=["a"]).route(["any"]) == ["a"]
    served = ServedPrompts(load_prompts(base(), make_tokenizer(), {"b": folder / "jane"}), folder)
    with pytest.raises(ApiError, match="'new' are not those that were saved together"):
        served.add("a", "new")
    attach_gate(NameGate(["film"]), folder, "new")  # as the message says
    assert load_prompts(base(), make_tokenizer(), {"a": folder / "new"}).route(["film"]) == ["a"]
    attach_gate(NameGate(["good"]), folder / "new")  # to the one folder: what it says itself counts
    assert served.add("a", "new")["gate"] == "names"
    assert served.gated.route(["good", "film"]) == ["a", "__base__"]


def test_a_prompt_of_another_base_is_refused_unless_allowed(folder):
    other = base()
    with torch.no_grad():
        other.lm_head.weight += 1
    with pytest.raises(ValueError, match="neither forget nor retain"):
        load_prompts(other, make_tokenizer(), {"a": folder / "jane"})
    with pytest.raises(ValueError, match="neither forget nor retain"), pytest.warns(UserWarning, match="trained on"):
        load_gated(other, make_tokenizer(), folder)
    with pytest.warns(UserWarning, match="trained on other weights"):
        found = load_prompts(other, make_tokenizer(), {"a": folder / "jane"}, allow_other_base=True)
    assert found.route(["jane"]) == ["a"]
    (folder / "jane" / "spul_config.json").unlink()
    with pytest.raises(ValueError, match="does not say"):
        load_prompts(base(), make_tokenizer(), {"a": folder / "jane"})


def test_the_base_is_digested_once_for_all_prompts(folder, monkeypatch):
    calls = []
    monkeypatch.setattr(loading, "fingerprint", lambda model: calls.append(model) or fingerprint(model))
    load_prompts(base(), make_tokenizer(), {"a": folder / "jane", "b": folder / "new"})
    load_gated(base(), make_tokenizer(), folder)
    assert len(calls) == 2


def test_the_gate_that_is_always_on_flags_every_text():
    assert always(["a", ""]) == [True, True]
