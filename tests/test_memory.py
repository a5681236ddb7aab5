"""The memory of a step by a config alone, and the error of a step that has too little."""

import pytest
import torch
from helpers import CONFIGS, FAMILIES, SELECTS_POSITIONS, build, make_trainer, make_unlearner
from peft import LoraConfig
from transformers import LlamaConfig

import spul
from spul.models.compat_devices import TensorMemory
from spul.training.memory import MemoryEstimate

CONFIG = LlamaConfig(
    vocab_size=300,
    hidden_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=4,
    intermediate_size=128,
    max_position_embeddings=256,
)
PARTS = ("weights", "activations", "logits", "reference", "prompt")


def estimate(config=CONFIG, batch_size=8, max_length=100, **options):
    return spul.estimate_memory(config, batch_size, max_length, **{"dtype": torch.float32, **options})


def parameters(config=CONFIG):
    layer = 4 * 64 * 64 + 3 * 64 * 128 + 2 * 64
    return 2 * 300 * 64 + 64 + 3 * layer, layer


def test_weights_are_counted_by_their_type():
    num, layer = parameters()
    buffers = estimate().weights - 4 * num
    assert 0 <= buffers < 200
    assert estimate(dtype=torch.bfloat16).weights == pytest.approx(2 * num, abs=200)
    linear = 3 * (layer - 2 * 64)
    largest = 64 * 128 * 2
    quarter = linear // 2 + 4 * (linear // 64) + 2 * (num - linear) + largest
    assert estimate(dtype=torch.bfloat16, bits=4).weights == pytest.approx(quarter, abs=200)
    assert estimate(dtype=torch.bfloat16, bits=8).weights > quarter
    sharded = estimate(processes=3)
    assert sharded.weights == pytest.approx(4 * (num - 3 * layer + layer + 2 * layer), abs=200)
    assert sharded.activations == estimate().activations


