"""UnlearningTrainer with unlearning layers: what it changes, logs, saves and goes on from."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from helpers import arguments, build, make_collator, make_dataset, rows

from spul import UnlearningLayers, UnlearningLayersConfig, UnlearningLoss, UnlearningTrainer
from spul.evaluation.metrics.scoring import score_completions
from spul.records.digests import is_summary_of
from spul.records.spul_config import read_spul_config
from spul.records.weights import file_digest
from spul.training.methods import unlearning_method

EUL = unlearning_method("EUL")


def make_layers(dtype=torch.float32):
    return UnlearningLayers(build("llama", dtype), UnlearningLayersConfig(reduction=4))


def make_trainer(folder, layers=None, dataset=None, **kwargs):
    names = ("forget_fraction", "alternate", "eval_dataset", "callbacks", "reference", "loss")
    names += ("digest_key",)
    own = {"loss": EUL.loss, **{key: kwargs.pop(key) for key in names if key in kwargs}}
    layers = make_layers() if layers is None else layers
    dataset = make_dataset(12, 12) if dataset is None else dataset
    return UnlearningTrainer(
        layers, arguments(folder, **kwargs), make_collator(generic_completions=None), dataset, **own
    )


def test_the_layers_learn_and_the_base_does_not(tmp_path):
    layers = make_layers()
    before = {name: value.clone() for name, value in layers.base_model.state_dict().items()}
    trainer = make_trainer(tmp_path, layers, max_steps=12, learning_rate=2e-2, loss=unlearning_method("GA").loss)
    forget, collator = rows("jane", 12), make_collator()
    was = score_completions(layers, forget, collator)["loss"]
    trainer.train()
    assert score_completions(layers, forget, collator)["loss"] > was + 1
    with layers.disable_adapter():
        assert score_completions(layers, forget, collator)["loss"] == was
    assert all(torch.equal(value, before[name]) for name, value in layers.base_model.state_dict().items())


def test_every_term_is_logged_and_the_lm_term_only_where_it_is_asked_for(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=2)
    trainer.train()
    entry = trainer.state.log_history[0]
    total = entry["forget_loss"] + entry["retain_loss"] + 0.8 * entry["kl_loss"] + 0.2 * entry["lm_loss"]
    assert entry["lm_loss"] < 0
    assert total == pytest.approx(entry["loss"], abs=1e-3)
    other = make_trainer(tmp_path, max_steps=1, loss=unlearning_method("NPO+KL").loss)
    other.train()
    assert "lm_loss" not in other.state.log_history[0]


def test_alternating_takes_a_pass_over_retain_then_one_over_forget(tmp_path):
    trainer = make_trainer(tmp_path, dataset=make_dataset(16, 24), alternate=True, num_train_epochs=2)
    trainer.train()
    forget = [entry["forget_loss"] for entry in trainer.state.log_history if "forget_loss" in entry]
    assert [loss == 0 for loss in forget] == [True, True, True, False, False] * 2


def test_alternating_and_mixing_contradict_each_other(tmp_path):
    with pytest.raises(ValueError, match="alternate=True takes retain and forget rows in turn, but forget_fraction"):
        make_trainer(tmp_path, alternate=True, forget_fraction=0.5)
    with pytest.raises(ValueError, match="alternate=True and train_sampling_strategy="):
        make_trainer(tmp_path, alternate=True, train_sampling_strategy="sequential")


@pytest.mark.parametrize("alternate", [False, True])
def test_resuming_gives_the_bits_of_a_run_that_never_stopped(tmp_path, alternate):
    settings = {"save_strategy": "steps", "save_steps": 2, "num_train_epochs": 2, "alternate": alternate}
    whole = make_trainer(tmp_path / "whole", **settings)
    whole.train()
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "cut" / "checkpoint-4")
    again = make_trainer(tmp_path / "cut", **settings)
    again.train(resume_from_checkpoint=True)
    for name, value in whole.model.layers_state().items():
        assert torch.equal(again.model.layers_state()[name], value), name


def test_a_key_given_on_resuming_makes_the_digests_of_the_record(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    make_trainer(tmp_path, **settings, digest_key=bytes(32)).train()
    key = bytes(range(32))
    again = make_trainer(tmp_path, **settings, digest_key=key)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    again.model.save_pretrained(tmp_path / "saved")
    record = read_spul_config(tmp_path / "saved")
    assert is_summary_of(record.forget, again.train_dataset.select(range(12)), key)
    assert record.weights_sha256 == file_digest(tmp_path / "saved" / "unlearning_layers.safetensors")


def test_a_checkpoint_is_a_folder_of_layers_without_the_base(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    trainer.train()
    folder = tmp_path / "checkpoint-2"
    assert not (folder / "model.safetensors").exists()
    assert (folder / "tokenizer.json").exists()
    record = json.loads((folder / "spul_config.json").read_text())
    assert record["loss"]["gamma"] == 0.2
    assert (record["forget"]["rows"], record["retain"]["rows"]) == (12, 12)
    loaded = UnlearningLayers.from_pretrained(build("llama"), folder)
    ids = torch.arange(5, 15)[None]
    torch.testing.assert_close(loaded(ids).logits, trainer.model.eval()(ids).logits)


def test_the_best_checkpoint_comes_back_with_its_metrics(tmp_path):
    trainer = make_trainer(
        tmp_path,
        max_steps=6,
        learning_rate=5e-2,
        eval_dataset={"test_retain": rows("film", 12)},
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_test_retain_loss",
        greater_is_better=False,
    )
    trainer.train()
    best = trainer.state.best_model_checkpoint
    kept = UnlearningLayers.from_pretrained(build("llama"), best)
    for name, value in kept.layers_state().items():
        assert torch.equal(trainer.model.layers_state()[name], value)
    found = score_completions(trainer.model, rows("film", 12), make_collator())
    assert trainer.model.spul_config.metrics["test_retain"]["accuracy"] == found["accuracy"]


def test_a_base_in_4_bit_can_carry_layers(tmp_path):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    build("llama", hidden_size=64).save_pretrained(tmp_path / "base")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=config, device_map="cpu")
    layers = UnlearningLayers(base, UnlearningLayersConfig(reduction=4))
    trainer = make_trainer(tmp_path, layers, max_steps=3)
    before = {name: value.clone() for name, value in layers.layers_state().items()}
    trainer.train()
    assert all(not torch.equal(value, before[name]) for name, value in layers.layers_state().items())
    layers.save_pretrained(tmp_path / "saved")
    layers.remove()
    ids = torch.arange(5, 15)[None]
    loaded = UnlearningLayers.from_pretrained(base, tmp_path / "saved")
    learned = loaded(ids).logits
    with loaded.disable_adapter():
        assert not torch.equal(loaded(ids).logits, learned)


def test_layers_that_were_taken_off_do_not_train_the_base(tmp_path):
    layers = make_layers()
    layers.remove()
    with pytest.raises(ValueError, match="the base would train; call"):
        make_trainer(tmp_path, layers)


def test_more_training_drops_what_was_gathered(tmp_path):
    layers = make_layers()
    layers.gram_matrices = {"a": torch.eye(2, dtype=torch.float64)}
    make_trainer(tmp_path, layers, max_steps=1).train()
    assert layers.gram_matrices == {}


def test_a_checkpoint_of_layers_of_another_sort_is_refused(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    make_trainer(tmp_path, **settings).train()
    other = UnlearningLayers(build("llama"), UnlearningLayersConfig(reduction=4, activation="silu"))
    with pytest.raises(ValueError, match=r"the saved layers have the config .*relu.*these layers have .*silu"):
        make_trainer(tmp_path, other, **settings).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_evaluating_loaded_layers_leaves_their_record_alone(tmp_path):
    layers = make_layers()
    make_trainer(tmp_path / "out", layers)
    layers.save_pretrained(tmp_path / "layers")
    loaded = UnlearningLayers.from_pretrained(build("llama"), tmp_path / "layers")
    before = loaded.spul_config.loss
    other = UnlearningLoss(alpha=0.9)
    trainer = UnlearningTrainer(loaded, arguments(tmp_path), make_collator(), eval_dataset=rows("a", 3), loss=other)
    trainer.evaluate()
    assert loaded.spul_config.loss == before == EUL.loss.to_dict()
