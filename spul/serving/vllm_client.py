"""Requests to vLLM with a soft prompt. This file needs torch and safetensors alone; it lies beside what it reads.

Offline:  llm = LLM(base, enable_prompt_embeds=True, dtype="bfloat16")
          prompt = SoftPrompt("exported", dtype=torch.bfloat16)
          llm.generate([prompt.request(ids), without_prompt(other_ids)], SamplingParams(...))

HTTP:     vllm serve BASE --enable-prompt-embeds
          POST /v1/completions         {"model": BASE, "max_tokens": 20, **prompt.completion(ids)}
          POST /v1/chat/completions    {"model": BASE, "max_tokens": 20, "messages": prompt.messages(messages)}

Whoever reaches the server may send tensors, or leave the prompt out: let only this client's process reach it.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

FACTS, PROMPT, EMBEDDINGS, TEMPLATE = (
    "facts.json",
    "prompt.safetensors",
    "embeddings.safetensors",
    "chat_template.jinja",
)
KEY = "embeddings"  # the one tensor in a file


class SoftPrompt:
    """A prompt that was exported for vLLM, and the requests that carry it.

    Args:
        folder: the exported folder; that of this file unless given.
        dtype: the type in which vLLM serves, its `--dtype`.

    Attributes:
        facts: what `facts.json` says: base and prompt by digest, position, number of virtual tokens.
        embeddings: the prompt, (p, d).

    Raises:
        ValueError: if the prompt's file is not the one that the facts describe.
    """

    def __init__(self, folder: str | os.PathLike | None = None, dtype: torch.dtype = torch.float32) -> None:
        self.folder = Path(__file__).parent if folder is None else Path(folder)
        self.dtype = dtype
        self.facts: dict[str, Any] = json.loads((self.folder / FACTS).read_text(encoding="utf-8"))
        found = hashlib.sha256((self.folder / PROMPT).read_bytes()).hexdigest()
        if found != self.facts["prompt_sha256"]:
            raise ValueError(
                f"{self.folder / PROMPT} has the SHA-256 {found[:12]}..., and {FACTS} names another, "
                f"{self.facts['prompt_sha256'][:12]}...: copy the whole folder again."
            )
        self.embeddings = load_file(self.folder / PROMPT)[KEY].to(dtype)

    def request(self, ids: Sequence[int], position: int | None = None) -> dict[str, Any]:
        """A request for `LLM.generate`, or for `AsyncLLM`; it goes into one batch with others.

        Args:
            ids: the row's token ids, beginning-of-sequence token included.
            position: how many of them stand before the prompt; needed for a prompt at "message", 0 for one at "start".
        """
        before = self._before(ids, position)
        num, width = self.embeddings.shape
        rows = torch.zeros(num + len(ids), width, dtype=self.dtype)
        rows[before : before + num] = self.embeddings
        return {
            "prompt_embeds": rows,
            "prompt_token_ids": [*ids[:before], *[0] * num, *ids[before:]],
            "prompt_is_token_ids": [True] * before + [False] * num + [True] * (len(ids) - before),
        }

    def completion(self, ids: Sequence[int], position: int | None = None) -> dict[str, str]:
        """Fields of a body for `/v1/completions`: the embeddings of prompt and row, (p + n, d).

        The server does not join embeddings with token ids, so the row's are looked up in `embeddings.safetensors`.

        Args:
            ids: as in `request`.
            position: as in `request`.

        Raises:
            FileNotFoundError: if the base's embeddings were not exported.
        """
        before = self._before(ids, position)
        path = self.folder / EMBEDDINGS
        if not path.is_file():
            raise FileNotFoundError(
                f"there is no {path}: export again with the base's embeddings, or send `request` to vLLM offline."
            )
        with safe_open(path, framework="pt") as file:
            table = file.get_slice(KEY)
            num_rows = table.get_shape()[0]
            if outside := [one for one in ids if not 0 <= one < num_rows]:
                raise ValueError(
                    f"token id {outside[0]}; expected 0 to {num_rows - 1}, as the base's tokenizer gives."
                )
            rows = torch.cat([table[one : one + 1] for one in ids]).to(self.dtype)
        return {"prompt_embeds": encoded(torch.cat([rows[:before], self.embeddings, rows[before:]]))}

    def messages(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Messages for `/v1/chat/completions` or `LLM.chat`, with the prompt before the last user message's text.

        The server needs `--chat-template FOLDER/chat_template.jinja --chat-template-content-format openai`; by itself
        it would put a line break between the prompt and the text.

        Raises:
            ValueError: if the prompt does not stand there, or there is no such message.
        """
        if self.facts["chat"] is not True:
            raise ValueError(
                f"this prompt cannot be served by a part of a chat: {self.facts['chat']}. Render the messages to "
                "token ids by the tokenizer's chat template, and send `completion(ids, position)` or "
                "`request(ids, position)`."
            )
        last = max((i for i, one in enumerate(messages) if one["role"] == "user"), default=None)
        if last is None:
            raise ValueError('there is no message of the role "user", before whose text the prompt stands.')
        content = messages[last]["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
        own = {**messages[last], "content": [{"type": "prompt_embeds", "data": encoded(self.embeddings)}, *parts]}
        return [dict(one) for one in messages[:last]] + [own] + [dict(one) for one in messages[last + 1 :]]

    def _before(self, ids: Sequence[int], position: int | None) -> int:
        """The number of a row's tokens before the prompt."""
        if not ids:
            raise ValueError("there are no token ids; expected at least one.")
        at_message = self.facts["prompt_position"] == "message"
        if position is None and not at_message:
            return 0
        if position is None or not 0 <= position <= len(ids) or (position and not at_message):
            expected = f"0 to {len(ids)}, the number of the row's tokens before its message" if at_message else "0"
            raise ValueError(
                f"position={position!r}; the prompt stands at {self.facts['prompt_position']!r}: expected {expected}."
            )
        return position


def without_prompt(ids: Sequence[int]) -> dict[str, Any]:
    """A request for `LLM.generate` without a prompt, for rows that a gate lets through."""
    return {"prompt_token_ids": list(ids)}


def encoded(tensor: torch.Tensor) -> str:
    """A tensor as vLLM's server reads it: the base64 of a saved tensor."""
    buffer = io.BytesIO()
    torch.save(tensor.clone(), buffer)  # the clone's storage holds nothing else
    return base64.b64encode(buffer.getvalue()).decode("ascii")
