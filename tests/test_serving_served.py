"""Prompts that are served, added, revoked, withheld and restored: what is damaged or lies elsewhere is refused."""

from __future__ import annotations

import shutil

import pytest
import torch
from helpers import build, make_tokenizer, state_of
from safetensors.torch import load_file, save_file
from servers import make_gated, refusal_of, two_prompts

from spul.gates import GatedUnlearner
from spul.records.spul_config import read_spul_config
from spul.serving.errors import ApiError
from spul.serving.loading import load_prompts
from spul.serving.served import ServedPrompts


@pytest.fixture
def folder(tmp_path):
    return two_prompts(tmp_path)


def base():
    return build("llama", torch.float64)


def test_no_prompt_stands_behind_one_that_is_always_on(folder):
    folders = {"a": folder / "jane", "b": folder / "new"}
    with pytest.raises(ValueError, match=r"'a' is always on, so that \['b'\].*name it last"):
        load_prompts(base(), make_tokenizer(), folders, always_on=["a"])
    served = ServedPrompts(load_prompts(base(), make_tokenizer(), folders, always_on=["b"]), folder)
    with pytest.raises(ApiError, match="a prompt is always on, so that one behind it would never be") as caught:
        served.add("c", "new")
    assert (caught.value.status, list(served.served)) == (409, ["a", "b"])
    served.revoke("b")
    served.add("c", "new")
    assert served.route([served.gated.tokenizer("the plot")["input_ids"]]) == ["c"]


@pytest.mark.parametrize("name", ["", "a/b", "..", "a.b", "__base__", "x" * 65, None, "a b", ["a"]])
def test_names_are_plain(folder, name):
    served = ServedPrompts(make_gated(), folder)
    with pytest.raises(ApiError, match="not added"):
        served.add(name, "new")


def test_a_prompt_is_added_and_revoked(folder):
    served = ServedPrompts(make_gated(), folder)
    added = served.add("new", "new")
    tokens = served.gated.tokenizer(["jane", "the plot", "good"])["input_ids"]
    assert served.route(tokens) == ["default", "new", "__base__"]
    assert added["prompt_sha256"] == read_spul_config(folder / "new").weights_sha256
    assert (served.longest, added["base_fingerprint"]) == (6, served.base_fingerprint)
    [gone] = served.revoke("new")
    assert served.route(tokens) == ["default", "__base__", "__base__"]
    assert gone["until"] >= gone["since"] == added["since"]
    assert (list(served.served), served.longest) == (["default"], 5)
    served.add("again", "new", True)
    assert served.route(tokens) == ["default", "again", "again"]


def test_a_combined_prompt_goes_with_its_parts():
    plain = make_gated("other", "both")
    gates = {name: plain.gates[name] for name in ("default", "other")}
    served = ServedPrompts(
        GatedUnlearner(plain.unlearner, plain.tokenizer, gates, combined={("default", "other"): "both"})
    )
    assert served.served["both"]["gate"] == "combined"
    assert {one["name"] for one in served.revoke("other")} == {"other", "both"}


def test_a_prompt_is_withheld_and_restored_where_it_stood_with_what_it_is_a_part_of():
    plain = make_gated("other", "both")
    gates = {name: plain.gates[name] for name in ("default", "other")}
    served = ServedPrompts(
        GatedUnlearner(plain.unlearner, plain.tokenizer, gates, combined={("default", "other"): "both"})
    )
    ids = plain.tokenizer(["jane", "doe", "jane doe", "good"])["input_ids"]
    assert served.route(ids) == ["default", "other", "both", "__base__"]
    gone = served.withhold("other")
    assert ([one["name"] for one in gone], list(served.withheld)) == (["other", "both"], ["other"])
    assert all(one["until"] >= one["since"] for one in gone)
    assert served.route(ids) == ["default", "__base__", "default", "__base__"]
    with pytest.raises(ApiError, match="no prompt of this name"):
        served.withhold("other")
    assert [one["name"] for one in served.restore("other")] == ["other", "both"]
    assert served.served["both"]["since"] >= gone[0]["until"]
    assert served.route(ids) == ["default", "other", "both", "__base__"]
    assert [one["name"] for one in served.withhold("both")] == ["both"]
    assert served.route(ids) == ["default", "other", "default", "__base__"]
    served.revoke("other")  # and with it what it is a part of, also if that is withheld
    assert (served.withheld, list(served.served)) == ({}, ["default"])


