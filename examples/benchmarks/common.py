"""Common parts of the benchmarks: models of real shapes with random weights, batches, alternating timing."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import nn
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    Gemma3TextConfig,
    LlamaConfig,
    OPTConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)
from transformers.integrations import replace_with_bnb_linear

from spul import ForgetRetainCollator

sys.path.append(str(Path(__file__).parents[1]))  # examples/, for its package `paper`


class Shape(NamedTuple):
    """The shape of a batch."""

    batch_size: int
    max_tokens: int  # rows have between 70 and 100 % of it, and are padded to the longest
    response_tokens: int
    forget_rows: int


# The published data sets: one-token labels, forget rows 3 % (SST-2) and 5 % (Yelp) of the rows.
SHAPES = {
    "sst2": Shape(batch_size=32, max_tokens=46, response_tokens=1, forget_rows=1),
    "yelp": Shape(batch_size=8, max_tokens=295, response_tokens=1, forget_rows=1),
    "long": Shape(batch_size=2, max_tokens=1024, response_tokens=64, forget_rows=1),
}


BEFORE_MESSAGE = 4  # tokens of a row before its message, such as those of a format's first words


def _opt(width: int, layers: int, heads: int) -> OPTConfig:
    return OPTConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        ffn_dim=4 * width,
        word_embed_proj_dim=width,
        max_position_embeddings=2048,
        vocab_size=50272,
        dropout=0.0,  # as spul sets it; all variants alike
    )


def _llama(width: int, layers: int, heads: int, ffn: int, vocab: int = 32000, tied: bool = False) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=ffn,
        vocab_size=vocab,
        max_position_embeddings=4096,
        tie_word_embeddings=tied,
    )


MODELS: dict[str, Callable[[], PretrainedConfig]] = {
    "tiny": lambda: _llama(32, 2, 2, 64, vocab=200),  # for a dry run
    "gemma-60m": lambda: Gemma3TextConfig(
        hidden_size=384,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=128,
        intermediate_size=2048,
        vocab_size=64000,
        sliding_window=128,
    ),
    "cpu-20m": lambda: _llama(384, 6, 6, 1024, vocab=24000, tied=True),
    "opt-125m": lambda: _opt(768, 12, 12),
    "opt-1.3b": lambda: _opt(2048, 24, 32),
    "llama-2-7b": lambda: _llama(4096, 32, 32, 11008),
    "llama-2-13b-nf4": lambda: _llama(5120, 40, 40, 13824),
}


def build_model(name: str, device: str, dtype: torch.dtype) -> Any:
    """A causal LM of the named shape with random weights; names ending in `-nf4` are quantized to 4 bits."""
    torch.manual_seed(0)
    config = MODELS[name]()
    if name.endswith("-nf4"):
        return build_nf4(config, device)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def build_nf4(config: PretrainedConfig, device: str) -> Any:
    """A model with random weights in NF4 and bfloat16 computation, built by layers: the 16-bit model need not fit."""
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model = replace_with_bnb_linear(model, modules_to_not_convert=["lm_head"], quantization_config=quantization)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if type(module).__name__ == "Linear4bit" and name == "weight":
                weight = 0.02 * torch.randn(
                    module.out_features, module.in_features, dtype=torch.bfloat16, device=device
                )
                made: nn.Parameter = type(parameter)(weight, requires_grad=False, quant_type="nf4").to(device)
            elif "norm" in type(module).__name__.lower():
                made = nn.Parameter(torch.ones(parameter.shape, dtype=torch.bfloat16, device=device))
            else:
                made = nn.Parameter(0.02 * torch.randn(parameter.shape, dtype=torch.bfloat16, device=device))
            setattr(module, name, made)
    rotary = type(model.model.rotary_emb)
    model.model.rotary_emb = rotary(config).to(device)
    model.is_loaded_in_4bit = True
    model.hf_quantizer = None
    return model.eval()


def prompt_config(kind: str, num_virtual_tokens: int) -> PromptTuningConfig | PromptEncoderConfig | PrefixTuningConfig:
    """PEFT's config of prompt tuning, prefix tuning, or of P-tuning with the encoder of the paper."""
    if kind == "prefix-tuning":
        return PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=num_virtual_tokens)
    if kind == "p-tuning":
        return PromptEncoderConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=num_virtual_tokens, encoder_hidden_size=128
        )
    return PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=num_virtual_tokens, prompt_tuning_init="SAMPLE_VOCAB"
    )


