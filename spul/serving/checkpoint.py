"""A prompt baked into a checkpoint: spare rows of the vocabulary, which the tokenizer puts in front of every text."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, processors
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from ..models.causal_lm import evaluation_mode
from ..models.compat_devices import device_of
from ..prompts.unlearner import SoftPromptUnlearner
from ..records.files import check_new_folder, new_folder
from .exports import facts_of, prompt_embeddings, write_facts

FACTS = "spul_export.json"
TOKEN = "<|soft_prompt_{}|>"
TEXTS = ("The quick brown fox, 1 + 2.", "Who is Jane Doe?\nAn actor", " a film")
MESSAGES = [{"role": "user", "content": "Who is Jane Doe?"}]
# By how much logits of the written checkpoint may differ from the prompted base's, as a part of the largest.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4}
HALF_TOLERANCE = 0.03


def export_checkpoint(unlearner: SoftPromptUnlearner, tokenizer: Any, folder: str | os.PathLike) -> Path:
    """Write a checkpoint of the base in which the tokenizer puts the active prompt in front of every text.

    The prompt's rows follow those of the vocabulary, as special tokens that `generate` never gives. The written folder
    is loaded and compared with the prompted base before it gets its name; it takes memory for a second base.
    The prompt is part of the tokenizer's work, so whoever sends token ids leaves it out.

    Args:
        unlearner: the base, not quantized, with its prompt, of prompt tuning or P-tuning, at the start.
        tokenizer: the base's, a fast one.
        folder: a new or empty folder.

    Returns:
        The folder.

    Raises:
        TypeError: if `unlearner` is no `SoftPromptUnlearner`.
        ValueError: for prefix tuning and cartridges, a prompt at `"message"`, a quantized base, a slow tokenizer, and
            where the written checkpoint does not give the prompted base's tokens and logits.
        FileExistsError: if the folder has files in it.
    """
    prompt = prompt_embeddings(unlearner)
    base: Any = unlearner.get_base_model()
    if unlearner.spul_config.prompt_position != "start":
        raise ValueError(
            'the prompt stands inside each row (prompt_position="message"), and a tokenizer puts tokens in front of '
            "a text only. Serve it by vLLM, spul.serving.export_vllm, or by `spul serve`; or train one at the start."
        )
    if getattr(base, "is_quantized", False) or getattr(base, "hf_quantizer", None) is not None:
        raise ValueError(
            "the base is quantized, and rows cannot be added to such a checkpoint. Load it in bfloat16, as it was "
            "published, with the prompt on it; quantize the exported folder."
        )
    target = check_new_folder(folder)
    first = _first_id(tokenizer)
    state, config = baked_state(base, prompt, first), baked_config(base, first + len(prompt))
    baked = baked_tokenizer(tokenizer, len(prompt))
    generation = copy.deepcopy(getattr(base, "generation_config", None)) or GenerationConfig()
    added = list(range(first, first + len(prompt)))
    generation.suppress_tokens = sorted({*(generation.suppress_tokens or ()), *added})
    with torch.device("meta"):
        model = type(base)(config)
    model.load_state_dict(state, assign=True)
    model.generation_config = generation
    with new_folder(target) as scratch:
        model.save_pretrained(scratch)
        baked.save_pretrained(scratch)
        write_facts(scratch / FACTS, {**facts_of(unlearner, "checkpoint"), "first_token_id": first})
        del model, state
        check_written(scratch, unlearner, tokenizer, added)
    return target


def baked_state(base: Any, prompt: Tensor, first: int) -> dict[str, Tensor]:
    """The base's weights with the prompt (p, d) as rows `first`, `first` + 1, ... of its input embeddings.

    The output head keeps its rows, also where they were those of the input embeddings. Its rows of the prompt, and all
    others that it gains, are copies of the row that the base is least likely to answer with.
    """
    embeddings, head = base.get_input_embeddings(), base.get_output_embeddings()
    state = {name: value.detach() for name, value in base.state_dict().items()}
    table = embeddings.weight.detach()
    new = unscaled(embeddings, prompt.to(table))
    num = max(len(table), first + len(prompt))
    rows = torch.cat([table, table.new_zeros(num - len(table), table.shape[1])])
    rows[first : first + len(prompt)] = new
    least = least_likely(base)
    names = {id(module): name for name, module in base.named_modules()}
    state[f"{names[id(embeddings)]}.weight"] = rows
    for key, value in head.named_parameters():
        value = value.detach()
        grown = torch.cat([value, value[[least]].expand(num - len(value), *value.shape[1:])])
        grown[first : first + len(prompt)] = value[least]
        state[f"{names[id(head)]}.{key}"] = grown
    return state


def unscaled(embeddings: Any, prompt: Tensor) -> Tensor:
    """The rows that a base's input embeddings turn into the prompt; Gemma multiplies its rows by a number.

    Raises:
        ValueError: if the embeddings are more than a row times a number.
    """
    with torch.no_grad():
        ids = torch.arange(min(64, len(embeddings.weight)), device=device_of(embeddings))
        own, found = embeddings.weight[ids].double(), embeddings(ids).double()
    scale = float((found * own).sum() / (own * own).sum())
    if found.shape != own.shape or not torch.allclose(found, own * scale, rtol=0.02, atol=1e-6):
        raise ValueError(
            f"the input embeddings of the base, {type(embeddings).__name__}, are not rows of its vocabulary times a "
            "number, so a prompt cannot be one of them. Serve it by vLLM or by `spul serve`."
        )
    if abs(scale - 1) < 1e-6:
        return prompt
    return (prompt.double() / scale).to(prompt)


def least_likely(base: Any) -> int:
    """The token whose probability after random tokens is lowest, at its highest."""
    rows = len(base.get_output_embeddings().weight)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(min(rows, len(base.get_input_embeddings().weight)), (4, 16), generator=generator)
    with evaluation_mode(base), torch.no_grad():
        logits = base(input_ids=ids.to(device_of(base.get_input_embeddings()))).logits
    return int(logits.float().log_softmax(-1).amax((0, 1)).argmin())


def baked_config(base: Any, num_tokens: int) -> Any:
    """The base's config, with room for `num_tokens` tokens and an output head of its own."""
    config = copy.deepcopy(base.config)
    text = config.get_text_config()
    for one in {id(one): one for one in (config, text)}.values():
        one.tie_word_embeddings = False
        if getattr(one, "vocab_size", None) is not None:
            one.vocab_size = max(len(base.get_input_embeddings().weight), num_tokens)
    return config


