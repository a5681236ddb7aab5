"""A base whose weights wait on disk or in memory, embeddings too, trains, saves and reloads as a whole one."""

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from helpers import (
    CONFIGS,
    assert_same,
    build,
    make_batch,
    make_collator,
    make_dataset,
    make_tokenizer,
    make_trainer,
    prompt_gradients,
    prompt_state,
    rows,
    scored,
)
from peft import PromptTuningConfig
from small_evaluations import measured
from transformers import AutoModelForCausalLM

from spul import SoftPromptUnlearner
from spul.evaluation.metrics import gradient_norm_attack
from spul.models.causal_lm import decoder_layers
from spul.models.compat_devices import device_of, is_offloaded
from spul.prompts.starts import InstructionStart

STEPS = {"max_steps": 2, "optim": "sgd", "max_grad_norm": 0.5, "weight_decay": 0.0, "learning_rate": 0.1}
STEPS |= {"save_strategy": "steps", "save_steps": 1, "reference": "live"}
MAP = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
MAP |= {"model.layers.0": "disk", "model.layers.1": "disk"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    build("llama").save_pretrained(folder)
    return folder


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)


def offloaded(folder, offload, how="layers"):
    """A base with layers on disk; with its embeddings there, too; or with all of its weights in memory, or on disk."""
    if how in ("all in memory", "all on disk"):
        model, cpu = load(folder), torch.device("cpu")
        model = cpu_offload(model, cpu) if how == "all in memory" else disk_offload(model, str(offload), cpu)
    else:
        apart = {"model.embed_tokens": "disk", "lm_head": "disk"} if how == "embeddings" else {}
        model = load(folder, device_map=MAP | apart, offload_folder=offload)
    assert next(decoder_layers(model)[0].parameters()).is_meta
    assert model.get_input_embeddings().weight.is_meta == (how != "layers")
    return model


def trained(base, prompt_type, folder, resume=None):
    torch.manual_seed(1)
    unlearner = SoftPromptUnlearner(base, CONFIGS[prompt_type]())
    trainer = make_trainer(folder, unlearner=unlearner, **STEPS)
    trainer.train(resume)
    return unlearner


@pytest.mark.parametrize("how", ["layers", "embeddings", "all in memory"])
@pytest.mark.parametrize("prompt_type", CONFIGS)
def test_an_offloaded_base_makes_the_steps_of_a_whole_one(saved, tmp_path, prompt_type, how):
    whole = trained(load(saved), prompt_type, tmp_path / "whole")
    other = trained(offloaded(saved, tmp_path / "disk", how), prompt_type, tmp_path / "other")
    assert_same(prompt_state(whole), prompt_state(other), rtol=0, atol=1e-5)
    checkpoint = tmp_path / "other" / "checkpoint-1"
    resumed = trained(offloaded(saved, tmp_path / "disk", how), prompt_type, tmp_path / "other", str(checkpoint))
    assert_same(prompt_state(other), prompt_state(resumed), rtol=0, atol=1e-6)
    loaded = SoftPromptUnlearner.from_pretrained(
        offloaded(saved, tmp_path / "disk", how), tmp_path / "other" / "checkpoint-2", is_trainable=True
    )
    assert_same(prompt_state(other), prompt_state(loaded), rtol=0, atol=0)
    assert scored(loaded, rows("jane", 5)) == pytest.approx(scored(whole, rows("jane", 5)), abs=1e-4)


@pytest.mark.parametrize(
    ("family", "how"),
    [("gemma3", "embeddings"), ("gemma3", "all on disk"), ("opt", "all on disk"), ("gpt2", "all in memory")],
)
@pytest.mark.parametrize("prompt_type", CONFIGS)
def test_loss_gradient_and_answers_are_those_of_the_whole_base(tmp_path, prompt_type, family, how):
    build(family).save_pretrained(tmp_path)
    batch, found = make_batch(), []
    for base in (load(tmp_path), offloaded(tmp_path, tmp_path / "disk", how)):
        torch.manual_seed(1)
        unlearner = SoftPromptUnlearner(base, CONFIGS[prompt_type]())
        loss = unlearner(**batch).loss
        gradients = prompt_gradients(unlearner, loss)
        answers = unlearner.generate(batch["input_ids"][:1], max_new_tokens=4, pad_token_id=0)
        assert unlearner.device == unlearner.prompt_encoder["default"].embedding.weight.device == torch.device("cpu")
        found.append((loss, gradients, answers))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=0, atol=1e-5)
    assert_same(found[0][1], found[1][1], rtol=0, atol=1e-5)
    assert found[0][2].tolist() == found[1][2].tolist()


