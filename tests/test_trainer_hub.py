"""Uploads of a training with push_to_hub: whole prompts and layers, which load from there."""

import shutil
from concurrent.futures import Future
from types import SimpleNamespace

import pytest
import torch
import transformers.trainer
from helpers import CONFIGS, arguments, assert_same, build, layers_on, make_collator, make_dataset, make_unlearner

from spul import SoftPromptUnlearner, UnlearningLayers, UnlearningLoss, UnlearningTrainer
from spul.training.distillation import virtual_tokens


class FakeHub:
    """Keeps in a folder what a trainer uploads."""

    def __init__(self, folder):
        self.folder, self.uploads = folder, []

    def create_repo(self, name, **kwargs):
        return SimpleNamespace(repo_id=f"me/{name}")

    def upload_folder(self, folder_path, ignore_patterns=(), **kwargs):
        self.uploads.append(self.folder / str(len(self.uploads)))
        shutil.copytree(folder_path, self.uploads[-1], ignore=shutil.ignore_patterns(*ignore_patterns))
        done: Future[None] = Future()
        done.set_result(None)
        return done


@pytest.fixture
def hub(tmp_path, monkeypatch):
    found = FakeHub(tmp_path / "hub")
    monkeypatch.setattr(transformers.trainer, "hf_api", lambda: found)
    return found


def with_name(name):
    return SoftPromptUnlearner(build("llama", torch.float32), CONFIGS["prompt_tuning"](4), adapter_name=name)


def at_message():
    base = build("llama", torch.float32)
    return SoftPromptUnlearner(base, CONFIGS["prompt_tuning"](4), prompt_position="message")


MODELS = {
    "prompt": make_unlearner,
    "P-tuning": lambda: make_unlearner("p_tuning"),
    "named": lambda: with_name("jane"),
    "at the message": at_message,
    "layers": lambda: layers_on(build("llama", torch.float32)),
}


def weights_of(model):
    """The trained tensors: of a prompt its virtual tokens, of layers their weights."""
    if isinstance(model, UnlearningLayers):
        return model.layers_state()
    name, is_loaded = model.active_adapter, model.active_peft_config.inference_mode
    return {"tokens": virtual_tokens(model) if is_loaded else model.get_prompt_embedding_to_save(name).detach()}


def trained(kind, folder, **more):
    """A trainer after two steps, with a checkpoint of each."""
    settings = {"push_to_hub": True, "save_strategy": "steps", "save_steps": 1, "max_steps": 2, **more}
    dataset = make_dataset().map(lambda row: {"text": row["prompt"].split()[1]})
    own = {"prompt_position": "message", "text_field": "text"} if kind == "at the message" else {}
    loss = UnlearningLoss() if kind == "layers" else None
    trainer = UnlearningTrainer(
        MODELS[kind](), arguments(folder, **settings), make_collator(**own), dataset, loss=loss
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("kind", MODELS)
def test_every_upload_is_a_whole_save(hub, tmp_path, kind):
    trainer = trained(kind, tmp_path / "out")
    trainer.push_to_hub()
    assert len(hub.uploads) == 3
    load = UnlearningLayers.from_pretrained if kind == "layers" else SoftPromptUnlearner.from_pretrained
    found = []
    for folder in hub.uploads:
        where = folder / "jane" if kind == "named" else folder
        found.append(weights_of(load(build("llama", torch.float32), where)))
        assert (where / "README.md").read_text().startswith("---")
        assert not list(folder.glob("checkpoint-*"))
    assert_same(found[1], found[2], rtol=0, atol=0)
    assert_same(found[2], weights_of(trainer.model), rtol=0, atol=0)
    assert any(not torch.equal(value, found[1][name]) for name, value in found[0].items())
    if kind == "P-tuning":
        again = SoftPromptUnlearner.from_pretrained(build("llama", torch.float32), hub.uploads[0], is_trainable=True)
        assert weights_of(again)["tokens"].allclose(found[0]["tokens"])


def test_an_upload_takes_the_place_of_an_earlier_save(hub, tmp_path):
    """Its weights stood beside the record of others, and were refused."""
    make_unlearner().save_pretrained(str(tmp_path / "out"))
    trained("prompt", tmp_path / "out")
    for folder in (tmp_path / "out", *hub.uploads):
        SoftPromptUnlearner.from_pretrained(build("llama", torch.float32), folder)


def test_an_upload_under_way_keeps_the_files_that_it_reads(hub, tmp_path, monkeypatch):
    """Trainer leaves out the uploads of later checkpoints meanwhile."""
    monkeypatch.setattr(Future, "done", lambda self: False)
    trainer = trained("prompt", tmp_path / "out", max_steps=3)
    assert len(hub.uploads) == 1
    load = SoftPromptUnlearner.from_pretrained
    first, kept = (load(build("llama", torch.float32), folder) for folder in (hub.uploads[0], tmp_path / "out"))
    assert_same(weights_of(first), weights_of(kept), rtol=0, atol=0)
    assert not torch.equal(weights_of(kept)["tokens"], weights_of(trainer.model)["tokens"])


def test_nothing_is_saved_for_an_upload_that_is_left_to_the_end(hub, tmp_path):
    trained("prompt", tmp_path / "out", hub_strategy="end")
    assert hub.uploads == []
    assert not (tmp_path / "out" / "spul_config.json").exists()
