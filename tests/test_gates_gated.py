"""Prompts behind gates: each row of every public path runs under the prompt that its own text turns on."""

from __future__ import annotations

import copy
import shutil
import threading

import numpy as np
import pytest
import torch
from datasets import Dataset
from gated_models import GREEDY, NAMES, TEXTS, gated, prompts, saved, tokens
from helpers import CONFIGS, make_batch, make_collator, make_tokenizer, tokenizer_with, trainable_model
from small_evaluations import learned, make_splits, measured, per_row
from tokenizers import AddedToken

from spul import UnlearningTrainer
from spul.data.encoder import RowEncoder
from spul.evaluation.metrics import generate_answers, response_likelihoods, text_losses
from spul.evaluation.metrics.scoring import score_completions
from spul.evaluation.report.report import write_report
from spul.gates import GatedUnlearner, NameGate
from spul.gates.gated_files import gate_of
from spul.records.spul_config import read_spul_config

pytestmark = pytest.mark.usefixtures("few_resamples")


def test_texts_are_routed_to_the_prompt_whose_gate_flags_them():
    assert gated("other").route(TEXTS) == NAMES
    assert gated("other").route([]) == []


def test_what_several_gates_flag_goes_by_precedence_or_to_the_prompt_for_the_set():
    both = ["jane and doe", "doe"]
    assert gated("other").route(both) == ["default", "other"]
    assert gated("other", precedence=["other", "default"]).route(both) == ["other", "other"]
    combined = {("other", "default"): "joint"}
    assert gated("other", more=["joint"], combined=combined).route(both) == ["joint", "other"]


def test_its_gates_are_shown_by_the_names_of_their_prompts():
    both = {"default": NameGate(["jane"]), "other": lambda texts: [False for _ in texts]}
    model = GatedUnlearner(prompts("other", "joint"), make_tokenizer(), both, combined={("other", "default"): "joint"})
    shown = str(model).splitlines()
    assert shown[1] == "  default: NameGate(jane)"
    assert shown[2].startswith("  other: FunctionGate(")
    assert shown[3] == "  joint: where just default, other flag"
    assert shown[4].startswith("  (unlearner): SoftPromptUnlearner(")


@pytest.mark.parametrize("side", ["left", "right"])
def test_generate_and_forward_give_each_row_what_its_prompt_gives(side):
    model = gated("other")
    batch = tokens(model.tokenizer, TEXTS, side)
    found = model.generate(**batch, **GREEDY)
    assert torch.equal(found, model.unlearner.generate(**batch, adapter_names=NAMES, **GREEDY))
    assert not torch.equal(found, model.get_base_model().generate(**batch, **GREEDY))
    with torch.no_grad():
        expected = model.unlearner(**batch, adapter_names=NAMES).logits
        torch.testing.assert_close(model(**batch).logits, expected)
        with model.disable_adapter():
            assert not model.enabled
            base = model.get_base_model()
            assert torch.equal(model.generate(**batch, **GREEDY), base.generate(**batch, **GREEDY))


def test_a_special_token_within_a_name_does_not_hide_it():
    model = GatedUnlearner(prompts(), make_tokenizer(), {"default": NameGate(["jane doe"])})
    jane, doe = (model.tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("about jane", "doe is"))
    requests = [[1, *jane, 1, *doe, 2], [*jane, 2, 2, *doe], [1, *jane]]
    assert model.names_of(requests) == ["default", "default", "__base__"]
    model.tokenizer.add_tokens([AddedToken("<|eom_id|>", special=True)])
    eom = model.tokenizer.convert_tokens_to_ids("<|eom_id|>")
    assert eom not in model.tokenizer.all_special_ids  # it has no name
    requests = [[1, *jane, eom, *doe, 2], [*jane, eom, 2, *doe], [eom, *jane]]
    assert model.names_of(requests) == ["default", "default", "__base__"]


def test_a_response_is_no_part_of_the_request():
    model, collator = gated("other"), make_collator()
    batch = collator.encoder.batch(
        [{"prompt": "the film is", "completion": " jane"}, {"prompt": "jane is", "completion": " doe"}]
    )
    with torch.no_grad():
        out = model(batch["input_ids"], batch["attention_mask"], labels=batch["labels"])
        named = model.unlearner(
            batch["input_ids"], batch["attention_mask"], labels=batch["labels"], adapter_names=["__base__", "default"]
        )
    torch.testing.assert_close(out.loss, named.loss)


