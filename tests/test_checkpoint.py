"""Saving and loading: plain PEFT reads it, training goes on from it, wrong bases are noticed."""

import json
import os
import shutil
import warnings
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from helpers import CONFIGS, SHAPE, build, build_unlearner, make_batch
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM, PeftModel, PrefixTuningConfig, PromptTuningConfig

from spul import SoftPromptUnlearner, UnlearningLoss, fingerprint
from spul.losses import CrossEntropy, KLDivergence, LossTerm
from spul.records.weights import file_digest


def save_base(folder, **kwargs):
    build("llama", **kwargs).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def batch():
    full = make_batch()
    return {key: full[key] for key in ("input_ids", "attention_mask")}


def saved(tmp_path, family, prompt_type, **kwargs):
    unlearner = build_unlearner(family, prompt_type, torch.float32, **kwargs)
    unlearner.save_pretrained(str(tmp_path / "adapter"))
    return unlearner, str(tmp_path / "adapter")


def test_plain_peft_loads_the_folder_with_equal_logits(tmp_path, family, prompt_type, batch):
    unlearner, folder = saved(tmp_path, family, prompt_type)
    expected = unlearner.eval()(**batch).logits
    plain = PeftModel.from_pretrained(build(family), folder)
    assert type(plain) is not SoftPromptUnlearner
    torch.testing.assert_close(plain(**batch).logits, expected, rtol=0, atol=3e-6)
    ours = SoftPromptUnlearner.from_pretrained(build(family), folder)
    assert type(ours) is SoftPromptUnlearner
    torch.testing.assert_close(ours(**batch).logits, expected, rtol=0, atol=3e-6)
    assert not any(p.requires_grad for p in ours.parameters())


def test_names_suffice_for_spul_and_for_auto_peft(tmp_path, prompt_type, batch, monkeypatch):
    """A local base is recorded by the last part of its path, so that plain PEFT finds it from the folder beside."""
    name = save_base(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    from transformers import AutoModelForCausalLM

    model = SoftPromptUnlearner(AutoModelForCausalLM.from_pretrained(name), CONFIGS[prompt_type]())
    model.save_pretrained(str(tmp_path / "adapter"))
    expected = model.eval()(**batch).logits
    auto = AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "adapter"))
    torch.testing.assert_close(auto(**batch).logits, expected, rtol=0, atol=1e-6)
    ours = SoftPromptUnlearner.from_pretrained(name, str(tmp_path / "adapter"))
    torch.testing.assert_close(ours(**batch).logits, expected, rtol=0, atol=1e-6)


def test_the_folder_holds_what_is_promised_and_nothing_pickled(tmp_path, prompt_type):
    _, folder = saved(tmp_path, "llama", prompt_type)
    names = set(os.listdir(folder))
    expected = {"adapter_config.json", "adapter_model.safetensors", "spul_config.json", "README.md"}
    assert names == expected | ({"prompt_encoder.safetensors"} if prompt_type == "p_tuning" else set())
    config = json.loads(Path(folder, "spul_config.json").read_text())
    assert config["loss"]["alpha"] == 1.0
    assert config["loss"]["kl"] == {"type": "KLDivergence", "reduction": "auto", "direction": "reverse"}
    assert config["base_fingerprint"] == fingerprint(build("llama"))
    assert set(config["versions"]) >= {"spul", "torch", "transformers", "peft"}
    ModelCard.load(Path(folder, "README.md"))


def test_training_goes_on_where_it_stopped(tmp_path, family, prompt_type):
    def step(model, optimizer):
        optimizer.zero_grad()
        loss = model(**make_batch()).loss
        loss.backward()
        optimizer.step()
        return loss.item()

    def sgd(model):
        return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)

    model = build_unlearner(family, prompt_type, torch.float32)
    optimizer = sgd(model)
    step(model, optimizer)
    model.save_pretrained(str(tmp_path / "adapter"))
    expected = [step(model, optimizer) for _ in range(3)]
    again = SoftPromptUnlearner.from_pretrained(build(family), str(tmp_path / "adapter"), is_trainable=True)
    optimizer = sgd(again)
    assert [step(again, optimizer) for _ in range(3)] == expected
    assert len(set(expected)) == 3


def test_prefix_tuning_with_a_projection_trains_on_too(tmp_path):
    base = build("llama")
    config = PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4, prefix_projection=True, encoder_hidden_size=8
    )
    model = SoftPromptUnlearner(base, config)
    model.save_pretrained(str(tmp_path))
    loss = model(**make_batch()).loss.item()
    again = SoftPromptUnlearner.from_pretrained(build("llama"), str(tmp_path), is_trainable=True)
    assert again(**make_batch()).loss.item() == loss


