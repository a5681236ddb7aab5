"""`spul combine`: several saved prompts made one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .command import Command
from .rewriting import check_rewritten, rewritten_rows, ways_of
from .shared import check_files, check_new_prompt, check_places, prompts_left_out, saved_prompt
from .train_options import CombineOptions

if TYPE_CHECKING:
    from .training_arguments import CombineArguments


def check(options: CombineOptions) -> None:
    """Raise for options that contradict each other and files that are not there, before torch is imported.

    Raises:
        FileExistsError, PermissionError: if nothing can be saved into the folder.
        FileNotFoundError: if a file is missing.
        ValueError: if options cannot be used.
    """
    is_marked = options.forget is not None
    if is_marked == (options.inputs is not None) or is_marked != (options.retain is not None):
        raise ValueError(
            "give --forget and --retain, the rows of all requests and those that stay; or --inputs alone."
        )
    if is_marked and options.generic is None:
        raise ValueError("forget rows are trained to generic answers; give some: --generic ' neutral' ' unknown'.")
    if not is_marked:
        marked = ("alpha", "beta", "forget_fraction", "reference", "reference_dir", "digest_key", "rewritten")
        if given := [name for name in marked if getattr(options, name) != getattr(CombineOptions, name)]:
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise ValueError(f"{flags}: of no effect on inputs, only on forget and retain; leave it out.")
    check_rewritten(options)
    options.check_template()
    check_places(options)
    check_files(options, "forget", "retain", "inputs")


def run(options: CombineArguments) -> int | None:
    """Distill prompts into one, and save it.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if rows or options cannot be used.
    """
    from ..data.collator import ForgetRetainCollator
    from ..data.dataset import forget_retain_dataset
    from ..losses.unlearning_loss import UnlearningLoss
    from ..training.distillation import check_no_upload, combine

    check(options)
    if options.resume_from_checkpoint is not None:
        raise ValueError(
            f"resume_from_checkpoint={options.resume_from_checkpoint!r}: combining is not resumed; leave it out."
        )
    check_no_upload(options)
    for folder, others in prompts_left_out(options.prompts).items():
        raise ValueError(f"{folder} also holds the prompts {others}, which would be left out: name each one's folder.")
    own: dict[str, Any] = {}
    ways = None
    if options.forget and options.retain:
        forget, retain = options.rows(options.forget, True), options.rows(options.retain, False)
        answered, alone = {"forget": forget}, {"retain": retain}
        rows = forget_retain_dataset(forget, retain)
        ways = ways_of(options, rows)
        own = {"forget_fraction": options.forget_fraction or None, "loss": UnlearningLoss(options.alpha, options.beta)}
        own |= {"reference": options.reference, "reference_dir": options.reference_dir}
        own |= {"digest_key": options.digest_key}
    else:
        rows = options.rows(options.inputs or [])
        answered, alone = {}, {"inputs": rows}
        if "is_forget" in rows.column_names:
            raise ValueError("inputs have the column is_forget; give forget and retain rows as such, or drop it.")
    check_new_prompt(options.output_dir)
    saved = [saved_prompt(folder) for folder in options.prompts]
    tokenizer = options.load_tokenizer(options.model)
    said = options.warn_of_boundaries(tokenizer, answered, alone)
    base = options.load(options.model)
    # The new prompt stands where the others do, and all of them need room.
    lengths, position = [one.config.num_virtual_tokens for one in saved], saved[0].spul_config.prompt_position
    settings = options.collator_options(base, max(*lengths, options.num_virtual_tokens or 1), position)
    collator = ForgetRetainCollator(tokenizer, options.generic, seed=options.seed, **settings)
    collator.encoder.said_completions = said
    if ways is not None:
        rows = rewritten_rows(options, rows, ways, collator)
    combined = combine(
        base,
        options.prompts,
        train_dataset=rows,
        data_collator=collator,
        args=options,
        num_virtual_tokens=options.num_virtual_tokens,
        processing_class=tokenizer,
        **own,
    )
    if options.process_index == 0:
        combined.save_pretrained(options.output_dir)
        tokenizer.save_pretrained(options.output_dir)
        print(f"saved: {options.output_dir}")
    return None


def _whole() -> type:
    from .training_arguments import CombineArguments

    return CombineArguments


COMMANDS = {
    "": Command(
        CombineOptions,
        run,
        "spul combine --model facebook/opt-1.3b --prompts request-1 request-2 --forget f1.jsonl f2.jsonl "
        "--retain r.jsonl --generic ' unknown' --output-dir requests-1-2",
        "Distill several saved prompts of one base into one.",
        check,
        _whole,
    )
}