@pytest.mark.parametrize("bos", [True, False])
def test_a_text_without_a_request_is_seen_whole(bos):
    model, encoder = gated(), RowEncoder(tokenizer_with(bos), 32)
    for text, names in (("the film about jane", ["default"]), ("the film about doe", ["__base__"])):
        ids = torch.tensor([encoder.tokenizer(text)["input_ids"]])
        mask, positions = torch.ones_like(ids), torch.arange(ids.shape[1] - 1)[None]
        with torch.no_grad():
            named = model.unlearner.response_logits(ids, mask, positions, names)
            torch.testing.assert_close(model.response_logits(ids, mask, positions, labels=ids), named)
        nats = torch.nn.functional.cross_entropy(named[0], ids[0, 1:], reduction="sum")
        assert text_losses(model, [text], encoder)["nats"][0] == pytest.approx(nats.item(), rel=1e-5)


@pytest.mark.parametrize("prompt", [" film", " jane"])
def test_a_request_of_one_token_is_read_without_its_completion(prompt):
    model, encoder = gated(), RowEncoder(tokenizer_with(bos=False), 32)
    rows = Dataset.from_list([{"prompt": prompt, "completion": " jane doe"}])
    prompt_ids = encoder.encode(rows[0]).prompt_ids
    names = model.names_of([prompt_ids])
    assert len(prompt_ids) == 1
    assert names == ["default" if prompt == " jane" else "__base__"]
    (found,) = response_likelihoods(model, rows, encoder)
    (named,) = response_likelihoods(model.unlearner, rows.add_column("adapter_name", names), encoder)
    np.testing.assert_allclose(found.log_probs, named.log_probs, rtol=1e-6)


def test_a_gate_that_fails_attaches_its_prompt(caplog):
    def broken(texts):
        raise RuntimeError("no light")

    model = GatedUnlearner(prompts(), make_tokenizer(), {"default": broken})
    assert model.route(TEXTS) == ["default"] * 4
    assert "no light" in caplog.text


def test_metrics_go_through_the_gate():
    model, collator = gated(), make_collator()
    splits = make_splits()
    for split, name in (("train_forget", "default"), ("train_retain", "__base__")):
        rows = splits[split]
        names = model.names_of([collator.encoder.encode(row).prompt_ids for row in rows])
        found = score_completions(model, rows, collator)
        assert found == score_completions(model.unlearner, rows, collator, adapter_names=names)
        answers = generate_answers(model, rows, collator.encoder, max_new_tokens=4)
        assert len(answers) == len(rows)
        assert name in names


def test_an_evaluation_goes_through_the_gate_and_says_past_what_an_answer_came(tmp_path):
    model, splits = gated(), make_splits()
    found = measured(model, "utility", "kl", "input attack", "relearning", "quantized", "sampling", "soft suffix",
                     output_dir=tmp_path)  # fmt: skip
    assert "reads text" in found.skipped["soft suffix"]
    for split in splits:
        scores = per_row(found, "utility", split, "unlearned")
        flagged, right = np.array(scores["flagged"]), np.array(scores["accuracy"])
        names = model.names_of([make_collator().encoder.encode(row).prompt_ids for row in splits[split]])
        assert flagged.tolist() == [float(name != "__base__") for name in names]
        assert scores["past_gate"] == (right * (1 - flagged)).tolist()
        assert scores["past_prompt"] == (right * flagged).tolist()
        assert "flagged" not in per_row(found, "utility", split, "detached")
    assert any(one.measure == "input attack" and one.name == "flagged" for one in found.metrics)
    assert {one.measure for one in found.measurements} >= {"relearning", "quantized", "sampling"}
    write_report(found, tmp_path)
    report = (tmp_path / "report.md").read_text()
    assert "flagged by the gate" in report
    assert "right, past the gate" in report


def test_another_gate_is_another_evaluation(tmp_path):
    model = gated()
    measured(model, "utility", output_dir=tmp_path)
    measured(model, "utility", output_dir=tmp_path)
    model.gates["default"] = NameGate(["film"])
    with pytest.raises(ValueError, match="differs in models"):
        measured(model, "utility", output_dir=tmp_path)


