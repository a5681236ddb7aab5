"""Damaged, foreign and hostile adapter folders: refused before anything changes, and nothing of others is fetched."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from helpers import CONFIGS, build, build_unlearner, make_batch, make_tokenizer, state_of
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, inject_adapter_in_model
from safetensors.torch import load_file, save_file

from spul import SoftPromptUnlearner
from spul.prompts import checkpoint

IDS = make_batch()["input_ids"]
HUGE = 2 * 10**7


def rewrite(path, **fields):
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, **fields}))


def retensor(folder, change):
    """Other weights under a record without a digest, so that not the digest is what refuses them."""
    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)
    rewrite(folder / "spul_config.json", weights_sha256=None)


def with_value(state, value):
    state["prompt_embeddings"][1, 2] = value
    return state


DAMAGES = {
    "other keys": lambda f: retensor(f, lambda s: {"other": s["prompt_embeddings"]}),
    "one key more": lambda f: retensor(f, lambda s: {**s, "other": torch.zeros(1)}),
    "other shape": lambda f: retensor(f, lambda s: {"prompt_embeddings": s["prompt_embeddings"][1:].clone()}),
    "NaN": lambda f: retensor(f, lambda s: with_value(s, float("nan"))),
    "infinite": lambda f: retensor(f, lambda s: with_value(s, -float("inf"))),
    "int8": lambda f: retensor(f, lambda s: {k: v.to(torch.int8) for k, v in s.items()}),
    "bool": lambda f: retensor(f, lambda s: {k: v.bool() for k, v in s.items()}),
    "complex": lambda f: retensor(f, lambda s: {k: v.to(torch.complex64) for k, v in s.items()}),
    "half the bytes": lambda f: (f / "adapter_model.safetensors").write_bytes(
        (f / "adapter_model.safetensors").read_bytes()[:200]
    ),
    "no weights": lambda f: (f / "adapter_model.safetensors").unlink(),
    "no config": lambda f: (f / "adapter_config.json").unlink(),
    "config no JSON": lambda f: (f / "adapter_config.json").write_text("{"),
    "config a list": lambda f: (f / "adapter_config.json").write_text("[]"),
    "config empty": lambda f: (f / "adapter_config.json").write_text("{}"),
    "unknown type": lambda f: rewrite(f / "adapter_config.json", peft_type="OTHER"),
    "type a list": lambda f: rewrite(f / "adapter_config.json", peft_type=[]),
    "other task": lambda f: rewrite(f / "adapter_config.json", task_type="SEQ_CLS"),
    "modules beside": lambda f: rewrite(f / "adapter_config.json", modules_to_save=["lm_head"]),
    "base no text": lambda f: rewrite(f / "adapter_config.json", base_model_name_or_path=[1]),
    "record no JSON": lambda f: (f / "spul_config.json").write_text("{"),
    "record wrong": lambda f: rewrite(f / "spul_config.json", metrics=5),
    "later format": lambda f: rewrite(f / "spul_config.json", format_version=99),
    **{
        f"{name} {value!r}": lambda f, name=name, value=value: rewrite(f / "adapter_config.json", **{name: value})
        for name in ("num_virtual_tokens", "num_transformer_submodules", "token_dim")
        for value in (HUGE, -1, 0, 2.0, "5", True, [], {"a": 1})
        if (name, value) != ("num_transformer_submodules", True)  # is 1
    },
}


@pytest.fixture
def folder(tmp_path):
    build_unlearner("llama", "prompt_tuning", torch.float32).save_pretrained(str(tmp_path / "adapter"))
    return tmp_path / "adapter"


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_refused_and_changes_neither_model_nor_base(folder, damage):
    live = build_unlearner("llama", "prompt_tuning", torch.float32, seed=4).train()
    used = SoftPromptUnlearner.from_pretrained(build("llama"), folder).train()
    base = build("llama").train()
    DAMAGES[damage](folder)
    cases = (
        (base, lambda: SoftPromptUnlearner.from_pretrained(base, folder)),
        (base, lambda: SoftPromptUnlearner.from_pretrained(base, folder, is_trainable=True)),
        (live, lambda: live.load_adapter(folder, "second")),
        (live, lambda: live.load_adapter(folder, "default", is_trainable=True)),
        (used, lambda: used.load_adapter(folder, "default")),
    )
    for model, load in cases:
        before = state_of(model)
        with pytest.raises((ValueError, TypeError)) as error:
            load()
        assert isinstance(error.value, ValueError) or "soft prompt" in str(error.value) or "peft_config" in str(error)
        assert state_of(model) == before


@pytest.mark.parametrize("prompt_type", ["p_tuning", "prefix_tuning"])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("encoder_hidden_size", 10**9),
        ("encoder_hidden_size", 2**70),
        ("encoder_hidden_size", -3),
        ("num_layers", 10**9),
        ("num_attention_heads", 0),
    ],
)
def test_no_size_in_a_config_is_believed_before_the_weights_are_looked_at(tmp_path, prompt_type, name, value):
    model = (
        SoftPromptUnlearner(
            build("llama"),
            PrefixTuningConfig(
                task_type="CAUSAL_LM", num_virtual_tokens=4, prefix_projection=True, encoder_hidden_size=8
            ),
        )
        if prompt_type == "prefix_tuning"
        else build_unlearner("llama", prompt_type, torch.float32)
    )
    model.save_pretrained(str(tmp_path))
    rewrite(tmp_path / "adapter_config.json", **{name: value})
    if prompt_type == "p_tuning" and not name.startswith("encoder"):
        SoftPromptUnlearner.from_pretrained(build("llama"), tmp_path, is_trainable=True)  # it does not count there
        return
    with pytest.raises(
        ValueError, match=r"does not fit the adapter_config\.json|expected an? (integer|whole)|PEFT cannot"
    ):
        SoftPromptUnlearner.from_pretrained(build("llama"), tmp_path, is_trainable=True)


@pytest.mark.parametrize("layers", [10**9, 3, 0, "2", 2.5])
def test_the_depth_of_an_lstm_encoder_is_that_of_its_file(tmp_path, layers):
    from peft import PromptEncoderConfig

    config = PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_reparameterization_type="LSTM", encoder_hidden_size=8
    )
    SoftPromptUnlearner(build("llama"), config).save_pretrained(str(tmp_path))
    SoftPromptUnlearner.from_pretrained(build("llama"), tmp_path, is_trainable=True)
    rewrite(tmp_path / "adapter_config.json", encoder_num_layers=layers)
    with pytest.raises(ValueError, match=r"does not fit the adapter_config\.json|encoder_num_layers is"):
        SoftPromptUnlearner.from_pretrained(build("llama"), tmp_path, is_trainable=True)


def test_every_flipped_bit_of_the_weights_is_noticed(folder):
    path = folder / "adapter_model.safetensors"
    whole = path.read_bytes()
    for place in range(0, len(whole), 11):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << place % 8
        path.write_bytes(flipped)
        with pytest.raises(ValueError, match=r"SHA-256|whole safetensors|does not fit|floating"):
            checkpoint.read(folder, with_encoder=False)
    path.write_bytes(whole)
    checkpoint.read(folder, with_encoder=False)


def test_another_prompts_weights_under_a_record_are_refused_and_older_records_accepted(tmp_path, folder):
    build_unlearner("llama", "prompt_tuning", torch.float32, seed=9).save_pretrained(str(tmp_path / "other"))
    weights = (tmp_path / "other" / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(weights)
    with pytest.raises(ValueError, match=r"weights_sha256 in spul_config\.json is .* not those that the record"):
        SoftPromptUnlearner.from_pretrained(build("llama"), folder)
    record = json.loads((folder / "spul_config.json").read_text())
    for name in ("weights_sha256", "format_version"):  # as versions before this one wrote it
        del record[name]
    (folder / "spul_config.json").write_text(json.dumps(record))
    loaded = SoftPromptUnlearner.from_pretrained(build("llama"), folder)
    expected = load_file(tmp_path / "other" / "adapter_model.safetensors")["prompt_embeddings"]
    assert torch.equal(loaded.prompt_encoder["default"].embedding.weight, expected)


def test_a_second_save_leaves_a_record_of_its_own_weights_alone(folder):
    build_unlearner("llama", "prompt_tuning", torch.float32, seed=9).save_pretrained(str(folder))
    record = json.loads((folder / "spul_config.json").read_text())
    assert "replaced_weights_sha256" not in record
    assert record["format_version"] == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        SoftPromptUnlearner.from_pretrained(build("llama"), folder)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "encoder_reparameterization_type",
            None,
            r"the encoder that adapter_config\.json describes: .* not recognized",
        ),
        (
            "encoder_reparameterization_type",
            "GRU",
            r"the encoder that adapter_config\.json describes: .* not recognized",
        ),
        ("encoder_dropout", float("nan"), r"encoder_dropout is nan; expected a number from 0 to 1"),
        ("encoder_dropout", "0", r"encoder_dropout is '0'; expected"),
        ("encoder_dropout", None, r"encoder_dropout is None; expected"),
    ],
)
def test_an_encoder_that_cannot_be_built_is_refused_by_its_field(tmp_path, name, value, message):
    build_unlearner("llama", "p_tuning", torch.float32).save_pretrained(str(tmp_path))
    rewrite(tmp_path / "adapter_config.json", **{name: value})
    with pytest.raises(ValueError, match=message):
        SoftPromptUnlearner.from_pretrained(build("llama"), tmp_path, is_trainable=True)


def test_a_loss_that_is_not_known_is_refused_by_its_field_where_it_is_needed(folder):
    record = json.loads((folder / "spul_config.json").read_text())
    for forget in ({"type": "Other"}, {"type": "NPO", "other": 1}, {"type": "NPO", "inverse_temperature": "x"}):
        rewrite(folder / "spul_config.json", loss={**record["loss"], "forget": forget})
        base = build("llama").train()
        before = state_of(base)
        with pytest.raises(ValueError, match=r"loss in spul_config\.json of '.*adapter':"):
            SoftPromptUnlearner.from_pretrained(base, folder, is_trainable=True)
        assert state_of(base) == before
        SoftPromptUnlearner.from_pretrained(base, folder)  # for inference no loss is needed


def test_an_encoder_of_another_prompt_leaves_a_live_one_as_it_was(tmp_path):
    for seed in (1, 2):
        build_unlearner("llama", "p_tuning", torch.float32, seed=seed).save_pretrained(str(tmp_path / str(seed)))
    name = "prompt_encoder.safetensors"
    (tmp_path / "1" / name).write_bytes((tmp_path / "2" / name).read_bytes())
    live = build_unlearner("llama", "p_tuning", torch.float32, seed=3)
    before = state_of(live)
    with pytest.raises(ValueError, match="does not belong to"):
        live.load_adapter(tmp_path / "1", "default", is_trainable=True)
    assert state_of(live) == before


def test_a_base_that_does_not_fit_is_left_alone(folder):
    wide = build("llama", hidden_size=64).train()
    before = state_of(wide)
    with pytest.raises(ValueError, match="does not fit this base"):
        SoftPromptUnlearner.from_pretrained(wide, folder)
    assert state_of(wide) == before


def test_a_prompt_of_another_kind_is_not_loaded_over_one(tmp_path, folder):
    live = build_unlearner("llama", "p_tuning", torch.float32)
    before = state_of(live)
    for name, message in (("default", "is P_TUNING"), ("second", "one model holds prompts of one kind")):
        with pytest.raises(ValueError, match=message):
            live.load_adapter(folder, name)
    assert state_of(live) == before
    with pytest.raises(TypeError, match=r"unknown arguments \['key_mapping'\]"):
        live.load_adapter(folder, "second", key_mapping={})
    with pytest.raises(ValueError, match="'second' is not in this model"):
        live.load_adapter(folder, "second", is_trainable=True)


def test_a_construction_that_fails_leaves_the_base_as_it_was():
    base = build("llama").train()
    base.gradient_checkpointing_enable()
    before = state_of(base)
    with pytest.raises(ValueError, match="modules_to_save"):
        SoftPromptUnlearner(
            base, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, modules_to_save=["lm_head"])
        )
    assert state_of(base) == before
    unlearner = build_unlearner("llama", "prompt_tuning", torch.float32)
    before = state_of(unlearner)
    with pytest.raises(ValueError, match="modules_to_save"):
        unlearner.add_adapter("b", PromptTuningConfig(num_virtual_tokens=2, modules_to_save=["lm_head"]))
    assert state_of(unlearner) == before


def test_lora_layers_inside_a_base_are_refused(folder):
    base = build("llama")
    inject_adapter_in_model(LoraConfig(target_modules=["q_proj"], init_lora_weights=False), base)
    for load in (
        lambda: SoftPromptUnlearner(base, CONFIGS["prompt_tuning"]()),
        lambda: SoftPromptUnlearner.from_pretrained(base, folder),
    ):
        with pytest.raises(TypeError, match=r"layers inside, such as 'model\.layers\.0.*merge_and_unload"):
            load()


# ---- what an adapter names ----


def text_started(tmp_path):
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    config = PromptTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=4,
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text="the review",
        tokenizer_name_or_path=str(tmp_path / "tokenizer"),
    )
    model = SoftPromptUnlearner(build("llama"), config)
    model.save_pretrained(str(tmp_path / "adapter"))
    return model, tmp_path / "adapter"


@pytest.mark.parametrize("is_trainable", [False, True])
def test_the_tokenizer_that_an_adapter_names_is_not_fetched(tmp_path, monkeypatch, is_trainable):
    import transformers

    model, folder = text_started(tmp_path)
    options = {"tokenizer_name_or_path": "somebody/else", "tokenizer_kwargs": {"trust_remote_code": True}}
    rewrite(folder / "adapter_config.json", **options)

    def fetch(*args, **kwargs):
        raise AssertionError("a tokenizer was fetched")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", fetch)
    again = SoftPromptUnlearner.from_pretrained(build("llama"), folder, is_trainable=is_trainable)
    expected = model.prompt_encoder["default"].embedding.weight
    assert torch.equal(again.prompt_encoder["default"].embedding.weight, expected)
    again.load_adapter(folder, "second")
    again.save_pretrained(str(tmp_path / "again"))
    SoftPromptUnlearner.from_pretrained(build("llama"), tmp_path / "again", is_trainable=is_trainable)


def test_no_path_of_the_users_machine_is_in_any_file(tmp_path):
    build("llama").save_pretrained(tmp_path / "secret" / "my-base")
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tmp_path / "secret" / "my-base")
    make_tokenizer().save_pretrained(tmp_path / "secret" / "my-tokenizer")
    config = PromptTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=4,
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text="the review",
        tokenizer_name_or_path=str(tmp_path / "secret" / "my-tokenizer"),
    )
    SoftPromptUnlearner(base, config).save_pretrained(str(tmp_path / "adapter"))
    for path in (tmp_path / "adapter").iterdir():
        assert b"secret" not in path.read_bytes(), path.name
        assert str(tmp_path).encode() not in path.read_bytes(), path.name
    for name in ("spul_config.json", "adapter_config.json"):
        assert json.loads((tmp_path / "adapter" / name).read_text())["base_model_name_or_path"] == "my-base"


def test_all_files_of_a_folder_have_the_same_permissions(folder):
    (folder.parent / "ordinary").touch()
    expected = (folder.parent / "ordinary").stat().st_mode
    assert {path.name: path.stat().st_mode for path in Path(folder).iterdir() if path.stat().st_mode != expected} == {}
