"""Prompts loaded behind their gates: what has no gate or does not fit the base is refused."""

from __future__ import annotations

import shutil

import pytest
import torch
from helpers import build, make_tokenizer
from servers import make_gated, refusal_of, two_prompts
from small_rivals import rival

from spul.gates import NameGate, attach_gate
from spul.records.digests import fingerprint
from spul.serving import loading
from spul.serving.errors import ApiError
from spul.serving.loading import always, check_folders, load_gated, load_prompts, load_refusal
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


# ---- fixed refusals ----


@pytest.fixture
def refusing(folder):
    """The folder of a refusal of "film" beside the prompts."""
    refusal_of(make_gated(), "film").save_pretrained(folder / "no")
    return folder / "no"


def test_a_refusal_is_loaded_behind_its_gate_or_is_always_on_whatever_gate_it_has(refusing):
    found = load_refusal(base(), make_tokenizer(), refusing)
    assert (found.refusal, found.name) == (" unknown film good", "no")
    assert found.gate.flags(["a film", "good"]).tolist() == [True, False]
    shutil.rmtree(refusing / "gate")
    found = load_refusal(base(), make_tokenizer(), refusing, is_always=True)
    assert (found.name, found.gate.flags(["good"]).tolist()) == ("no", [True])


def test_a_refusal_without_its_gate_or_with_another_is_refused_before_the_base_is_loaded(refusing):
    NameGate(["nobody"]).save(refusing / "gate")
    for load in (lambda: check_folders({"a": refusing}), lambda: load_refusal(base(), make_tokenizer(), refusing)):
        with pytest.raises(ValueError, match=r"not the one that was saved with spul_rival.json; save both again"):
            load()
    shutil.rmtree(refusing / "gate")
    with pytest.raises(FileNotFoundError, match=r"has no gate/gate.json, the gate of its fixed refusal"):
        check_folders({"a": refusing})
    check_folders({"a": refusing}, ["a"])


def test_another_method_than_a_refusal_and_a_prompt_beside_one_are_refused(folder, refusing, tmp_path):
    rival("guardrail").save_pretrained(tmp_path / "instruction")
    with pytest.raises(ValueError, match=r"the method 'guardrail prompt', which is not served; expected .* refusal"):
        check_folders({"a": tmp_path / "instruction"})
    shutil.copy(folder / "adapter_config.json", refusing)
    with pytest.raises(ValueError, match=r"holds a prompt .* and the method 'fixed refusal' .*Save each"):
        check_folders({"a": refusing})


def test_load_prompts_takes_no_refusal_and_says_what_does(folder, refusing):
    with pytest.raises(ValueError, match=r"\['b'\] are fixed refusals; expected prompts. ServedPrompts.from_folders"):
        load_prompts(base(), make_tokenizer(), {"a": folder / "jane", "b": refusing})