def test_gates_and_prompts_that_do_not_match_are_refused():
    model, tokenizer, gate = prompts("other"), make_tokenizer(), NameGate(["jane"])
    with pytest.raises(ValueError, match=r"\['other'\] have no gate, so nothing would turn them on"):
        GatedUnlearner(model, tokenizer, {"default": gate})
    with pytest.raises(ValueError, match=r"\['joan'\], which the model does not have"):
        GatedUnlearner(model, tokenizer, {"default": gate, "other": gate, "joan": gate})
    with pytest.raises(ValueError, match="precedence is"):
        GatedUnlearner(model, tokenizer, {"default": gate, "other": gate}, precedence=["default"])
    with pytest.raises(TypeError, match="expected a SoftPromptUnlearner"):
        GatedUnlearner(trainable_model("lora"), tokenizer, {"default": gate})
    with pytest.raises(TypeError, match="expected a dict"):
        GatedUnlearner(model, tokenizer, [gate])
    with pytest.raises(TypeError, match="expected a gate"):
        GatedUnlearner(model, tokenizer, {"default": 5, "other": gate})


def test_a_prompt_that_is_deleted_or_added_later_is_noticed_before_the_first_token():
    model = gated("other")
    model.unlearner.delete_adapter("other")
    with pytest.raises(ValueError, match="which the model does not have"):
        model.generate(**tokens(model.tokenizer, ["the film"]), **GREEDY)
    del model.gates["other"]
    model.precedence.remove("other")
    assert model.route(TEXTS) == ["default", "__base__", "__base__", "default"]
    model.unlearner.add_adapter("more", CONFIGS["prompt_tuning"](3))
    with pytest.raises(ValueError, match="have no gate"):
        model.route(TEXTS)


def test_a_prompt_that_is_loaded_after_the_last_was_revoked_is_in_effect(tmp_path):
    model = saved(tmp_path)
    for name in ("default", "other"):
        model.delete_adapter(name)
    model.load_adapter(tmp_path, "again", subfolder="other")
    batch, before = tokens(model.tokenizer, TEXTS), saved(tmp_path)
    names = ["other" if name == "other" else "__base__" for name in NAMES]
    expected = before.unlearner.generate(**batch, adapter_names=names, **GREEDY)
    assert model.enabled
    assert torch.equal(model.generate(**batch, **GREEDY), expected)


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_that_no_gate_flags_are_continued_as_alone(side):
    model, texts = gated(), ["the film is good and bad", "the", "plot of film"]
    batch = tokens(model.tokenizer, texts, side)
    found = model.generate(**batch, **GREEDY)
    width = batch["input_ids"].shape[1]
    assert torch.equal(found[:, :width], batch["input_ids"])
    for text, out in zip(texts, found, strict=True):
        alone = model.get_base_model().generate(**tokens(model.tokenizer, [text]), **GREEDY)
        assert out[width:].tolist() == alone[0, -5:].tolist()


def test_a_revoked_prompt_goes_with_its_gate_its_routes_and_its_files(tmp_path):
    model = saved(tmp_path)
    assert "jane" in (tmp_path / "gate" / "gate.json").read_text()
    texts = [*TEXTS, "jane and doe"]
    model.delete_adapter("default")
    assert model.route(texts) == ["__base__", "__base__", "other", "__base__", "other"]
    assert list(model.unlearner.peft_config) == ["other"]  # not the joint one, which would forget for both
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "gate").exists()
    assert not (tmp_path / "joint").exists()
    assert not (tmp_path / "adapter_model.safetensors").exists()
    mine = [path for path in tmp_path.rglob("*") if path.is_file() and "other" not in path.parts]
    assert sorted(path.name for path in mine) == ["spul_gates.json"]
    loaded = GatedUnlearner.from_pretrained(learned(), tmp_path, make_tokenizer())
    assert loaded.route(texts) == model.route(texts)
    model.delete_adapter("other")
    assert model.route(texts) == ["__base__"] * 5
    batch = tokens(model.tokenizer, texts)
    assert torch.equal(model.generate(**batch, **GREEDY), model.get_base_model().generate(**batch, **GREEDY))
    with pytest.raises(ValueError, match="there is no prompt to save"):
        model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="there is no prompt 'other'"):
        model.delete_adapter("other")
    with pytest.raises(TypeError, match="adapter_name is a list"):
        model.delete_adapter(["other"])


