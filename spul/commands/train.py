"""`spul train`: from files of forget and retain rows to a saved prompt with its card."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, Literal

from transformers import TrainingArguments, set_seed

from .command import Command, Naming
from .rewriting import check_rewritten, rewritten_rows, ways_of
from .shared import LoadOptions, RowOptions, check_new_prompt, option

logger = logging.getLogger(__name__)

ALPHA_OF_FITTED_KEYS = 4.0


@dataclass(kw_only=True)
class TrainingOptions(LoadOptions, RowOptions, TrainingArguments):
    """Rows, base, and `TrainingArguments` with defaults for prompts."""

    output_dir: str = option("folder for the saved prompt and the checkpoints", ...)
    learning_rate: float | None = option(  # type: ignore[assignment]
        "peak learning rate; by the prompt's kind and the base's width by default"
    )
    lr_scheduler_type: str = option("schedule of the learning rate", "cosine")
    warmup_steps: float = option("steps of warm-up; below 1 their share of all", 0.1)
    num_train_epochs: float = option("passes over the rows", 10.0)
    max_steps: int = option("optimizer steps, in place of epochs; -1 for none", -1)
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
    """Options of `spul train`; all of `TrainingArguments` are among them."""

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
    method: str = option(Naming("the loss, by the name of a published method", lambda: _methods()), "SPUL")
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


def run(options: TrainOptions) -> int | None:
    """Train, score and save a prompt.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if rows or options cannot be used.
    """
    from ..data.dataset import forget_retain_dataset
    from ..models.compat import PartialState
    from ..prompts.unlearner import SoftPromptUnlearner
    from ..records.files import check_can_hold
    from ..records.ledger import Ledger
    from ..records.ledger_events import LedgerEvent
    from ..training.methods import unlearning_method
    from ..training.rates import default_learning_rate
    from ..training.stopping import StopWhenForgotten
    from ..training.trainer import UnlearningTrainer

    _fill(options)
    check_rewritten(options)
    method = unlearning_method(
        options.method, "prompt", options.alpha, options.beta, retain_budget=options.retain_budget
    )
    if options.generic is None and not method.loss.forget.makes_unlikely and method.alternates is None:
        raise ValueError(f"{options.method} trains generic answers; give some: --generic ' neutral' ' unknown'.")
    if (options.ledger is None) != (options.request is None):
        raise ValueError("ledger and request go together: the file, and the name of the request that is noted in it.")
    ledger = None if options.ledger is None else Ledger(options.ledger)
    if ledger is not None and options.request is not None:  # before hours of training
        LedgerEvent("trained", options.request).to_dict()
        ledger.check_goes_on()
        ledger.check_name(options.request)
    check_can_hold(options.output_dir)
    _check_no_run(options)
    tests = {
        name: options.rows(files, name == "test_forget")
        for name, files in (("test_forget", options.test_forget), ("test_retain", options.test_retain))
        if files
    }
    forget, retain = options.rows(options.forget, True), options.rows(options.retain, False)
    dataset = forget_retain_dataset(forget, retain)
    held_out = None if options.hold_out is None else _held_out(dataset, options.hold_out, options.seed)
    train_rows = dataset if held_out is None else held_out.train
    ways = ways_of(options, train_rows)
    tokenizer = options.load_tokenizer(options.model)
    said = options.warn_of_boundaries(tokenizer, {"forget": forget, **tests}, {"retain": retain})
    config = _prompt_config(options)
    base = options.load(options.model)
    of_rows = options.collator_options(base, options.num_virtual_tokens, options.prompt_position)
    collator = method.collator(tokenizer, options.generic or (), seed=options.seed, **of_rows)
    collator.encoder.said_completions = said
    if ways is not None:
        train_rows = rewritten_rows(options, train_rows, ways, collator, held_out, tests.values())
    set_seed(options.seed)  # of the draws of the start
    start = _start(options, collator, train_rows)
    unlearner = SoftPromptUnlearner(
        *(base, config, method.loss),
        prompt_position=options.prompt_position,
        start=None if _resumes(options) else start,  # the checkpoint's prompt takes its place
    )
    if PartialState().is_main_process:
        print(f"start: {_start_in_words(options, start)}", flush=True)
    if options.learning_rate is None:
        options.learning_rate = default_learning_rate(unlearner, start)
    trainer = UnlearningTrainer(
        unlearner,
        options,
        collator,
        train_rows,
        tests or None,
        tokenizer,
        forget_fraction=options.forget_fraction or None,
        reference=options.reference,
        reference_dir=options.reference_dir,
        digest_key=options.digest_key,
    )
    if held_out is not None:
        names = ("every", "margin", "target", "patience")
        settings = {name: getattr(options, f"stop_{name}") for name in names}
        trainer.add_callback(StopWhenForgotten(trainer, held_out.forget, held_out.retain, **settings))
    trainer.train(resume_from_checkpoint=True if options.resume else options.resume_from_checkpoint)
    scores = _scores(trainer, tests, options.stop_target)
    if trainer.is_world_process_zero():
        unlearner.save_pretrained(options.output_dir)
        tokenizer.save_pretrained(options.output_dir)
        if ledger is not None and options.request is not None:
            ledger.append(LedgerEvent.of_adapter("trained", options.request, options.output_dir))
        for line in scores:
            print(line)
        print(f"saved: {options.output_dir}")
    return None


def _methods() -> list[str]:
    """Names of the methods that train a prompt."""
    from ..training.methods import METHODS, unlearning_method

    return [name for name in METHODS if unlearning_method(name).loss.reads_layer is None]


def _fill(options: TrainOptions) -> None:
    """Fill in the defaults that depend on other options: those that forgot on pretrained models without a gate."""
    from ..models.compat import PartialState
    from ..models.compat_shards import zero3_config

    if options.forget_fraction is None and options.train_sampling_strategy in ("random", "group_by_length"):
        options.forget_fraction = 0.5
    if options.prompt_type is None:
        options.prompt_type = "prompt_tuning" if options.prompt_position == "message" else "prefix_tuning"
    if options.start is None and options.instruction is None:
        start: Literal["discriminative", "near"] = (
            "discriminative" if options.prompt_type == "prefix_tuning" else "near"
        )
        if zero3_config(options) is None:
            options.start = start
        elif not _resumes(options) and PartialState().is_main_process:
            logger.warning(
                "ZeRO-3 loads the base in shards, by which no start is compared or fitted yet: the prompt begins as "
                "one draw, not by --start %s.",
                start,
            )
    if options.start == "discriminative" and options.method == "SPUL" and options.retain_budget is None:
        options.alpha = ALPHA_OF_FITTED_KEYS if options.alpha is None else options.alpha


def _check_no_run(options: TrainOptions) -> None:
    """Raise if a run that is not resumed would write over another.

    With checkpoints of two runs in a folder, one would be resumed from the newest of either.
    """
    from ..training.resuming import last_complete_checkpoint

    if _resumes(options):
        return
    check_new_prompt(options.output_dir)
    try:
        newest = last_complete_checkpoint(options.output_dir)
    except ValueError:
        return
    raise FileExistsError(
        f"{newest!r} is of a run that has not ended; go on from it by --resume true, or name another folder."
    )


def _resumes(options: TrainOptions) -> bool:
    return options.resume or options.resume_from_checkpoint is not None


def _held_out(dataset: Any, share: float, seed: int) -> Any:
    """Rows held out; errors name the option."""
    from ..data.dataset import hold_out

    try:
        return hold_out(dataset, share, seed)
    except ValueError as error:
        raise ValueError(str(error).replace("share=", "hold_out=")) from error


def _prompt_config(options: TrainOptions) -> Any:
    """PEFT's config of the prompt; raises for options that contradict each other, before the base is loaded."""
    from ..prompts.configs import holds_states, prompt_config

    if options.instruction is not None and options.start is not None:
        raise ValueError("start and instruction both say how the prompt begins; give one of them.")
    assert options.prompt_type is not None  # filled in
    config = prompt_config(options.prompt_type, options.num_virtual_tokens, options.encoder_hidden_size)
    if options.start == "discriminative" and not holds_states(config):
        raise ValueError(
            f"--start discriminative fits keys, and --prompt-type {options.prompt_type} has none; expected "
            "prefix_tuning or cartridge, or another start."
        )
    return config