def test_of_a_sharded_base_in_4_bit_the_scales_stay_whole():
    _, layer = parameters()
    stored = (layer - 2 * 64) // 2 + 4 * 2 * 64  # and two norms in float32
    whole, sharded = (estimate(bits=4, processes=processes).weights for processes in (1, 2))
    assert sharded - whole == -3 * stored + 3 * stored // 2 + 2 * stored
    with pytest.raises(ValueError, match="bits=8, processes=2: a base in 8 bit cannot be sharded"):
        estimate(bits=8, processes=2)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_quantized_weights_are_those_of_a_loaded_base(tmp_path, family, bits):
    """GPT-2's linear maps are `Conv1D`; they are quantized, too."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    plain = build(family)
    plain.save_pretrained(tmp_path)
    quantized = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    base = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantized, dtype=torch.float32)
    linear = [m.weight for m in base.modules() if type(m).__name__ in ("Linear4bit", "Linear8bitLt")]
    assert len(linear) > 7
    scales = [weight.quant_state.absmax if bits == 4 else weight.SCB for weight in linear]
    unpacked = max(weight.nbytes * 8 // bits for weight in linear) * 4
    expected = sum(t.nbytes for t in (*base.parameters(), *base.buffers(), *scales)) + unpacked
    assert estimate(plain.config, max_length=40, bits=bits).weights == expected


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_activations_are_those_of_a_real_step(family):
    """Counted on a real step of the whole library, on tensors with values."""
    from helpers import make_batch

    unlearner = make_unlearner(family=family)
    base = unlearner.get_base_model().train()
    batch = make_batch()
    unlearner(**batch).loss.backward()  # the probe is not part of a step
    with TensorMemory(base.config.get_text_config().vocab_size, base.parameters()) as memory:
        unlearner(**batch, reference_logits=None).loss.backward()
    rows, tokens = batch["input_ids"].shape
    found = estimate(
        base.config,
        rows,
        tokens,
        prompt_config=CONFIGS["prompt_tuning"](),
        response_tokens=int((batch["labels"] != -100).sum(dim=1).max()),
        retain_rows=int((~batch["is_forget"]).sum()),
    )
    assert found.activations == pytest.approx(memory.peak, rel=0.15)


def test_a_longer_batch_needs_more_and_checkpointing_less():
    one, long, large = estimate(), estimate(max_length=200), estimate(batch_size=16)
    assert long.activations > 1.8 * one.activations < large.activations
    assert estimate(gradient_checkpointing=True, max_length=200).activations < 0.7 * long.activations


def test_logits_and_reference_grow_with_the_response():
    one, many = estimate(), estimate(response_tokens=50)
    assert many.reference == 50 * one.reference == 8 * 50 * 300 * 4
    at_all_positions = not SELECTS_POSITIONS  # as transformers below 5.21 computes them
    assert many.logits > (1 if at_all_positions else 20) * one.logits > 0
    assert estimate(reference=False).reference == 0


@pytest.mark.parametrize("prompt_type", CONFIGS)
def test_the_prompt_is_counted_with_its_gradient_and_moments(prompt_type):
    config = CONFIGS[prompt_type](7)
    base = build("llama")
    found = estimate(base.config, max_length=40, prompt_config=config)
    made = spul.SoftPromptUnlearner(base, CONFIGS[prompt_type](7))
    assert found.prompt == 16 * sum(p.numel() for p in made.prompt_encoder.parameters() if p.requires_grad)
    assert config.token_dim is None  # the caller's config is left alone


def test_a_type_may_be_given_by_its_name():
    assert estimate(dtype="bfloat16") == estimate(dtype=torch.bfloat16)


@pytest.mark.parametrize("dtype", ["auto", "int8", "Tensor", torch.int8, None])
def test_what_is_no_floating_point_type_is_refused(dtype):
    with pytest.raises(ValueError, match=r"^dtype=.*; expected torch.bfloat16, .* or such a name"):
        estimate(dtype=dtype)


def test_the_step_in_words_names_response_and_prompt():
    step = estimate(response_tokens=20, prompt_config=CONFIGS["prefix_tuning"](7)).step
    assert step == "8 rows of 100 tokens, 20 of them the response's, prefix_tuning of 7 virtual tokens, float32"


def test_the_text_names_the_parts_and_the_step():
    text = str(MemoryEstimate(2**30, 2**31, 0, 0, 2**29, "8 rows"))
    assert text.splitlines()[0] == "Memory of a step, 8 rows:"
    assert [line.split()[0] for line in text.splitlines()[1:]] == [*PARTS, "total"]
    assert text.splitlines()[-1].split()[1:] == ["3.50", "GiB"]
    small = str(MemoryEstimate(2**20, 2**21, 0, 0, 2**19, "8 rows"))
    assert small.splitlines()[-1].split()[1:] == ["3.50", "MiB"]


@pytest.mark.parametrize(
    ("options", "error", "named"),
    [
        ({"batch_size": 0}, ValueError, "batch_size=0"),
        ({"max_length": True}, ValueError, "max_length=True"),
        ({"max_length": 250}, ValueError, "256 positions; expected max_length of at most 226"),
        ({"bits": 3}, ValueError, "bits=3"),
        ({"response_tokens": 100}, ValueError, "fewer than max_length"),
        ({"retain_rows": 9}, ValueError, "retain_rows=9"),
        ({"config": {"vocab_size": 3}}, TypeError, "AutoConfig"),
        ({"prompt_config": LoraConfig()}, TypeError, "LoraConfig"),
    ],
)
def test_what_cannot_be_estimated_is_refused(options, error, named):
    with pytest.raises(error, match=named):
        estimate(**options)


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("DefaultCPUAllocator: can't allocate memory")],
)
def test_a_step_without_memory_says_what_to_lower(tmp_path, monkeypatch, error):
    trainer = make_trainer(tmp_path, max_steps=1)

    def no_room(*args, **kwargs):
        raise error

    monkeypatch.setattr(trainer, "compute_loss", no_room)
    with pytest.raises(type(error), match="per_device_train_batch_size") as raised:
        trainer.train()
    assert str(raised.value).startswith(str(error))
    assert "8 rows" in str(raised.value)
    assert raised.value.__cause__ is error


def test_other_errors_of_a_step_are_left_alone(tmp_path, monkeypatch):
    trainer, error = make_trainer(tmp_path, max_steps=1), RuntimeError("something else")
    monkeypatch.setattr(trainer, "compute_loss", lambda *args, **kwargs: (_ for _ in ()).throw(error))
    with pytest.raises(RuntimeError, match=r"^something else$"):
        trainer.train()
