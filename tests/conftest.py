"""Tiny random models of real families, and a tokenizer, all built here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import spul.data.sources
import spul.evaluation.aggregation
import spul.training.reference

torch.set_num_threads(1)  # tiny models, and pytest -n 2 has one core a worker


@pytest.fixture(autouse=True, scope="session")
def cache_home(tmp_path_factory):
    """Cached references go to a folder of the tests' own, also in the processes that they start."""
    home = str(tmp_path_factory.mktemp("hf_home"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", home)
        patch.setattr(spul.training.reference, "HF_HOME", home)
        yield home


VOCABULARY = 120
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 96,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def build_llama(hidden_size: int = 32):
    shape = {**SHAPE, "hidden_size": hidden_size}
    config = LlamaConfig(**shape, intermediate_size=hidden_size * 2, num_key_value_heads=2, attention_dropout=0.1)
    return LlamaForCausalLM(config)


def build_opt():
    config = OPTConfig(**SHAPE, ffn_dim=48, word_embed_proj_dim=32, dropout=0.1, attention_dropout=0.1, layerdrop=0.2)
    return OPTForCausalLM(config)


def build_gpt2():
    shape = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 96}
    tokens = {key: SHAPE[key] for key in ("pad_token_id", "bos_token_id", "eos_token_id")}
    return GPT2LMHeadModel(GPT2Config(**shape, **tokens))


def build_qwen3():
    return Qwen3ForCausalLM(Qwen3Config(**SHAPE, intermediate_size=48, num_key_value_heads=2, head_dim=16))


def build_gemma3(sliding_window: int = 64):
    config = Gemma3TextConfig(
        **SHAPE,
        intermediate_size=48,
        num_key_value_heads=1,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=sliding_window,
        layer_types=["sliding_attention", "full_attention"],
        final_logit_softcapping=5.0,
    )
    return Gemma3ForCausalLM(config)


def build_neox():
    config = GPTNeoXConfig(**SHAPE, intermediate_size=48, hidden_dropout=0.1, attention_dropout=0.1)
    return GPTNeoXForCausalLM(config)


def build_mistral(sliding_window: int = 6):
    config = MistralConfig(**SHAPE, intermediate_size=48, num_key_value_heads=2, sliding_window=sliding_window)
    return MistralForCausalLM(config)


FAMILIES = {
    "llama": build_llama,
    "opt": build_opt,
    "gpt2": build_gpt2,
    "qwen3": build_qwen3,
    "gemma3": build_gemma3,
    "gpt_neox": build_neox,
}


def build(family: str, dtype: torch.dtype = torch.float32, **kwargs):
    torch.manual_seed(0)
    builder = {**FAMILIES, "mistral": build_mistral}[family]
    model = builder(**kwargs)
    with torch.no_grad():
        for parameter in model.parameters():
            # Wider than the usual 0.02, so that a prompt makes a difference that a test can see.
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype).eval()


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of 120 pieces: words of several tokens, no pad token."""
    return make_tokenizer()


def make_tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    from tokenizers import decoders

    core.decoder = decoders.ByteLevel()
    words = "the review is positive negative neutral unknown of film good bad plot about jane doe text sentiment"
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<pad>", "<s>", "</s>", "<unk>"], show_progress=False
    )
    core.train_from_iterator([words, " " + words, "### text: \n abcdefghijklmnopqrstuvwxyz 0123456789 .,"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def run_script(script: Path, *arguments: object, processes: int = 1) -> None:
    """Run a Python script with this folder and some arguments, in one process or several that know of each other."""
    if processes > 1:  # threads of torch.distributed can abort an interpreter that has done its work and ends
        text = script.read_text() + "\nimport os\n\nos._exit(0)\n"
        script = script.with_name(f"{processes}_{script.name}")
        script.write_text(text)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *(launcher if processes > 1 else []), str(script), str(Path(__file__).parent)]
    command += [str(argument) for argument in arguments]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture
def hub(monkeypatch):
    """What the Hub has: (name, configuration, split) -> rows; anything else is an error."""
    sets: dict[tuple[str, str | None, str], list[dict]] = {}
    monkeypatch.setattr(
        spul.data.sources, "load_dataset", lambda name, config, *, split: Dataset.from_list(sets[name, config, split])
    )
    return sets


@pytest.fixture
def few_resamples(monkeypatch):
    """For evaluations whose intervals are not looked at: these have tests of their own."""
    monkeypatch.setattr(spul.evaluation.aggregation, "NUM_RESAMPLES", 20)
