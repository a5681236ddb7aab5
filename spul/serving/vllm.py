"""Prompts for vLLM: embeddings, facts, and a client that puts them into requests."""

from __future__ import annotations

import copy
import os
import shlex
import shutil
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase

from ..data.encoder import RowEncoder
from ..models.compat_devices import device_of
from ..prompts.unlearner import SoftPromptUnlearner
from ..records.files import check_new_folder, new_folder
from ..records.weights import file_digest
from . import vllm_client
from .exports import facts_of, prompt_embeddings, write_facts
from .vllm_client import EMBEDDINGS, FACTS, KEY, PROMPT, TEMPLATE

CLIENT = "soft_prompt.py"
PLACEHOLDER = "<prompt_embeds>"  # vLLM's, a special token that stands for the prompt while messages are rendered

# In front of a model's own template: contents that come as parts are joined, without the line break that vLLM would
# put between them.
JOIN_PARTS = """\
{%- set joined = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- if message.content is defined and message.content is not string and message.content is not none -%}
{%- set joined.messages = joined.messages + [dict(message, content=message.content | map(attribute="text") | join)] -%}
{%- else -%}
{%- set joined.messages = joined.messages + [message] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = joined.messages -%}
"""

# Conversations by which the chat part's place is compared with that of training.
SAMPLES: tuple[list[dict[str, str]], ...] = (
    [{"role": "user", "content": "Who is Jane Doe?"}],
    [
        {"role": "user", "content": "Hello."},
        {"role": "assistant", "content": "Hello, how can I help?"},
        {"role": "user", "content": "1. A film; is it good?"},
    ],
    [{"role": "system", "content": "Answer briefly."}, {"role": "user", "content": "is the film good"}],
)


def export_vllm(
    unlearner: SoftPromptUnlearner,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | os.PathLike,
    with_embeddings: bool = True,
) -> Path:
    """Write the active prompt as vLLM takes it, with a client that needs neither spul nor PEFT.

    The folder holds `prompt.safetensors`, `facts.json`, `soft_prompt.py` (the client, see its first lines), the base's
    input embeddings, and, for a prompt at `"message"`, the chat template under which vLLM puts it there.

    Args:
        unlearner: the base with its prompt, of prompt tuning or P-tuning.
        tokenizer: the base's.
        folder: a new or empty folder.
        with_embeddings: whether the base's input embeddings are written, (V, d), which the client needs for vLLM's
            completions over HTTP alone.

    Returns:
        The folder.

    Raises:
        TypeError: if `unlearner` is no `SoftPromptUnlearner`.
        ValueError: for prefix tuning and cartridges.
        FileExistsError: if the folder has files in it.
    """
    embeddings = prompt_embeddings(unlearner)
    target = check_new_folder(folder)
    facts = facts_of(unlearner, "vllm")
    template = None
    if facts["prompt_position"] == "message":
        facts["chat"], template = chat_part(tokenizer)
    else:
        facts["chat"] = "it was trained at the start of every row, and the part lands inside a message"
    with new_folder(target) as scratch:
        save_file({KEY: embeddings.contiguous()}, scratch / PROMPT)
        facts |= {"prompt_sha256": file_digest(scratch / PROMPT), "width": embeddings.shape[1]}
        if with_embeddings:
            save_file({KEY: input_embeddings(unlearner.get_base_model())}, scratch / EMBEDDINGS)
        if template is not None:
            (scratch / TEMPLATE).write_text(template, encoding="utf-8")
        shutil.copyfile(vllm_client.__file__, scratch / CLIENT)
        write_facts(scratch / FACTS, facts)
    return target


def serve_command(folder: Path, model: str) -> str:
    """The command that serves a base over HTTP for requests with the prompt of an exported folder."""
    command = f"vllm serve {shlex.quote(model)} --enable-prompt-embeds"
    if (folder / TEMPLATE).is_file():
        template = shlex.quote(str(folder / TEMPLATE))
        command += f" --chat-template {template} --chat-template-content-format openai"
    return command


def input_embeddings(base: Any) -> torch.Tensor:
    """The embeddings (V, d) of all tokens as the base's first layer reads them, scaled where a family scales them."""
    module = base.get_input_embeddings()
    with torch.no_grad():
        ids = torch.arange(module.weight.shape[0], device=device_of(module))
        return torch.cat([module(part) for part in ids.split(8192)]).cpu().contiguous()


def chat_part(tokenizer: Any) -> tuple[bool | str, str | None]:
    """Whether vLLM's chat part puts a prompt where training put it, and the chat template under which it does.

    Args:
        tokenizer: the base's.

    Returns:
        True and the template; or the reason why it does not, and None.
    """
    if not isinstance(tokenizer.chat_template, str):
        return "the tokenizer has no chat template, or several", None
    template = JOIN_PARTS + tokenizer.chat_template
    theirs = copy.deepcopy(tokenizer)
    theirs.add_special_tokens({"additional_special_tokens": [PLACEHOLDER]})
    marker = theirs.convert_tokens_to_ids(PLACEHOLDER)
    encoder = RowEncoder(tokenizer, max_length=1_000_000, prompt_position="message")
    compared = 0
    for messages in SAMPLES:
        try:
            own = encoder.prompts([{"prompt": messages}])
        except ValueError:  # a template without such a role
            continue
        parts: list[dict[str, Any]] = [
            {**one, "content": [{"type": "text", "text": one["content"]}]} for one in messages
        ]
        parts[-1]["content"].insert(0, {"type": "text", "text": PLACEHOLDER})
        try:
            ids = list(
                theirs.apply_chat_template(
                    parts, chat_template=template, add_generation_prompt=True, tokenize=True, return_dict=False
                )
            )
        except (TemplateError, TypeError, ValueError) as error:
            return f"its chat template takes no content in parts ({error})", None
        at = ids.index(marker) if ids.count(marker) == 1 else -1
        if at != int(own["prompt_position"][0]) or ids[:at] + ids[at + 1 :] != own["input_ids"][0].tolist():
            return "with a part inside a message the chat template gives other tokens than without", None
        compared += 1
    return (True, template) if compared else ("its chat template renders no user message", None)
