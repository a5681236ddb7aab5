"""Options of the commands that train: their own, which need neither torch nor PEFT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .names import METHODS, quoted
from .shared import LoadOptions, RowOptions, option


@dataclass(kw_only=True)
class TrainingOptions(LoadOptions, RowOptions):
    """Rows, base, and those of `TrainingArguments` whose defaults are others for prompts."""

    output_dir: str = option("folder for the saved prompt and the checkpoints", ...)
    learning_rate: float | None = option("peak learning rate; by the prompt's kind and the base's width by default")
    lr_scheduler_type: str = option("schedule of the learning rate", "cosine")
    warmup_steps: float = option("steps of warm-up; below 1 their share of all", 0.1)
    num_train_epochs: float = option("passes over the rows", 10.0)
    max_steps: int = option("optimizer steps, in place of epochs; -1 for none", -1)
    seed: int = option("seed of all draws", 42)
    per_device_train_batch_size: int = option("rows of a batch", 8)
    logging_steps: float = option("steps between logs, which have every term of the loss", 10)
    report_to: str = option("tracker of the logs, such as tensorboard, wandb or trackio", "none")
    forget_fraction: float | None = option("share of forget rows in every batch; shuffled together by default")
    reference: Literal["cached", "live"] = option(
        "the base's logits on retain rows: computed once, or in every step", "cached"
    )
    reference_dir: str | None = option("folder of the cached reference; beside the Hugging Face cache by default")
    digest_key: str | None = option("file of the owner's secret: the record then has digests of the rows")
    rewritten: bool = option(
        "train on rewritten rows, too: letter case, spaces, asides, turns before; two a forget row, one a retain row",
        False,
    )
    rewritten_turns: list[int] | None = option("numbers of turns before those rows; 1 and 2 by default")


@dataclass(kw_only=True)
class TrainOptions(TrainingOptions):
    """Options of `spul train`, without those of `TrainingArguments` that it takes as they are."""

    model: str = option("the base, by name or folder", ...)
    forget: list[str] = option("files of the rows to forget: jsonl, json, csv, tsv or parquet", ...)
    retain: list[str] = option("files of the rows that stay as they are", ...)
    test_forget: list[str] | None = option("files of other forget rows, scored in the end and for the card")
    test_retain: list[str] | None = option("files of other retain rows, likewise")
    prompt_type: Literal["prompt_tuning", "p_tuning", "prefix_tuning", "cartridge"] | None = option(
        "kind of the prompt; prefix_tuning by default, and prompt_tuning at the message"
    )
    num_virtual_tokens: int = option("length of the prompt", 30)
    encoder_hidden_size: int = option("width of P-tuning's network", 128)
    prompt_position: Literal["start", "message"] = option(
        "where the prompt stands: in front, or before what is asked", "start"
    )
    start: Literal["near", "random", "vocabulary", "peft", "discriminative"] | None = option(
        "how the prompt begins; by its kind by default: discriminative, keys fitted to the rows, for prefix_tuning, "
        "and near, the draw of several that changes answers least, for the others"
    )
    instruction: str | None = option("a written instruction that the prompt begins as, in place of --start")
    method: str = option(f"the loss, by the name of a published method: {quoted(METHODS)}", "SPUL")
    alpha: float | None = option("weight of the retain term; the method's by default, and 4 with fitted keys and SPUL")
    beta: float | None = option("weight of the KL term; the method's by default")
    retain_budget: float | None = option("nats per token that retaining may cost; alpha moves by it, from --alpha on")
    hold_out: float | None = option("share of the rows to hold out, to stop when they are forgotten")
    per_device_train_batch_size: int = option("rows of a batch", 32)
    forget_fraction: float | None = option(
        "share of forget rows in every batch, 0.5 where the sampling strategy lets it by default; 0 shuffles all rows"
    )
    stop_every: int = option("steps between scorings of the rows held out", 50)
    stop_margin: float = option("points of retain accuracy that may be lost", 1.0)
    stop_target: float = option("forget accuracy in percent that counts as forgotten", 5.0)
    stop_patience: int = option("further scorings that must be no better", 2)
    resume: bool = option("go on from the last complete checkpoint in the output folder", False)
    ledger: str | None = option("the ledger that gets an entry of the prompt, with --request")
    request: str | None = option("name of the request in the ledger, a number rather than a person's name")


@dataclass(kw_only=True)
class CombineOptions(TrainingOptions):
    """Options of `spul combine`, without those of `TrainingArguments` that it takes as they are."""

    model: str = option("the base, by name or folder", ...)
    prompts: list[str] = option("folders of the saved prompts", ...)
    forget: list[str] | None = option("files of the rows of all requests; with --retain")
    retain: list[str] | None = option("files of the rows that stay as they are")
    inputs: list[str] | None = option("files of rows to imitate the prompts on, where the forget rows are gone")
    num_virtual_tokens: int | None = option("length of the new prompt; that of the longest by default")
    alpha: float = option("weight of the retain term", 1.0)
    beta: float = option("weight of the KL term", 0.5)
    learning_rate: float = option("peak learning rate", 1e-2)