def make_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer with one word per token id: `t0`, `<pad>`, `<eos>`, `<unk>`, `t4`, `t5`, ...

    The special ones are found inside other words, too, so that none begins as they do.
    """
    special = {1: "<pad>", 2: "<eos>", 3: "<unk>"}
    words = {special.get(i, f"t{i}"): i for i in range(vocab_size)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>")


def make_rows(shape: Shape, vocab_size: int, num_rows: int | None = None) -> list[dict[str, Any]]:
    """Tokenized rows of random tokens; `num_rows` is the batch size unless given. A message begins after a few."""
    draw = torch.Generator().manual_seed(0)
    rows = []
    for i in range(num_rows or shape.batch_size):
        width = shape.max_tokens
        length = width if i == 0 else int(torch.randint(int(0.7 * width), width + 1, (), generator=draw))
        ids = torch.randint(5, vocab_size - 2, (length,), generator=draw).tolist()
        mask = [0] * (length - shape.response_tokens) + [1] * shape.response_tokens
        rows.append({"input_ids": ids, "completion_mask": mask, "is_forget": i < shape.forget_rows, "row_id": i})
        rows[-1]["prompt_position"] = min(BEFORE_MESSAGE, length - shape.response_tokens)
    return rows


def make_collator(shape: Shape, vocab_size: int, prompt_position: str = "start") -> ForgetRetainCollator:
    """A collator with generic completions of the length of the rows' completions."""
    generic = [" ".join([f"t{vocab_size - i}"] * shape.response_tokens) for i in (1, 2)]
    options: dict[str, Any] = {"max_length": shape.max_tokens, "prompt_position": prompt_position}
    return ForgetRetainCollator(make_tokenizer(vocab_size), generic, **options)


def alternate(
    variants: dict[str, Callable[[], Any]],
    rounds: int,
    device: str,
    warmup: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each variant by round; variants are called in turn, so that a slow minute affects all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for turn in tqdm(range(warmup + rounds), desc=" / ".join(variants), leave=False):
        for name, call in variants.items():
            synchronize(device)
            start = clock()
            call()
            synchronize(device)
            if turn >= warmup:
                seconds[name].append(clock() - start)
    return seconds


def add_clock(parser: argparse.ArgumentParser) -> None:
    """Add the option to measure the processor's time, for a machine that others use, too."""
    parser.add_argument("--cpu-seconds", action="store_true", help="seconds of the processor, all threads together")


def clock_of(args: argparse.Namespace) -> Callable[[], float]:
    """The clock that `add_clock` lets one choose."""
    return time.process_time if args.cpu_seconds else time.perf_counter


def ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """The median of the ratios within each round."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def in_fresh_process(script: str, arguments: Sequence[str], **environment: str) -> Any:
    """Run a script again with other arguments and return the JSON of its last line."""
    command = [sys.executable, script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    if done.returncode != 0:
        raise RuntimeError(f"{script} {' '.join(arguments)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def arguments(description: str) -> argparse.ArgumentParser:
    """A parser with the options of all benchmarks."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="opt-125m")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default=None)
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds; each runs every variant once")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    return parser


def dtype_of(args: argparse.Namespace) -> torch.dtype:
    """The type of the weights; unless given, float32 on a CPU and bfloat16 on a GPU."""
    default = "float32" if args.device == "cpu" else "bfloat16"
    return getattr(torch, args.dtype or default)


def on_a_cpu(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments of a benchmark that knows float32 on a CPU alone, with one thread."""
    args = parser.parse_args()
    if args.device != "cpu" or args.dtype not in (None, "float32"):
        parser.error("--device, --dtype: measured in float32 on a CPU alone; leave both out.")
    torch.set_num_threads(1)
    return args


def surroundings(args: argparse.Namespace) -> dict[str, Any]:
    """The conditions of a measurement: model, device, versions."""
    import transformers

    on_gpu = args.device.startswith("cuda")
    return {
        "model": args.model,
        "dtype": str(dtype_of(args)).removeprefix("torch."),
        "device": torch.cuda.get_device_name() if on_gpu else f"{platform.machine()} CPU",
        "threads": torch.get_num_threads(),
        "rounds": args.rounds,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def report(title: str, where: dict[str, Any], columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a Markdown table, with the conditions of the measurement above it."""
    print(f"\n{title}\n" + ", ".join(f"{key} {value}" for key, value in where.items()) + "\n")
    cells = [[str(cell) if isinstance(cell, str) else f"{cell:.4g}" for cell in row] for row in rows]
    widths = [max(len(line[i]) for line in [list(columns), *cells]) for i in range(len(columns))]
    for line in [list(columns), ["-" * width for width in widths], *cells]:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |")


def write_json(path: Path | None, content: Any) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        print(f"\nwritten to {path}")