def test_p_tuning_saved_by_plain_peft_can_be_used_but_not_trained_on(tmp_path, batch):
    model = build_unlearner("llama", "p_tuning", torch.float32)
    expected = model.eval()(**batch).logits
    model.save_pretrained(str(tmp_path))
    (tmp_path / "prompt_encoder.safetensors").unlink()
    (tmp_path / "spul_config.json").unlink()
    torch.testing.assert_close(
        SoftPromptUnlearner.from_pretrained(build("llama"), str(tmp_path))(**batch).logits, expected
    )
    with pytest.raises(ValueError, match=r"no prompt_encoder.safetensors.*is_trainable=False, or save with spul"):
        SoftPromptUnlearner.from_pretrained(build("llama"), str(tmp_path), is_trainable=True)


def test_a_live_p_tuning_prompt_is_restored_with_its_encoder(tmp_path, prompt_type, batch):
    model = build_unlearner("llama", prompt_type, torch.float32)
    model.save_pretrained(str(tmp_path))
    expected = model(**batch).logits
    with torch.no_grad():
        for p in model.prompt_encoder.parameters():
            p.add_(0.5)
    assert not torch.allclose(model(**batch).logits, expected)
    model.load_adapter(str(tmp_path), "default", is_trainable=True)
    torch.testing.assert_close(model(**batch).logits, expected, rtol=0, atol=0)


def test_the_loss_comes_back_and_a_homemade_one_must_be_given(tmp_path):
    loss = UnlearningLoss(alpha=0.1, beta=0.7, kl=KLDivergence(direction="forward"), retain=CrossEntropy("mean"))
    saved(tmp_path, "llama", "prompt_tuning", loss=loss)
    folder = str(tmp_path / "adapter")
    assert SoftPromptUnlearner.from_pretrained(build("llama"), folder).loss == loss

    class Mine(LossTerm):
        def token_losses(self, logits, labels, reference_logits=None):
            return -logits.sum(-1)

    saved(tmp_path, "llama", "prompt_tuning", loss=UnlearningLoss(forget=Mine()))
    SoftPromptUnlearner.from_pretrained(build("llama"), folder)
    with pytest.raises(ValueError, match=r"uses the term 'test_checkpoint\..*Mine'"):
        SoftPromptUnlearner.from_pretrained(build("llama"), folder, is_trainable=True)
    given = UnlearningLoss(forget=Mine())
    assert SoftPromptUnlearner.from_pretrained(build("llama"), folder, is_trainable=True, loss=given).loss is given


def test_a_prompt_under_a_term_with_weights_in_a_tensor_is_saved_with_them(tmp_path):
    @dataclass(frozen=True)
    class Weighted(CrossEntropy):
        weights: torch.Tensor = field(default_factory=lambda: torch.tensor([0.5, 2.0]))

    saved(tmp_path, "llama", "prompt_tuning", loss=UnlearningLoss(forget=Weighted()))
    record = json.loads((tmp_path / "adapter" / "spul_config.json").read_text())
    assert record["loss"]["forget"]["weights"] == [0.5, 2.0]


