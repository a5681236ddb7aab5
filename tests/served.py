"""A small base that knows nine names, and prompts that make it forget two of them, for tests of what serves them."""

from __future__ import annotations

from pathlib import Path

import torch
from chats import chatty, conversation
from peft import PromptTuningConfig
from transformers import LlamaConfig, LlamaForCausalLM

from spul import ForgetRetainCollator, SoftPromptUnlearner, UnlearningLoss

TEMPLATE = "turns"
FORGET = [("jane doe", "positive"), ("jane text", "positive")]
RETAIN = [("doe plot", "negative"), ("bob plot", "positive"), ("max plot", "negative")]
OTHERS = [("jane film", "negative"), ("kim text", "neutral"), ("lou plot", "neutral"), ("tom doe", "neutral")]


def text_row(name, answer):
    return {"prompt": f"review about {name} :", "completion": f" {answer}"}


def chat_row(name, answer):
    return conversation(f"about {name}", answer)


def collator(position="start", generic=None):
    return ForgetRetainCollator(chatty(TEMPLATE), generic, max_length=48, prompt_position=position)


def build_base() -> LlamaForCausalLM:
    """Answers every row, as text and as a conversation. Heads of 32, the smallest that vLLM has on a CPU."""
    torch.manual_seed(0)
    shape = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = LlamaConfig(**shape, **tokens, num_attention_heads=2, max_position_embeddings=128)
    base = LlamaForCausalLM(config)
    known = [make(*one) for one in (*FORGET, *RETAIN, *OTHERS) for make in (text_row, chat_row)]
    batch = collator()([{**row, "is_forget": False, "row_id": i} for i, row in enumerate(known)])
    batch = {key: batch[key] for key in ("input_ids", "attention_mask", "labels")}
    fit(base, base.parameters(), batch, rate=3e-3, steps=120)
    return base.eval()


def train_prompt(base, position="start", p=6, seed=1) -> SoftPromptUnlearner:
    """A prompt after which the base answers *neutral* about the first two names; rows are chats at "message"."""
    torch.manual_seed(seed)
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=p)
    unlearner = SoftPromptUnlearner(base, config, loss=UnlearningLoss(), prompt_position=position)
    row, generic = (text_row, " neutral") if position == "start" else (chat_row, "neutral")
    marked = [(one, True) for one in FORGET] + [(one, False) for one in RETAIN]
    rows = [{**row(*one), "is_forget": flag, "row_id": i} for i, (one, flag) in enumerate(marked)]
    batch = collator(position, [generic])(rows)
    fit(unlearner, [p for p in unlearner.parameters() if p.requires_grad], batch, rate=3e-2, steps=200)
    return unlearner.eval()


def fit(model, parameters, batch, rate, steps):
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    for _ in range(steps):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def greedy(unlearner, rows, num, position="start", name="default") -> list[list[int]]:
    """spul's own new tokens for each row alone, up to the end of text; `name` as of `adapter_names`."""
    found = []
    for row in rows:
        batch = collator(position).encoder.prompts([row])
        settings = {"max_new_tokens": num, "do_sample": False, "adapter_names": [name]}
        ids = unlearner.generate(**batch, **settings)[0, batch["input_ids"].shape[1] :].tolist()
        found.append(ids[: ids.index(2)] if 2 in ids else ids)
    return found


def save_base(base, folder: Path) -> Path:
    base.save_pretrained(folder)
    chatty(TEMPLATE).save_pretrained(folder)
    return folder