def test_a_request_that_waited_is_not_answered_without_the_prompt_that_it_had():
    served = ServedPrompts(make_gated("other"))
    ids = served.gated.tokenizer(["jane", "doe", "jane doe", "good"])["input_ids"]
    before = served.routes
    assert served.choose(ids, [before] * 4) == ["default", "other", "default", "__base__"]
    served.withdrawn = lambda: ["default"]
    assert served.choose(ids, [before] * 4) == [None, "other", None, "__base__"]
    assert served.choose(ids, [None] * 4) == [None, "other", None, "__base__"]
    served.withdrawn = tuple
    served.withhold("default")
    assert served.choose(ids, [before] * 4) == [None, "other", None, "__base__"]
    assert served.choose(ids, [served.routes] * 4) == ["__base__", "other", "other", "__base__"]
    served.restore("default")
    assert served.choose(ids, [before] * 4) == ["default", "other", "default", "__base__"]
    served.revoke("default")
    assert served.choose(ids, [before, None] * 2) == [None, "other", None, "__base__"]


@pytest.mark.parametrize("withheld", [False, True])
def test_a_request_that_waited_is_not_answered_under_another_prompt_of_its_prompts_name(folder, withheld):
    served = ServedPrompts(load_prompts(base(), make_tokenizer(), {"a": folder / "jane", "b": folder / "new"}), folder)
    ids = served.gated.tokenizer(["jane", "the plot", "good"])["input_ids"]
    before = served.routes
    (served.withhold if withheld else served.revoke)("a")
    served.add("a", "jane")
    assert served.choose(ids, [before] * 3) == [None, "b", "__base__"]
    assert served.choose(ids, [served.routes] * 3) == ["a", "b", "__base__"]
    served.withhold("b")
    served.restore("b")
    assert served.choose(ids, [before] * 3) == [None, "b", "__base__"]  # the same that it was


def test_a_combined_prompt_with_a_gate_of_its_own_stays_when_a_part_is_withheld():
    plain = make_gated("other", "both")
    served = ServedPrompts(
        GatedUnlearner(plain.unlearner, plain.tokenizer, plain.gates, combined={("default", "other"): "both"})
    )
    ids = plain.tokenizer(["jane doe", "both"])["input_ids"]
    assert served.route(ids) == ["both", "both"]
    served.withhold("other")
    assert served.route(ids) == ["default", "both"]
    assert (served.idle, list(served.served)) == ([], ["default", "both"])


def test_a_prompt_is_added_over_one_that_is_withheld_and_one_that_is_always_on_comes_back_last(folder):
    folders = {"a": folder / "jane", "b": folder / "new"}
    served = ServedPrompts(load_prompts(base(), make_tokenizer(), folders, always_on=["b"]), folder)
    ids = served.gated.tokenizer(["the plot", "good"])["input_ids"]
    served.withhold("b")
    with pytest.raises(ApiError, match="a prompt is always on"):
        served.add("c", "new", True)
    served.add("c", "new")
    served.restore("b")
    assert served.route(ids) == ["c", "b"]
    served.withhold("b")
    with pytest.raises(ApiError, match="there is a prompt of this name"):
        served.add("c", "new")
    served.add("b", "new")
    assert (served.withheld, served.served["b"]["gate"], served.route(ids)) == ({}, "names", ["c", "__base__"])


@pytest.mark.parametrize("name", ["", ".", "..", "../prompts/new", "/etc", "nothing", "link", "holds-link", "a\0b", 3])
def test_only_folders_within_the_allowed_one_are_read(folder, tmp_path, name):
    outside = tmp_path / "outside"
    shutil.copytree(folder / "new", outside)
    allowed = tmp_path / "allowed"
    shutil.copytree(folder / "new", allowed / "holds-link")
    (allowed / "holds-link" / "adapter_model.safetensors").unlink()
    (allowed / "holds-link" / "adapter_model.safetensors").symlink_to(outside / "adapter_model.safetensors")
    (allowed / "link").symlink_to(outside)
    served = ServedPrompts(make_gated(), allowed)
    with pytest.raises(ApiError) as caught:
        served.add("new", str(folder / "new") if name == "/etc" else name)
    assert caught.value.status == 400
    assert list(served.served) == ["default"]
    with pytest.raises(ApiError) as caught:
        ServedPrompts(make_gated()).add("new", "new")
    assert caught.value.status == 403


