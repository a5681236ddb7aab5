"""Prompts and gates in one folder: saved and loaded together, and refused where they do not belong together."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from gated_models import GREEDY, TEXTS, gated, prompts, saved, text_gate, tokens
from helpers import make_tokenizer
from small_evaluations import learned

from spul import SoftPromptUnlearner
from spul.gates import AnyGate, GatedUnlearner, NameGate, StateGate
from spul.gates.gated_files import check_saved_together


def test_prompts_and_gates_are_saved_and_loaded_together(tmp_path):
    model = saved(tmp_path)
    loaded = GatedUnlearner.from_pretrained(learned(), tmp_path, make_tokenizer())
    texts = [*TEXTS, "jane and doe", "the plot"]
    assert loaded.route(texts) == model.route(texts)
    assert loaded.route(["jane and doe"]) == ["joint"]
    batch = tokens(model.tokenizer, texts)
    assert torch.equal(loaded.generate(**batch, **GREEDY), model.generate(**batch, **GREEDY))
    assert (tmp_path / "gate" / "gate.json").is_file()
    assert (tmp_path / "other" / "gate" / "gate.json").is_file()
    alone = SoftPromptUnlearner.from_pretrained(learned(), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(alone(**batch).logits, model.unlearner(**batch).logits)
    model.save_pretrained(tmp_path)  # once more, over itself
    assert (tmp_path / "README.md").read_text().count("## Gate\n") == 1


def test_prompts_in_folders_of_their_own_are_loaded_one_by_one_under_names(tmp_path):
    for name in ("jane", "max"):
        GatedUnlearner(prompts(), make_tokenizer(), {"default": NameGate([name])}).save_pretrained(tmp_path / name)
    loaded = GatedUnlearner.from_pretrained(learned(), tmp_path / "jane", make_tokenizer(), adapter_name="jane")
    loaded.load_adapter(tmp_path / "max", "max")
    texts = ["who is jane", "who is max", "the plot"]
    assert loaded.route(texts) == ["jane", "max", "__base__"]
    loaded.save_pretrained(tmp_path / "both")
    again = GatedUnlearner.from_pretrained(learned(), tmp_path / "both", make_tokenizer())
    assert again.route(texts) == ["jane", "max", "__base__"]


def test_a_prompt_is_held_to_the_gates_file_above_it_that_names_its_folder(tmp_path):
    saved(tmp_path)
    alone = tmp_path / "default"  # a folder of this name: the file means the prompt beside itself
    alone.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(tmp_path / "other" / name, alone / name)
    odd = shutil.copytree(alone, tmp_path / "of\\its own")  # no name of a prompt
    for folder in (tmp_path, tmp_path / "other", alone, odd):
        check_saved_together(folder)
    shutil.copy(tmp_path / "adapter_model.safetensors", tmp_path / "other" / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="prompt and gate of 'other' are not those that were saved together"):
        check_saved_together(tmp_path / "other")


def test_a_prompt_that_is_only_for_several_gates_now_keeps_no_gate_of_its_own_on_the_disk(tmp_path):
    model = gated("other", "both")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "both" / "gate" / "gate.json").is_file()
    gates = {name: model.gates[name] for name in ("default", "other")}
    joint = GatedUnlearner(model.unlearner, model.tokenizer, gates, combined={("default", "other"): "both"})
    joint.save_pretrained(tmp_path)
    assert not (tmp_path / "both" / "gate").exists()
    NameGate(["Max Poe"]).save(tmp_path / "both" / "gate")
    joint.save_pretrained(tmp_path)
    assert (tmp_path / "both" / "gate" / "gate.json").is_file()  # of another than the save before
    loaded = GatedUnlearner.from_pretrained(learned(), tmp_path, make_tokenizer())
    assert loaded.route(["jane and doe"]) == ["both"]


def test_a_name_for_a_folder_of_several_prompts_is_refused(tmp_path):
    saved(tmp_path)
    with pytest.raises(
        ValueError, match=r"adapter_name='jane', but .* has the prompts \['default', .*leave adapter_na"
    ):
        GatedUnlearner.from_pretrained(learned(), tmp_path, make_tokenizer(), adapter_name="jane")


def test_a_dict_of_folders_is_refused_with_what_to_do():
    with pytest.raises(TypeError, match=r"folder is a dict; expected one folder .*by load_adapter\(folder, name\)"):
        GatedUnlearner.from_pretrained(learned(), {"jane": "out/jane"}, make_tokenizer())


def test_the_card_says_what_the_gate_flags(tmp_path):
    model = gated()
    model.gates["default"] = text_gate()
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert card.index("## Gate") < card.index("## How to load it")
    assert "recall" in card
    assert "false alarms" in card
    assert "GatedUnlearner.from_pretrained" in card
    model.gates["default"] = NameGate(["jane"])
    model.save_pretrained(tmp_path)
    assert "Not measured." in (tmp_path / "README.md").read_text()


def test_a_state_gate_is_loaded_with_its_base_and_refused_on_another(tmp_path):
    model, tokenizer = prompts(), make_tokenizer()
    forget = [f"jane {a} {b}" for a in ("is", "of", "the") for b in ("film", "plot", "good", "bad")]
    retain = [f"the {a} {b}" for a in ("review", "text", "plot") for b in ("film", "plot", "good", "bad")]
    gate = StateGate.fit(model, tokenizer, forget, retain, recall=0.75)
    GatedUnlearner(model, tokenizer, {"default": gate}).save_pretrained(tmp_path)
    loaded = GatedUnlearner.from_pretrained(learned(), tmp_path, tokenizer)
    assert loaded.route([*forget, *retain]) == GatedUnlearner(model, tokenizer, {"default": gate}).route(
        [*forget, *retain]
    )
    with (
        pytest.warns(UserWarning, match="other weights") as found,
        pytest.raises(ValueError, match=r"fingerprint|another base"),
    ):
        GatedUnlearner.from_pretrained(learned(0.05), tmp_path, tokenizer)
    assert found[0].filename == __file__


def test_a_plain_function_is_not_saved_and_nothing_is_written(tmp_path):
    model = GatedUnlearner(
        prompts(), make_tokenizer(), {"default": AnyGate([NameGate(["jane"]), lambda texts: [True]])}
    )
    with pytest.raises(ValueError, match="is a function, which cannot be saved"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "format_version is 2"),
        ({"format_version": True}, "format_version is True"),
        ({"gates": []}, "gates is"),
        ({"gates": ["../default"]}, "gates is"),
        ({"prompts": ["default", "default"]}, "prompts is"),
        ({"prompts": ["default"]}, "which the model does not have"),
        ({"precedence": ["default"]}, "precedence is"),
        ({"combined": [{"flagged": ["default"], "prompt": "joint"}]}, "combined has the set"),
        ({"combined": "joint"}, "combined is"),
        ({"combined": [{"flagged": ["default", "other"], "prompt": "film"}]}, "which the model does not have"),
    ],
)
def test_routing_that_was_changed_is_refused(tmp_path, change, message):
    saved(tmp_path)
    path = tmp_path / "spul_gates.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    base = learned()
    with pytest.raises(ValueError, match=message):
        GatedUnlearner.from_pretrained(base, tmp_path, make_tokenizer())


def test_a_prompt_and_a_gate_of_different_saves_are_refused(tmp_path):
    model = saved(tmp_path)
    older = (tmp_path / "gate" / "gate.json").read_text()
    model.gates["default"] = NameGate(["film"])
    model.save_pretrained(tmp_path)
    (tmp_path / "gate" / "gate.json").write_text(older)
    with pytest.raises(ValueError, match="of 'default' are not those that were saved together"):
        GatedUnlearner.from_pretrained(learned(), tmp_path, make_tokenizer())
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        model.unlearner.prompt_encoder["other"].embedding.weight.add_(1)
    model.unlearner.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="of 'other' are not those that were saved together"):
        GatedUnlearner.from_pretrained(learned(), tmp_path, make_tokenizer())


@pytest.mark.parametrize("missing", ["spul_gates.json", "gate/gate.json", "other/gate/1/gate.safetensors"])
def test_a_folder_that_lacks_a_file_is_refused(tmp_path, missing):
    saved(tmp_path)
    os.remove(tmp_path / missing)
    with pytest.raises((FileNotFoundError, ValueError), match=r"has no|but no|are not those that were saved together"):
        GatedUnlearner.from_pretrained(learned(), tmp_path, make_tokenizer())


def test_a_prompt_without_its_folder_is_refused(tmp_path):
    saved(tmp_path)
    shutil.rmtree(tmp_path / "joint")
    with pytest.raises((ValueError, FileNotFoundError), match="joint"):
        GatedUnlearner.from_pretrained(learned(), tmp_path, make_tokenizer())
