"""`spul export`: a trained prompt in the form in which other engines take it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .command import Command
from .shared import DType, option, prompts_left_out, saved_prompt


@dataclass
class ExportOptions:
    """Options of both kinds of export."""

    model: str = option("the base that the prompt was trained on: folder or Hub name", ...)
    adapter: str = option("the trained prompt: folder or Hub name", ...)
    output_dir: str = option("a new or empty folder", ...)
    dtype: DType = option("type of the base's weights, auto for as saved", "auto")
    allow_other_base: bool = option("export although the prompt's record does not name this base's weights", False)


@dataclass
class VllmOptions(ExportOptions):
    """Options of `spul export vllm`."""

    with_embeddings: bool = option(
        "write the base's input embeddings, which completions over HTTP need, and nothing else", True
    )


def run_vllm(options: VllmOptions) -> None:
    """Export a prompt for vLLM; prints how to serve it."""
    from ..serving.vllm import export_vllm, serve_command

    unlearner, tokenizer = _loaded(options)
    folder = export_vllm(unlearner, tokenizer, options.output_dir, options.with_embeddings)
    print(f"Written: {folder}\nServe:   {serve_command(folder, options.model)}")


def run_checkpoint(options: ExportOptions) -> None:
    """Bake a prompt into a checkpoint of its base; prints where it is."""
    from ..serving.checkpoint import export_checkpoint

    unlearner, tokenizer = _loaded(options)
    folder = export_checkpoint(unlearner, tokenizer, options.output_dir)
    print(f"Written: {folder}\nServe:   transformers serve {folder}")


def check(options: ExportOptions) -> None:
    """Raise unless the folder can be written as a whole, before torch is imported.

    Raises:
        FileExistsError, PermissionError, ValueError: if not.
    """
    from ..records.files import check_new_folder

    check_new_folder(options.output_dir)


def _loaded(options: ExportOptions) -> tuple[Any, Any]:
    """The base with the prompt on it, and the base's tokenizer."""
    from peft import PeftType

    from ..models.loading import load_causal_lm, load_tokenizer
    from ..prompts.configs import holds_states
    from ..prompts.unlearner import SoftPromptUnlearner
    from ..records.digests import fingerprint
    from ..serving.loading import check_fits

    check(options)
    saved = saved_prompt(options.adapter)
    if holds_states(saved.config):
        kind = PeftType(saved.config.peft_type).value.lower()
        raise ValueError(
            f"{options.adapter} holds a prompt of {kind}: keys and values for every layer, which other engines take "
            "from nobody. An export takes prompt_tuning or p_tuning alone: train such a prompt by spul train "
            "--prompt-type prompt_tuning, which forgets less without a gate, or serve this one by spul serve."
        )
    record = saved.spul_config
    if left_out := _left_out(options.adapter):
        print(f"Not in the export: {left_out}")
    base = load_causal_lm(options.model, options.dtype, device="cpu")  # only its weights are read
    check_fits(record, fingerprint(base), options.allow_other_base, options.adapter)
    unlearner = SoftPromptUnlearner.from_pretrained(base, options.adapter)
    return unlearner, load_tokenizer(options.model)


def _left_out(folder: str) -> str:
    """Gates and other prompts in the folder of a prompt."""
    from ..gates.gated_files import GATE_FOLDER

    others = [f"{name!r}" for name in prompts_left_out([folder]).get(folder, ())]
    gate = "its gate, so that every request gets the prompt" if Path(folder, GATE_FOLDER).is_dir() else ""
    prompts = f"the prompts {', '.join(others)}, each of which has a folder of its own" if others else ""
    return "; ".join(filter(None, (gate, prompts)))


COMMANDS = {
    "vllm": Command(
        options=VllmOptions,
        run=run_vllm,
        example="spul export vllm --model facebook/opt-1.3b --adapter forget-jane-doe --output-dir for-vllm",
        purpose="a prompt as embeddings, with a client that puts them into requests to vLLM",
        check=check,
    ),
    "checkpoint": Command(
        options=ExportOptions,
        run=run_checkpoint,
        example="spul export checkpoint --model facebook/opt-1.3b --adapter forget-jane-doe --output-dir baked",
        purpose="a checkpoint whose tokenizer puts the prompt in front of every text, for any engine",
        check=check,
    ),
}