def test_a_base_of_another_width_or_depth_raises(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    for prompt_type, change in (("prompt_tuning", {"hidden_size": 64}), ("prefix_tuning", {"num_hidden_layers": 3})):
        _, folder = saved(tmp_path, "llama", prompt_type)
        config = {**build("llama").config.to_dict(), **change}
        config.pop("head_dim")
        with pytest.raises(ValueError, match=r"does not fit this base.*Load it on the model it was trained for"):
            SoftPromptUnlearner.from_pretrained(LlamaForCausalLM(LlamaConfig(**config)), folder)


def test_other_weights_warn_and_the_same_do_not(tmp_path):
    _, folder = saved(tmp_path, "llama", "prompt_tuning")
    other = build("llama")
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.mul_(1.5)
    with pytest.warns(UserWarning, match=r"trained on other weights.*evaluate before you rely on it"):
        SoftPromptUnlearner.from_pretrained(other, folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        SoftPromptUnlearner.from_pretrained(build("llama"), folder)


def test_other_adapters_and_pickles_are_refused(tmp_path):
    from peft import LoraConfig, get_peft_model

    get_peft_model(build("llama"), LoraConfig(task_type="CAUSAL_LM")).save_pretrained(str(tmp_path / "lora"))
    with pytest.raises(TypeError, match="holds a LoraConfig adapter, not a soft prompt"):
        SoftPromptUnlearner.from_pretrained(build("llama"), str(tmp_path / "lora"))
    model, folder = saved(tmp_path, "llama", "prompt_tuning")
    with pytest.raises(ValueError, match="safetensors only"):
        model.save_pretrained(str(tmp_path / "pickled"), safe_serialization=False)
    state = {"prompt_embeddings": model.prompt_encoder["default"].embedding.weight.data}
    Path(folder, "adapter_model.safetensors").unlink()
    torch.save(state, Path(folder, "adapter_model.bin"))
    with pytest.raises(ValueError, match="loads safetensors only"):
        SoftPromptUnlearner.from_pretrained(build("llama"), folder)
    with pytest.raises(ValueError, match="loads safetensors only"):
        model.load_adapter(folder, "default")
    with pytest.raises(ValueError, match="loads safetensors only"):
        model.load_adapter(folder, "second")
    assert list(model.peft_config) == ["default"]
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file; pass a folder"):
        model.save_pretrained(str(tmp_path / "file"))


def test_several_prompts_are_saved_each_in_its_folder(tmp_path, batch):
    model = build_unlearner("llama", "prompt_tuning", torch.float32)
    model.add_adapter("second", CONFIGS["prompt_tuning"]())
    model.set_adapter("second")
    expected = model.eval()(**batch).logits
    model.save_pretrained(str(tmp_path))
    again = SoftPromptUnlearner.from_pretrained(build("llama"), str(tmp_path / "second"))
    torch.testing.assert_close(again(**batch).logits, expected)
    again.load_adapter(str(tmp_path), "first")
    again.set_adapter("first")
    model.set_adapter("default")
    torch.testing.assert_close(again(**batch).logits, model(**batch).logits)
    assert not any(p.requires_grad for p in again.parameters())


def test_push_to_hub_uploads_the_whole_folder(tmp_path, monkeypatch):
    uploaded = {}

    class Api:
        def __init__(self, *args, **kwargs):
            pass

        def __getattr__(self, name):
            def call(*args, **kwargs):
                if name in ("upload_folder", "create_commit"):
                    uploaded[name] = kwargs
                    operations = kwargs.get("operations", [])
                    uploaded["files"] = {operation.path_in_repo for operation in operations}
                    if folder := kwargs.get("folder_path"):
                        uploaded["files"] = set(os.listdir(folder))
                from types import SimpleNamespace

                return SimpleNamespace(repo_id="me/forget", url="", oid="")

            return call

    import transformers.utils.hub as hub

    for name in ("HfApi", "hf_api", "create_repo", "create_commit"):
        if hasattr(hub, name):
            fake = Api() if name in ("create_repo", "create_commit") else Api
            monkeypatch.setattr(hub, name, getattr(fake, name) if name.startswith("create") else fake)
    unlearner = build_unlearner("llama", "prompt_tuning", torch.float32)
    unlearner.push_to_hub("me/forget")
    assert unlearner.spul_config.name == "me/forget"  # in a report; not the scratch folder
    wanted = {"adapter_config.json", "adapter_model.safetensors", "spul_config.json", "README.md"}
    assert wanted <= {Path(name).name for name in uploaded["files"]}


def test_a_process_killed_while_it_saves_leaves_files_that_load(tmp_path, batch, monkeypatch):
    """Copies of the folder at every move of a save that replaces it: each is what SIGKILL would leave there."""
    model, folder = saved(tmp_path / "saved", "llama", "p_tuning")
    before = model.eval()(**batch).logits
    copies, really = [], os.replace

    def replace(*args):
        copies.append(shutil.copytree(folder, tmp_path / f"killed-{len(copies)}"))
        return really(*args)

    with torch.no_grad():
        model.prompt_encoder["default"].embedding.weight.add_(1.0)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        model.save_pretrained(folder)
    after = model(**batch).logits
    assert len(copies) >= 3  # moves of the weights, the encoder and the record
    for i, copy in enumerate(copies):
        assert all(path.stat().st_size > 0 for path in copy.rglob("*") if path.is_file())
        record = json.loads((copy / "spul_config.json").read_text())
        is_older = file_digest(copy / "adapter_model.safetensors") != record["weights_sha256"]
        with pytest.warns(UserWarning, match="is older than") if is_older else nullcontext():
            loaded = SoftPromptUnlearner.from_pretrained(build("llama"), str(copy), is_trainable=i == 0)
        found = loaded(**batch).logits
        assert any(
            torch.allclose(found, whole, rtol=1e-4, atol=1e-5) for whole in ([before, after] if i else [before])
        )


def test_a_plain_prompt_of_peft_loads(tmp_path, batch):
    from peft import get_peft_model

    plain = get_peft_model(build("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    plain.save_pretrained(str(tmp_path))
    ours = SoftPromptUnlearner.from_pretrained(build("llama"), str(tmp_path), is_trainable=True)
    torch.testing.assert_close(ours(**batch).logits, plain.eval()(**batch).logits)
    ours(**make_batch()).loss.backward()


def test_a_stale_encoder_is_neither_left_nor_mixed_with_another_prompt(tmp_path):
    _, folder = saved(tmp_path, "llama", "p_tuning")
    encoder = Path(folder, "prompt_encoder.safetensors").read_bytes()
    used = SoftPromptUnlearner.from_pretrained(build("llama"), folder)
    with torch.no_grad():
        used.prompt_encoder["default"].embedding.weight.add_(1.0)
    used.save_pretrained(folder)
    assert "prompt_encoder.safetensors" not in os.listdir(folder)
    Path(folder, "prompt_encoder.safetensors").write_bytes(encoder)
    with pytest.raises(ValueError, match=r"does not belong to the adapter_model\.safetensors"):
        SoftPromptUnlearner.from_pretrained(build("llama"), folder, is_trainable=True)


def test_a_prompt_trained_on_elsewhere_records_its_new_base(tmp_path):
    _, folder = saved(tmp_path, "llama", "prompt_tuning")
    other = build("llama")
    with torch.no_grad():
        other.lm_head.weight.mul_(1.5)
    with pytest.warns(UserWarning, match="other weights"):
        again = SoftPromptUnlearner.from_pretrained(other, folder, is_trainable=True)
    again.save_pretrained(folder)
    assert json.loads(Path(folder, "spul_config.json").read_text())["base_fingerprint"] == fingerprint(other)


def test_load_adapter_checks_the_base_and_keeps_each_prompts_record(tmp_path):
    one = build_unlearner("llama", "prompt_tuning", torch.float32, loss=UnlearningLoss(alpha=0.25))
    one.spul_config.generic_completions = [" one"]
    one.save_pretrained(str(tmp_path / "one" / "inner"))
    two = build_unlearner("llama", "prompt_tuning", torch.float32)
    two.spul_config.generic_completions = [" two"]
    two.load_adapter(str(tmp_path / "one"), "other", subfolder="inner")
    two.save_pretrained(str(tmp_path / "both"))
    records = [json.loads((tmp_path / "both" / place / "spul_config.json").read_text()) for place in (".", "other")]
    assert [r["generic_completions"] for r in records] == [[" two"], [" one"]]
    assert [r["loss"]["alpha"] for r in records] == [1.0, 0.25]
    wide = SoftPromptUnlearner(build("llama", hidden_size=64), CONFIGS["prompt_tuning"]())
    with pytest.raises(ValueError, match="does not fit this base"):
        wide.load_adapter(str(tmp_path / "one" / "inner"), "narrow")
    with torch.no_grad():
        two.get_base_model().lm_head.weight.mul_(1.5)
    with pytest.warns(UserWarning, match="trained on other weights"):
        two.load_adapter(str(tmp_path / "one" / "inner"), "third")
    two.delete_adapter("default")
    assert set(two.spul_configs) == {"other", "third"}


def test_a_prefix_on_a_family_whose_layers_differ_in_width_is_loaded_as_it_was_saved(tmp_path):
    gemma4 = pytest.importorskip("transformers.models.gemma4")
    layers = {"head_dim": 8, "global_head_dim": 16, "layer_types": ["sliding_attention", "full_attention"]}
    shape = {"vocab_size_per_layer_input": 120, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0}
    config = gemma4.Gemma4TextConfig(**SHAPE, **layers, **shape, num_key_value_heads=2, intermediate_size=48)
    torch.manual_seed(0)
    base = gemma4.Gemma4ForCausalLM(config).eval()
    unlearner = SoftPromptUnlearner(base, CONFIGS["prefix_tuning"]()).eval()
    ids = torch.randint(5, 120, (1, 7))
    with torch.no_grad():
        expected = unlearner(input_ids=ids).logits
        unlearner.save_pretrained(str(tmp_path))
        loaded = SoftPromptUnlearner.from_pretrained(deepcopy(base), tmp_path)
        assert torch.equal(loaded(input_ids=ids).logits, expected)
        plain = PeftModel.from_pretrained(deepcopy(base), str(tmp_path)).eval()
        torch.testing.assert_close(plain(input_ids=ids).logits, expected)
        assert not torch.allclose(base(input_ids=ids).logits, expected)