def baked_tokenizer(tokenizer: Any, num: int) -> PreTrainedTokenizerFast:
    """The tokenizer with `num` more special tokens, which stand in front of every text and every conversation.

    Its class is the general one, since those of some families make the post-processor anew when they are loaded.
    """
    core = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    core.no_truncation()
    core.no_padding()
    names = [TOKEN.format(i) for i in range(num)]
    first = _first_id(tokenizer)
    core.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    ids = [core.token_to_id(name) for name in names]
    if ids != list(range(first, first + num)):
        raise ValueError(f"the tokenizer numbers new tokens {ids[0]} to {ids[-1]}; expected {first} on, one by one.")
    front = processors.TemplateProcessing(
        single=[*names, "$A"],
        pair=[*names, "$A", "$B:1"],
        special_tokens=list(zip(names, ids, strict=True)),
    )
    own = core.post_processor
    core.post_processor = front if own is None else processors.Sequence([own, front])
    special = {name: value for name, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
    baked = PreTrainedTokenizerFast(
        tokenizer_object=core,
        **special,
        model_max_length=tokenizer.model_max_length,
        padding_side=tokenizer.padding_side,
        truncation_side=tokenizer.truncation_side,
        clean_up_tokenization_spaces=getattr(tokenizer, "clean_up_tokenization_spaces", False),
        model_input_names=tokenizer.model_input_names,
    )
    template = tokenizer.chat_template
    text = "{{ " + json.dumps("".join(names)) + " }}"  # rendered conversations get no post-processing
    if isinstance(template, dict):
        baked.chat_template = {name: text + one for name, one in template.items()}
    elif template is not None:
        baked.chat_template = text + template
    return baked


def check_written(folder: Path, unlearner: SoftPromptUnlearner, tokenizer: Any, added: list[int]) -> None:
    """Raise unless a written folder, loaded as anybody loads it, has the prompted base's tokens and logits.

    Args:
        folder: the folder.
        unlearner: the base and its prompt.
        tokenizer: the base's.
        added: the ids of the prompt's tokens.
    """
    baked = AutoTokenizer.from_pretrained(folder)
    base: Any = unlearner.get_base_model()
    for text in TEXTS:
        own, found = list(tokenizer(text)["input_ids"]), list(baked(text)["input_ids"])
        if found != added + own or baked.decode(own) != tokenizer.decode(own):
            raise ValueError(_other_tokens(f"a text ({text!r})", added + own, found))
    if isinstance(tokenizer.chat_template, str):
        options: dict[str, Any] = {"add_generation_prompt": True, "tokenize": True, "return_dict": False}
        own, found = (list(one.apply_chat_template(MESSAGES, **options)) for one in (tokenizer, baked))
        if found != added + own:
            raise ValueError(_other_tokens("a conversation", added + own, found))
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=base.dtype)
    model = model.to(device_of(base)).eval()
    kept = torch.arange(len(base.get_output_embeddings().weight))
    kept = kept[~torch.isin(kept, torch.tensor(added))]  # all tokens but the prompt's
    tolerance = TOLERANCE.get(base.dtype, HALF_TOLERANCE)
    with evaluation_mode(unlearner), torch.no_grad():
        for text in TEXTS:
            ids = torch.tensor([tokenizer(text)["input_ids"]], device=device_of(base))
            expected = unlearner(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, len(added) :, kept]
            all_ids = torch.tensor([baked(text)["input_ids"]], device=device_of(base))
            found = model(input_ids=all_ids, attention_mask=torch.ones_like(all_ids)).logits[0, len(added) :, kept]
            worst, largest = float((found - expected).abs().max()), float(expected.abs().max())
            if not worst <= tolerance * largest:
                raise ValueError(
                    f"the written checkpoint of a {type(base).__name__} gives other logits than the prompted base: "
                    f"they differ by {worst:.2g}, of at most {largest:.2g}, so the family cannot carry a prompt in "
                    "its vocabulary. Nothing was written. Serve it by vLLM or by `spul serve`."
                )


def _other_tokens(what: str, expected: list[int], found: list[int]) -> str:
    return (
        f"the written tokenizer gives other tokens for {what}: {found[:60]}, expected {expected[:60]}, the prompt's "
        "and then the row's. Nothing was written. Serve the prompt by vLLM or by `spul serve`."
    )


def _first_id(tokenizer: Any) -> int:
    """The id that the next token of a tokenizer gets."""
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"{type(tokenizer).__name__} is no fast tokenizer, and only those are saved with what they put in front "
            "of a text. Load the fast one: AutoTokenizer.from_pretrained(name)."
        )
    vocabulary = tokenizer.get_vocab()
    if TOKEN.format(0) in vocabulary:
        raise ValueError(
            f"the tokenizer has {TOKEN.format(0)!r} already: the base carries a prompt. Export from its own base."
        )
    return max(vocabulary.values()) + 1