def test_starts_read_offloaded_embeddings_and_an_option_of_peft_that_cannot_says_so(saved, tmp_path):
    start, config = InstructionStart("review of jane doe", make_tokenizer()), CONFIGS["prompt_tuning"]
    whole, other = (SoftPromptUnlearner(one, config(), start=start) for one in (load(saved), cpu_offload(load(saved))))
    assert_same(prompt_state(whole), prompt_state(other), rtol=0, atol=0)
    peft_config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, prompt_tuning_init="SAMPLE_VOCAB")
    with pytest.raises(ValueError, match=r"SAMPLE_VOCAB.*offloaded. Leave it out, and give start="):
        SoftPromptUnlearner(offloaded(saved, tmp_path / "disk", "embeddings"), peft_config)


@pytest.mark.usefixtures("few_resamples")
def test_an_evaluation_skips_what_needs_the_weights_in_place_and_leaves_the_base_frozen(saved, tmp_path):
    torch.manual_seed(1)
    whole = SoftPromptUnlearner(load(saved), CONFIGS["prompt_tuning"]())
    torch.manual_seed(1)
    other = SoftPromptUnlearner(offloaded(saved, tmp_path / "disk"), CONFIGS["prompt_tuning"]())
    measures = ("membership", "relearning", "quantized")
    expected, found = measured(whole, "membership", "relearning"), measured(other, *measures)
    assert "offloaded" in found.skipped["quantized"]
    assert "offloaded" in found.skipped["membership by gradient norm"]
    wanted = {one.key: one.per_row for one in expected.measurements}
    assert wanted.keys() == {one.key for one in found.measurements}
    for one in found.measurements:
        assert one.per_row.keys() == wanted[one.key].keys() - {"gradient_norm"}
        for name, values in one.per_row.items():
            assert values == pytest.approx(wanted[one.key][name], abs=1e-4)
    assert [name for name, p in other.named_parameters() if p.requires_grad] == _trained(other)
    with pytest.raises(ValueError, match="are offloaded, and their gradients not kept"):
        gradient_norm_attack(other, rows("jane", 2), make_collator().encoder)


def _trained(unlearner):
    return [f"prompt_encoder.{name}" for name, _ in unlearner.prompt_encoder.named_parameters()]


def test_weights_on_the_meta_device_that_nothing_fetches_are_refused():
    base = build("llama").to("meta")
    with pytest.raises(ValueError, match=r"on the meta device, without values.*cpu_offload"):
        SoftPromptUnlearner(base, CONFIGS["prompt_tuning"]())


def test_the_device_of_a_module_is_where_its_weights_are_fetched_to():
    base = build("llama")
    assert device_of(base) == torch.device("cpu")
    assert not is_offloaded(base)
    assert device_of(base.to("meta")) == torch.device("meta")
    base = cpu_offload(build("llama"), torch.device("cpu"))
    assert base.device == torch.device("meta")
    assert device_of(base) == device_of(base.get_input_embeddings()) == torch.device("cpu")
    assert is_offloaded(base)
    with pytest.raises(ValueError, match="ReLU has no parameters"):
        device_of(torch.nn.ReLU())


def test_a_cached_reference_of_an_offloaded_base_is_refused_with_the_way_out(saved, tmp_path):
    unlearner = SoftPromptUnlearner(offloaded(saved, tmp_path / "disk"), CONFIGS["prompt_tuning"]())
    with pytest.raises(ValueError, match="reference='live'"):
        make_trainer(tmp_path, unlearner=unlearner, dataset=make_dataset(), collator=make_collator()).train()