def damaged(folder, kind):
    if kind == "pickle":
        weights = load_file(folder / "adapter_model.safetensors")
        (folder / "adapter_model.safetensors").unlink()
        torch.save(weights, folder / "adapter_model.bin")
    if kind == "no gate":
        shutil.rmtree(folder / "gate")
    if kind == "other weights":
        weights = load_file(folder / "adapter_model.safetensors")
        save_file({name: one + 1 for name, one in weights.items()}, folder / "adapter_model.safetensors")
    if kind == "half":
        data = (folder / "adapter_model.safetensors").read_bytes()
        (folder / "adapter_model.safetensors").write_bytes(data[: len(data) // 2])
    if kind == "gate":
        (folder / "gate" / "gate.json").write_text("{")


@pytest.mark.parametrize("kind", ["pickle", "no gate", "other weights", "half", "gate"])
def test_a_damaged_folder_is_refused_and_changes_nothing(folder, kind):
    served = ServedPrompts(make_gated(), folder)
    damaged(folder / "new", kind)
    before = state_of(served.gated.unlearner)
    with pytest.raises(ApiError, match="was not added"):
        served.add("new", "new")
    after = state_of(served.gated.unlearner)
    assert {name: one for name, one in after.items() if name != "values"} == {
        name: one for name, one in before.items() if name != "values"
    }
    assert after["values"] == before["values"]
    assert list(served.gated.gates) == list(served.served) == ["default"]


@pytest.mark.parametrize("kind", ["half", "gate"])
def test_a_withheld_prompt_is_still_there_after_a_damaged_one_in_its_place_is_refused(folder, kind):
    served = ServedPrompts(make_gated(), folder)
    served.withhold("default")
    damaged(folder / "new", kind)
    with pytest.raises(ApiError, match="was not added"):
        served.add("default", "new")
    assert list(served.withheld) == list(served.gated.unlearner.peft_config) == ["default"]
    served.restore("default")
    assert list(served.served) == ["default"]


def test_a_prompt_in_the_place_of_a_withheld_one_is_served(folder):
    served = ServedPrompts(make_gated(), folder)
    served.withhold("default")
    served.add("default", "new")
    assert list(served.served) == list(served.gated.unlearner.peft_config) == ["default"]
    assert not served.withheld


def test_an_engine_that_takes_embeddings_refuses_a_prefix():
    served = ServedPrompts(make_gated(prompt_type="prefix_tuning"))
    with pytest.raises(ValueError, match="keys and values"):
        served.take_embeddings_only()


# ---- fixed refusals ----


@pytest.fixture
def refusing(folder):
    """The folder of prompts, with a refusal of "film" in `no`."""
    refusal_of(make_gated(), "film").save_pretrained(folder / "no")
    return folder


def test_the_first_of_prompts_and_refusals_that_flag_a_request_counts(refusing):
    folders = {"a": refusing / "jane", "no": refusing / "no", "b": refusing / "new"}
    texts = ["jane", "a film", "the plot", "film of jane", "plot of a film", "good"]
    for order, expected in (
        (["a", "no", "b"], ["a", "no", "b", "a", "no", "__base__"]),
        (["b", "no", "a"], ["a", "no", "b", "no", "b", "__base__"]),
    ):
        served = ServedPrompts.from_folders(base(), make_tokenizer(), {name: folders[name] for name in order})
        assert served.route(served.gated.tokenizer(texts)["input_ids"]) == expected
        assert list(served.served) == order
    assert {name: one["kind"] for name, one in served.served.items()} == {
        **dict.fromkeys("ab", "prompt"),
        "no": "fixed refusal",
    }
    entry = {key: value for key, value in served.served["no"].items() if key != "since"}
    assert entry == {
        **{"name": "no", "kind": "fixed refusal", "adapter": "no", "prompt_sha256": None, "gate": "names"},
        "base_fingerprint": served.base_fingerprint,
    }


def test_a_combined_prompt_is_for_just_its_parts_so_not_where_a_refusal_flags_too():
    plain = make_gated("other", "both")
    gates = {name: plain.gates[name] for name in ("default", "other")}
    gated = GatedUnlearner(plain.unlearner, plain.tokenizer, gates, combined={("default", "other"): "both"})
    ids = plain.tokenizer(["jane doe", "film of jane doe", "film"])["input_ids"]
    refusals = {"no": refusal_of(gated, "film")}
    assert ServedPrompts(gated, refusals=refusals).route(ids) == ["both", "default", "no"]
    first = ["no", "default", "other"]
    assert ServedPrompts(gated, refusals=refusals, precedence=first).route(ids) == ["both", "no", "no"]


def test_a_refusal_is_added_revoked_withheld_and_restored_as_a_prompt_is(refusing):
    served = ServedPrompts(make_gated(), refusing)
    ids = served.gated.tokenizer(["jane", "a film", "film of jane"])["input_ids"]
    added = served.add("no", "no")
    assert (added["kind"], added["gate"], served.longest) == ("fixed refusal", "names", 5)
    assert served.route(ids) == ["default", "no", "default"]
    with pytest.raises(ApiError, match="there is a prompt of this name"):
        served.add("no", "new")
    before = served.routes
    [gone] = served.withhold("no")
    assert (served.route(ids), list(served.withheld), gone["name"]) == (
        ["default", "__base__", "default"],
        ["no"],
        "no",
    )
    assert served.choose(ids, [before] * 3) == ["default", None, "default"]
    served.restore("no")
    assert served.route(ids) == ["default", "no", "default"]
    [gone] = served.revoke("no")
    assert gone["until"] >= gone["since"]
    assert (served.route(ids), served.refusals) == (["default", "__base__", "default"], {})
    served.add("all", "no", True)
    assert served.route(ids) == ["default", "all", "default"]
    with pytest.raises(ApiError, match="a prompt is always on"):
        served.add("new", "new")


def test_a_refusal_takes_the_place_of_a_withheld_prompt_and_a_prompt_that_of_a_withheld_refusal(refusing):
    served = ServedPrompts(make_gated(), refusing)
    ids = served.gated.tokenizer(["jane", "a film", "the plot"])["input_ids"]
    served.withhold("default")
    served.add("default", "no")
    assert (served.route(ids), served.withheld) == (["__base__", "default", "__base__"], {})
    assert list(served.gated.unlearner.peft_config) == []
    served.withhold("default")
    served.add("default", "new")
    assert (served.route(ids), served.withheld, served.refusals) == (["__base__", "__base__", "default"], {}, {})


@pytest.mark.parametrize("kind", ["no gate", "gate", "file", "another method"])
def test_a_refusal_that_does_not_load_is_refused_and_changes_nothing(refusing, kind):
    served = ServedPrompts(make_gated(), refusing)
    damaged(refusing / "no", kind)
    if kind == "file":
        (refusing / "no" / "spul_rival.json").write_text("{")
    if kind == "another method":
        (refusing / "no" / "spul_rival.json").write_text('{"format_version": 1, "kind": "guardrail prompt"}')
    served.withhold("default")
    for name in ("no", "default"):
        with pytest.raises(ApiError, match="was not added") as caught:
            served.add(name, "no")
        assert caught.value.status == 400
    assert (list(served.served), list(served.withheld), served.refusals) == ([], ["default"], {})
    served.restore("default")
    assert list(served.served) == ["default"]


def test_names_and_kinds_of_refusals_are_checked():
    gated = make_gated()
    with pytest.raises(ValueError, match=r"refusals has \['default'\], which are names of prompts"):
        ServedPrompts(gated, refusals={"default": refusal_of(gated)})
    with pytest.raises(TypeError, match="expected a FixedRefusal"):
        ServedPrompts(gated, refusals={"no": " unknown"})
    with pytest.raises(ValueError, match=r"precedence is \['no'\]; expected the names \['default', 'no'\]"):
        ServedPrompts(gated, refusals={"no": refusal_of(gated)}, precedence=["no"])
