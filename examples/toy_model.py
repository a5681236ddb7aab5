"""A small language model trained from scratch in a minute or so, for examples that download nothing."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BATCH_SIZE = 64


def word_tokenizer(words: Iterable[str]) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per word."""
    known = ["<pad>", "<s>", "</s>", "<unk>", *dict.fromkeys(["###", *words])]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(known)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def train_small_model(
    folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    draw_row: Callable[[random.Random], tuple[str, str]],
    seed: int,
    steps: int,
) -> Path:
    """Train a Llama of 1.4M parameters on prompts and one-word answers of `draw_row`; save model and tokenizer."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=6,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    if len(tokenizer) > config.vocab_size:
        raise ValueError(f"{len(tokenizer)} words; the small model has room for {config.vocab_size}.")
    model = LlamaForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.5e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.5e-3, total_steps=steps, pct_start=0.1)
    progress = tqdm(range(steps), desc="training the small base")
    for _ in progress:
        rows = [draw_row(rng) for _ in range(BATCH_SIZE)]
        ids = [tokenizer(given + answer)["input_ids"] for given, answer in rows]
        width = max(map(len, ids))
        inputs = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in ids])
        last = torch.tensor([len(row) - 1 for row in ids])
        # Every answer is one word, the last token of its row.
        logits = model(
            inputs, attention_mask=inputs.ne(tokenizer.pad_token_id).long(), logits_to_keep=last[:, None] - 1
        )
        loss = torch.nn.functional.cross_entropy(logits.logits[:, 0], inputs.gather(1, last[:, None])[:, 0])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.3f}")
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
