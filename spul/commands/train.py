"""`spul train`: from files of forget and retain rows to a saved prompt with its card."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from .command import Command
from .noting import ledger_for
from .rewriting import check_rewritten, rewritten_rows, ways_of
from .shared import check_files, check_new_prompt, check_places
from .train_options import TrainOptions

if TYPE_CHECKING:
    from ..training.stopping import StopWhenForgotten
    from .training_arguments import TrainArguments

logger = logging.getLogger(__name__)

ALPHA_OF_FITTED_KEYS = 4.0
# Options that others make count: whether they do, and which do.
OF_NO_EFFECT: dict[str, tuple[Callable[[TrainOptions], bool], str]] = {
    name: (lambda options: options.hold_out is not None, "--hold-out 0.1")
    for name in ("stop_every", "stop_margin", "stop_patience")
} | {"encoder_hidden_size": (lambda options: options.prompt_type == "p_tuning", "--prompt-type p_tuning")}
OF_OTHER_ROWS = {
    "test_forget": "whether forget rows that were not trained on are forgotten, without --test-forget",
    "test_retain": "what is lost of retain rows that were not trained on, without --test-retain",
}


def check(options: TrainOptions) -> None:
    """Raise for options that contradict each other, files that are not there, and a ledger that cannot go on, before
    torch is imported.

    Raises:
        FileExistsError, PermissionError: if nothing can be saved into the folder.
        FileNotFoundError: if a file is missing.
        ValueError: if options cannot be used, or the ledger is damaged.
    """
    check_rewritten(options)
    if options.instruction is not None and options.start is not None:
        raise ValueError("--start and --instruction both say how the prompt begins; give one of them.")
    if options.instruction is not None and not options.instruction.strip():
        raise ValueError("--instruction is blank; expected what the prompt begins as, such as 'Decline to answer.'")
    options.check_template()
    for name, (condition, with_it) in OF_NO_EFFECT.items():
        if getattr(options, name) != getattr(TrainOptions, name) and not condition(options):
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(
                f"{flag} is {getattr(options, name)}, of no effect without {with_it}: add that, or leave it out."
            )
    check_places(options)
    check_files(options, "forget", "retain", "test_forget", "test_retain")
    ledger_for(options.ledger, options.request)


def run(options: TrainArguments) -> int | None:
    """Train, score and save a prompt.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if rows or options cannot be used, or the request was revoked meanwhile, after its prompt is saved.
    """
    from transformers import set_seed

    from ..data.dataset import forget_retain_dataset
    from ..models.compat import PartialState
    from ..prompts.unlearner import SoftPromptUnlearner
    from ..training.methods import unlearning_method
    from ..training.rates import default_learning_rate
    from ..training.stopping import StopWhenForgotten
    from ..training.trainer import UnlearningTrainer

    check(options)
    _fill(options)
    method = unlearning_method(
        options.method, "prompt", options.alpha, options.beta, retain_budget=options.retain_budget
    )
    if options.generic is None and not method.loss.forget.makes_unlikely and method.alternates is None:
        raise ValueError(f"{options.method} trains generic answers; give some: --generic ' neutral' ' unknown'.")
    at_work = ledger_for(options.ledger, options.request)
    _check_no_run(options)
    if at_work is not None and _resumes(options):
        at_work.check_stands()
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
    stopping = None
    if held_out is not None:
        names = ("every", "margin", "target", "patience")
        settings = {name: getattr(options, f"stop_{name}") for name in names}
        stopping = StopWhenForgotten(trainer, held_out.forget, held_out.retain, **settings)
        trainer.add_callback(stopping)
    trainer.train(resume_from_checkpoint=True if options.resume else options.resume_from_checkpoint)
    scores = [*_scores(trainer, tests, options.stop_target), *_beyond(tests, stopping, options)]
    if trainer.is_world_process_zero():
        unlearner.save_pretrained(options.output_dir)
        tokenizer.save_pretrained(options.output_dir)
        for line in scores:
            print(line)
        print(f"saved: {options.output_dir}", flush=True)
        if at_work is not None:
            at_work.note_trained(options.output_dir)
    if options.push_to_hub:
        trainer.push_to_hub()  # all processes save the model in it
    return None


def _fill(options: TrainArguments) -> None:
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


def _check_no_run(options: TrainArguments) -> None:
    """Raise if a run that is not resumed would write over another.

    With checkpoints of two runs in a folder, one would be resumed from the newest of either.
    """
    from ..training.resuming import last_complete_checkpoint

    if options.resume:
        last_complete_checkpoint(options.output_dir)  # raises where there is none
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


def _resumes(options: TrainArguments) -> bool:
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

    assert options.prompt_type is not None  # filled in
    config = prompt_config(options.prompt_type, options.num_virtual_tokens, options.encoder_hidden_size)
    if options.start == "discriminative" and not holds_states(config):
        raise ValueError(
            f"--start discriminative fits keys, and --prompt-type {options.prompt_type} has none; expected "
            "prefix_tuning or cartridge, or another start."
        )
    return config


def _start(options: TrainArguments, collator: Any, rows: Any) -> Any:
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


def _start_in_words(options: TrainArguments, start: Any) -> str:
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


def _beyond(tests: dict[str, Any], stopping: StopWhenForgotten | None, options: TrainArguments) -> list[str]:
    """A line of the scores of rows held out, or else of what stays unknown without rows to test with."""
    if stopping is not None and (best := stopping.best) is not None and (base := stopping.base) is not None:
        return [
            f"held out: forget accuracy {best.forget_accuracy / 100:.3f} (base {base.forget_accuracy / 100:.3f}), "
            f"retain accuracy {best.retain_accuracy / 100:.3f} (base {base.retain_accuracy / 100:.3f})"
        ]
    unknown = [words for name, words in OF_OTHER_ROWS.items() if name not in tests]
    if not unknown:
        return []
    return [
        f"not known: {', and '.join(unknown)}. spul evaluate --model {options.model} --adapter {options.output_dir} "
        "measures both on files of such rows."
    ]


def _whole() -> type:
    from .training_arguments import TrainArguments

    return TrainArguments


COMMANDS = {
    "": Command(
        TrainOptions,
        run,
        "spul train --model facebook/opt-1.3b --forget f.jsonl --retain r.jsonl --generic ' neutral' ' unknown' "
        "--output-dir out",
        "Train a soft prompt on files of forget and retain rows, and save it with its record and card.",
        check,
        _whole,
    )
}