def _start(options: TrainOptions, collator: Any, rows: Any) -> Any:
    """The start of the prompt."""
    from ..prompts.discriminative import DiscriminativeStart
    from ..prompts.near import NearStart
    from ..prompts.starts import InstructionStart

    if options.instruction is not None:
        return InstructionStart(options.instruction, collator.tokenizer)
    if options.start == "discriminative":
        return DiscriminativeStart(rows, collator, progress=not options.disable_tqdm)
    if options.start == "near":
        return NearStart(rows, collator)
    return options.start


def _start_in_words(options: TrainOptions, start: Any) -> str:
    """The prompt's start in words, once it was made."""
    if _resumes(options):
        return "the prompt of the checkpoint"
    if options.instruction is not None:
        return f"the instruction {options.instruction!r}"
    if options.start == "near":
        return f"near, {start.distance:.2f} nats per response token from the base"
    if options.start == "discriminative":
        return "discriminative, keys fitted to the rows"
    return options.start or "one draw"


def _scores(trainer: Any, tests: dict[str, Any], target: float) -> list[str]:
    """A line for each set of test rows: its scores beside the base's, both recorded for the card; warnings.

    Args:
        trainer: after training.
        tests: rows by name.
        target: forget accuracy in percent that counts as forgotten.
    """
    if not tests:
        return []
    with trainer.unlearner.disable_adapter():
        before = {name: trainer.score(rows, name) for name, rows in tests.items()}
    after = trainer.evaluate()
    for name, scores in before.items():
        own = {key: scores[key] for key in ("accuracy", "f1", "generic")}
        trainer.unlearner.spul_config.metrics[f"{name}, detached"] = own
    lines = [
        f"{name}: "
        + ", ".join(
            f"{key} {after[f'eval_{name}_{key}']:.3f} (base {before[name][key]:.3f})"
            for key in ("accuracy", "generic")
        )
        for name in tests
    ]
    if "test_forget" in tests and before["test_forget"]["accuracy"] > 0:
        answered = 100 * after["eval_test_forget_accuracy"]
        if answered > target:
            lines.append(
                f"warning: test_forget: {answered:.1f} % of these rows are still answered as before; more steps are "
                "what helps first (--max-steps). A gate decides which requests get the prompt, and forgets nothing."
            )
    # Otherwise an accuracy of 0 under the prompt looks like success.
    return lines + [
        f"warning: {name}: the base answers none of these rows, so the scores say nothing of the prompt. Compare a "
        "row with the texts that the base was trained on: template, space before the completion, tokenizer."
        for name in tests
        if before[name]["accuracy"] == 0
    ]


COMMANDS = {
    "": Command(
        TrainOptions,
        run,
        "spul train --model facebook/opt-1.3b --forget f.jsonl --retain r.jsonl --generic ' neutral' ' unknown' "
        "--output-dir out",
        "Train a soft prompt on files of forget and retain rows, and save it with its record and card.",
    )
}
