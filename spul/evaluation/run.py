"""`evaluate`: all measures and attacks in one call, resumable and shared among processes."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import nn
from tqdm.auto import tqdm

from ..data.collator import ForgetRetainCollator, checked_collator
from ..data.formats import QUESTION_ANSWER, PromptFormat
from ..data.unlearning_data import UnlearningData
from ..models.compat import PartialState, broadcast, gathered
from ..records.digests import DigestKey, read_digest_key
from .aggregation import Key, Measurement
from .attack_settings import AttackSettings
from .checks import check_arguments, check_names, check_sets_can_be_scored, checked_models, checked_splits, named_sets
from .examples import attack_examples
from .measures import MEASURES, Measure, key_in_words
from .metrics.free_form import rouge_l
from .metrics.running_text import text_rows
from .metrics.scoring import DivergedError
from .metrics.tofu import question_rows
from .results import Evaluation, append_measurements
from .resuming import PROGRESS_NAME, remove_progress, resumed
from .settings import facts_of, published, settings_of
from .suite import Suite, Task


def evaluate(
    model: nn.Module,
    splits: UnlearningData | Mapping[str, Dataset],
    collator: ForgetRetainCollator,
    *,
    base: nn.Module | None = None,
    retrained: nn.Module | None = None,
    reference: nn.Module | None = None,
    unseen: Dataset | None = None,
    neighbors: Mapping[str, Dataset] | None = None,
    unrelated_texts: Sequence[str] = (),
    questions: Mapping[str, Dataset] | None = None,
    question_format: PromptFormat = QUESTION_ANSWER,
    measures: Sequence[str] = tuple(MEASURES),
    attacks: AttackSettings | None = None,
    output_dir: str | os.PathLike | None = None,
    batch_size: int = 32,
    max_new_tokens: int = 200,
    free_form: bool = False,
    seed: int = 0,
    progress: bool = True,
    digest_key: DigestKey | None = None,
    adapter_names: Mapping[str, Sequence[str] | str] | None = None,
) -> Evaluation:
    """Measure forgetting, utility, privacy and robustness of an unlearned model, beside its controls.

    The controls are the model before unlearning (*detached*: the prompt, the layers or LoRA disabled, or `base`) and,
    if given, a model `retrained` without the forget rows, the baseline. The evaluation page of the documentation
    defines each metric.

    With `output_dir` results are written as they come, and the same call resumes an interrupted evaluation. Under
    `accelerate launch` the tasks are shared among the processes, each with the models on its own device; models that
    are sharded (`spul.models.shard_layers`) are run by all of them together. The results are those of one process.

    Args:
        model: the unlearned causal LM: under a prompt of spul, unlearning layers or LoRA, or fully fine-tuned.
        splits: `train_retain`, `train_forget`, `test_retain` and `test_forget`, as `UnlearningData` or as data sets
            with `prompt` and `completion`.
        collator: for tokenizing and padding. Its `generic_completions` count as generic answers, its `text_field`
            names the text that attacks on the input change. Give it room (`max_length`) for what they add.
        base: the model before unlearning, where disabling an adapter does not restore it.
        retrained: a model that learned the retain rows and never saw the forget rows.
        reference: another model that never saw them, for the reference attack on membership.
        unseen: rows like the forget rows that no model was trained on; `test_forget` by default.
        neighbors: rows near the forget rows, by name; see `name_neighbors` and its like.
        unrelated_texts: running text.
        questions: TOFU's perturbed files: `forget`, and `retain`, `real_authors` and `world_facts` for model utility.
        question_format: format of their prompts and completions, as in training.
        measures: some of `MEASURES`; all by default.
        attacks: settings of the attacks.
        output_dir: a folder for results, one for each evaluation.
        batch_size: rows per forward.
        max_new_tokens: tokens of a free-form answer; 200 by default, as in TOFU.
        free_form: score answers as free text (adds probability, ROUGE-L, ...), not as classes; implied by more than
            32 distinct answers.
        seed: seed of all draws, 0 to 2**32 - 1.
        progress: whether to show a progress bar.
        digest_key: the owner's secret, as in `UnlearningTrainer`: report and `evaluation.json` then have the digests
            of rows that the adapter's record has. None (default) leaves counts alone.
        adapter_names: for each set of rows (split, name of neighbors, `"unseen"`) the names of the rows' prompts,
            `"__base__"` for none, or one name for all; a column `adapter_name` of the sets says the same. Measures
            that run under one prompt are skipped. By default all rows are under the active prompt.

    Raises:
        FileNotFoundError: if `digest_key` is the path of no file.
        ValueError: if rows of the collator's `max_length` or tokenizer do not fit the model, a row, a question or all
            texts together have nothing to score, a split or `generic_completions` is missing, a split's column
            `is_forget` contradicts its name, a measure or set of questions is unknown, two of the models share a base,
            a model is sharded otherwise than by `shard_layers`, the seed is out of range, or `output_dir` holds
            another evaluation, files that are not an evaluation's, or damaged ones.
        TypeError: if a model is given by the name of its folder, `splits`, `collator` or rows are of another type, or
            a model has a plain PEFT prompt whose type is unknown to spul, or any plain PEFT prompt where the soft
            suffix is measured.
        ImportError: if free-form answers are scored, and `rouge-score` is not installed.

    Example:
        ```python
        found = spul.evaluate(unlearner, data, collator, retrained=retrained, output_dir="out/evaluation")
        print(found.metric("utility", "test_forget", "accuracy"))
        write_report(found, "out/evaluation")
        ```
    """
    key = None if digest_key is None else read_digest_key(digest_key)
    check_names(measures, questions or ())
    check_arguments(
        {
            "neighbors": neighbors,
            "questions": questions,
            "question_format": question_format,
            "attacks": attacks,
            "seed": seed,
            "output_dir": output_dir,
            "unrelated_texts": unrelated_texts,
        }
    )
    checked_collator(collator)
    others = {**(neighbors or {}), **({} if unseen is None else {"unseen": unseen})}
    sets = checked_splits(splits, others)
    if not collator.generic_completions:
        raise ValueError("the collator has no generic_completions; give it those that count as a generic answer.")
    given = {"model": model, "base": base, "retrained": retrained, "reference": reference}
    models = checked_models(given, measures)
    asked = {
        f"questions {name}": question_rows(rows, question_format, f"questions {name}")[0]
        for name, rows in (questions or {}).items()
    }
    read = {**sets, **others, **asked}
    texts = {"unrelated_texts": text_rows(unrelated_texts, collator.encoder)} if len(unrelated_texts) else {}
    check_sets_can_be_scored(collator.encoder, {**read, **texts}, models.values())
    if adapter_names is not None:
        named = named_sets(models["model"], {**sets, **others}, adapter_names)
        sets, unseen = {name: named[name] for name in sets}, named.get("unseen")
        neighbors = {name: named[name] for name in neighbors or {}}
    suite = Suite(
        model=models["model"],
        splits=sets,
        collator=collator,
        base=models.get("base"),
        retrained=models.get("retrained"),
        reference=models.get("reference"),
        unseen=unseen,
        neighbors=neighbors or {},
        unrelated_texts=unrelated_texts,
        questions=questions or {},
        question_format=question_format,
        attacks=AttackSettings() if attacks is None else attacks,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        seed=seed,
        free_form=free_form,
    )
    if suite.room is not None and collator.encoder.max_length > suite.room:
        raise ValueError(
            f"the collator's max_length={collator.encoder.max_length} exceeds the {suite.room} tokens that the model "
            f"has room for beside its virtual ones; attacked rows may be long, so lower max_length to at most "
            f"{suite.room}."
        )
    if PartialState().is_main_process:
        for name, rows in read.items():
            collator.warn_of_cut_rows(rows, name)
    measured = [measure for name, measure in MEASURES.items() if name in measures]
    tasks = _tasks(suite, measured)
    settings = settings_of(suite, models, [measure.name for measure in measured])
    attacked = {(one.attack, one.level) for task in tasks for one in task.keys if one.measure == "input attack"}
    facts = facts_of(suite, key, attack_examples(suite, attacked) if attacked else None)
    folder = None if output_dir is None else Path(output_dir)
    found, failed = _measured(tasks, folder, settings, progress, together=suite.is_sharded)
    evaluation = Evaluation(published(settings), found, suite.skipped | failed, facts=facts)
    if folder is not None and PartialState().is_main_process:
        evaluation.save(folder)
        remove_progress(folder)
    PartialState().wait_for_everyone()
    return evaluation


def _tasks(suite: Suite, measures: Sequence[Measure]) -> list[Task]:
    """The tasks of measures, in their order; those that cannot be taken are noted in `suite.skipped`.

    Raises:
        ImportError: if texts are to be compared, and `rouge-score` is missing.
    """
    if "detached" not in suite.models:
        suite.skipped["detached"] = "give base=, since a fully fine-tuned model cannot be restored"
    if suite.retrained is None:
        suite.skipped["retrained"] = "give retrained=, a model trained without the forget rows, as the yardstick"
    tasks: list[Task] = []
    for measure in measures:
        if suite.by_row and not measure.by_row:
            suite.skipped[measure.name] = "it runs under one prompt, and adapter_names gives rows prompts of their own"
        elif why := measure.why_skipped(suite):
            suite.skipped[measure.name] = why
        else:
            tasks += measure.tasks(suite)
    generating = ["always", "free-form"] if suite.is_free_form else ["always"]
    if any(MEASURES[task.keys[0].measure].generates in generating for task in tasks):
        rouge_l([], [])  # raises now, if rouge-score is missing
    return tasks


def _measured(
    tasks: Sequence[Task], folder: Path | None, settings: dict[str, Any], progress: bool, together: bool
) -> tuple[list[Measurement], dict[str, str]]:
    """The measurements of all tasks, in their order: loaded if present, else taken, each task by one process.

    Or by all of them `together`. Also the measurements that a diverged model prevented, with the reason.
    """
    state = PartialState()
    found: list[Measurement] = []
    if folder is not None:
        if state.is_main_process:
            found = resumed(folder, settings)
        found = broadcast(found)
    done = {one.key for one in found}
    todo = [part for task in tasks for part in _missing(task, done)]
    loaded = sum(done.issuperset(task.keys) for task in tasks)
    if progress and state.is_main_process and loaded:
        tqdm.write(f"{loaded} of {len(tasks)} tasks are loaded from {folder}")
    new: list[Measurement] = []
    failed: list[tuple[str, str]] = []
    own = todo if together else todo[state.process_index :: state.num_processes]
    bar = tqdm(own, disable=not (progress and state.is_main_process))
    for task in bar:
        bar.set_description(key_in_words(task.keys[0]))
        measured, diverged = _run(task)
        failed += diverged
        if folder is not None and measured and (state.is_main_process or not together):
            append_measurements(folder / PROGRESS_NAME.format(state.process_index), measured)
        new += measured
    if state.num_processes > 1 and not together:
        new, failed = gathered(new), gathered(failed)
    by_key = {one.key: one for one in [*found, *new]}
    return [by_key[key] for task in tasks for key in task.keys if key in by_key], dict(failed)


def _missing(task: Task, done: set[Key]) -> Sequence[Task]:
    """The task unless it is done; where it is done in part, its missing parts, if it has any."""
    if done.issuperset(task.keys):
        return ()
    if task.parts and not done.isdisjoint(task.keys):
        return [part for part in task.parts if not done.issuperset(part.keys)]
    return (task,)


def _run(task: Task) -> tuple[list[Measurement], list[tuple[str, str]]]:
    """The measurements of a task, and those that a diverged model prevented, with the reason."""
    try:
        return task.run(), []
    except DivergedError as error:
        if not task.parts:
            return [], [(key_in_words(key), str(error)) for key in task.keys]
    found = [_run(part) for part in task.parts]
    return [one for some, _ in found for one in some], [one for _, some in found for one in some]