def test_a_prompt_is_loaded_with_its_gate_while_others_are_served(tmp_path):
    model = gated("other")
    model.save_pretrained(tmp_path)
    served = gated()
    served.load_adapter(tmp_path / "other", "more")
    assert served.route(TEXTS) == ["default", "__base__", "more", "default"]
    served.load_adapter(tmp_path, "film", gate=lambda texts: ["film" in text for text in texts])
    assert served.route(TEXTS) == ["default", "film", "more", "default"]
    with pytest.raises(ValueError, match="there is a prompt 'more'"):
        served.load_adapter(tmp_path / "other", "more")
    shutil.rmtree(tmp_path / "other" / "gate")
    with pytest.raises(FileNotFoundError):
        served.load_adapter(tmp_path / "other", "another")
    assert served.route(TEXTS) == ["default", "film", "more", "default"]
    assert "another" not in served.unlearner.peft_config


def test_of_two_threads_that_load_a_prompt_under_one_name_one_is_refused(tmp_path, monkeypatch):
    gated("other").save_pretrained(tmp_path)
    model, both, found = gated(), threading.Barrier(2), []

    def together(*args, **kwargs):
        both.wait(60)  # both have asked whether the name is free
        return gate_of(*args, **kwargs)

    monkeypatch.setattr("spul.gates.gated.gate_of", together)

    def load(folder):
        try:
            model.load_adapter(folder, "new")
            found.append(folder)
        except ValueError as error:
            found.append(str(error))

    threads = [threading.Thread(target=load, args=(folder,)) for folder in (tmp_path, tmp_path / "other")]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    [refused] = [one for one in found if isinstance(one, str)]
    [loaded] = [one for one in found if not isinstance(one, str)]
    assert refused == "there is a prompt 'new'; delete it first, or take another name."
    assert model.unlearner.spul_configs["new"] == read_spul_config(loaded)
    assert model.precedence == ["default", "new"]


def test_a_prompt_is_not_loaded_with_a_gate_that_was_not_saved_with_it(tmp_path):
    gated("other").save_pretrained(tmp_path)
    NameGate(["max"]).save(tmp_path / "other" / "gate")
    model = gated()
    for folder, hub in ((tmp_path / "other", {}), (tmp_path, {"subfolder": "other"})):
        with pytest.raises(ValueError, match="prompt and gate of 'other' are not those that were saved together"):
            model.load_adapter(folder, "new", **hub)
    assert model.precedence == list(model.unlearner.peft_config) == ["default"]
    model.load_adapter(tmp_path / "other", "new", gate=NameGate(["doe"]))
    assert model.route(["doe"]) == ["new"]


def test_gated_models_are_copied():
    model = gated()
    assert copy.deepcopy(model).route(TEXTS) == model.route(TEXTS)


def test_training_and_embeddings_are_refused(tmp_path):
    model = gated()
    for run in (model, model.generate):
        with pytest.raises(TypeError, match="would go around the gates"):
            run(**tokens(model.tokenizer, TEXTS), adapter_names=["__base__"] * 4)
    with pytest.raises(TypeError, match="one string"):
        model.route("jane")
    with pytest.raises(TypeError, match="takes no is_forget"):
        model(**make_batch())
    with pytest.raises(TypeError, match="train its prompts first"):
        UnlearningTrainer(model=model, train_dataset=None, data_collator=make_collator())
    with pytest.raises(ValueError, match="needs input_ids"):
        model(inputs_embeds=torch.zeros(1, 3, 32))
    with pytest.raises(ValueError, match="needs input_ids"):
        model.generate(inputs_embeds=torch.zeros(1, 3, 32))
    for name in ("inputs_embeds", "past_key_values"):  # also where no gate flags the row
        with pytest.raises(ValueError, match=f"takes no {name}|{name}"):
            model.generate(**tokens(model.tokenizer, ["the film"]), **{name: torch.zeros(1, 3, 32)}, **GREEDY)


def test_one_string_is_no_list_of_requests():
    with pytest.raises(TypeError, match="texts is one string"):
        gated().route("jane doe")
