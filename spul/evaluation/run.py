"""`evaluate`: all measures and attacks in one call, resumable and shared among processes."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import nn
from tqdm.auto import tqdm

from ..data.checks import check_rows, check_side
from ..data.collator import ForgetRetainCollator
from ..data.formats import QUESTION_ANSWER, PromptFormat
from ..data.row_checks import check_token_ids
from ..data.unlearning_data import SPLITS, UnlearningData
from ..models.causal_lm import bare_model, check_model, num_embeddings, unwrapped
from ..models.compat import PartialState, broadcast, gathered, is_sharded
from ..models.sharding import check_layers_alone
from ..models.unlearner import unlearner_of
from ..records.digests import DigestKey, read_digest_key
from ..records.files import write_text
from .aggregation import Key, Measurement
from .examples import attack_examples
from .measures import MEASURES, key_in_words
from .metrics.free_form import rouge_l
from .metrics.scoring import DivergedError, with_adapter_names
from .results import (
    EVALUATION_NAME,
    MEASUREMENTS_NAME,
    Evaluation,
    append_measurements,
    read_measurements,
    write_measurements,
)
from .settings import facts_of, published, settings_of
from .suite import AttackSettings, Suite, Task

SETTINGS_NAME = "settings.json"
PROGRESS_NAME = "progress-{}.jsonl"


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
        seed: seed of all draws.
        progress: whether to show a progress bar.
        digest_key: the owner's secret, as in `UnlearningTrainer`: report and `evaluation.json` then have the digests
            of rows that the adapter's record has. None (default) leaves counts alone.
        adapter_names: for each set of rows (split, name of neighbors, `"unseen"`) the names of the rows' prompts,
            `"__base__"` for none, or one name for all; a column `adapter_name` of the sets says the same. Measures
            that run under one prompt are skipped. By default all rows are under the active prompt.

    Raises:
        FileNotFoundError: if `digest_key` is the path of no file.
        ValueError: if rows of the collator's `max_length` or tokenizer do not fit the model, a split or
            `generic_completions` is missing, a split's column `is_forget` contradicts its name, a measure or set of
            questions is unknown, two of the models share a base, a model is sharded otherwise than by `shard_layers`,
            or `output_dir` holds another evaluation, files that are not an evaluation's, or damaged ones.
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
    if isinstance(measures, str):
        raise TypeError(f"measures={measures!r} is one name; expected a list: [{measures!r}].")
    if unknown := [name for name in measures if name not in MEASURES]:
        raise ValueError(f"measures {unknown} are not known; expected some of {', '.join(MEASURES)}.")
    if not isinstance(collator, ForgetRetainCollator):
        raise TypeError(f"collator is a {type(collator).__name__}; expected ForgetRetainCollator(tokenizer, [...]).")
    if not isinstance(splits, (UnlearningData, Mapping)):
        raise TypeError(f"splits is a {type(splits).__name__}; expected UnlearningData, or a dict of {list(SPLITS)}.")
    sets = {name: splits.rows(name) for name in SPLITS} if isinstance(splits, UnlearningData) else dict(splits)
    if missing := [name for name in SPLITS if name not in sets]:
        raise ValueError(f"splits lack {missing}; they have {list(sets)}.")
    sets = {name: sets[name] for name in SPLITS}
    others = {**(neighbors or {}), **({} if unseen is None else {"unseen": unseen})}
    for name, rows in {**sets, **others}.items():
        check_rows(rows, name=name)
        if name in sets:
            check_side(rows, name.endswith("_forget"), name)
    if not collator.generic_completions:
        raise ValueError("the collator has no generic_completions; give it those that count as a generic answer.")
    given = {"model": model, "base": base, "retrained": retrained, "reference": reference}
    for name, one in given.items():
        if one is not None or name == "model":
            check_model(one, name)
    models = {name: unwrapped(one) for name, one in given.items() if one is not None}
    for name, one in models.items():
        if is_sharded(one):
            check_layers_alone(one, name)
        _check_prompt(name, one, measures)
        for rows in sets.values():
            check_token_ids(collator.encoder, rows, num_embeddings(one))
    bare = [bare_model(one) for one in models.values()]
    if len({id(one) for one in bare}) < len(bare):
        raise ValueError(
            f"{', '.join(models)} share a base; load each of them for itself, and leave base= out of them."
        )
    if other := sorted(set(questions or ()) - {"forget", "retain", "real_authors", "world_facts"}):
        raise ValueError(f"questions {other}: expected forget, retain, real_authors and world_facts.")
    if adapter_names is not None:
        named = _named(models["model"], {**sets, **others}, adapter_names)
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
        for name, rows in {**sets, **others}.items():
            collator.warn_of_cut_rows(rows, name)
    if "detached" not in suite.models:
        suite.skipped["detached"] = "give base=, since a fully fine-tuned model cannot be restored"
    if retrained is None:
        suite.skipped["retrained"] = "give retrained=, a model trained without the forget rows, as the yardstick"
    measured = [measure for name, measure in MEASURES.items() if name in measures]
    tasks: list[Task] = []
    for measure in measured:
        if suite.by_row and not measure.by_row:
            suite.skipped[measure.name] = "it runs under one prompt, and adapter_names gives rows prompts of their own"
        elif why := measure.why_skipped(suite):
            suite.skipped[measure.name] = why
        else:
            tasks += measure.tasks(suite)
    generating = ["always", "free-form"] if suite.is_free_form else ["always"]
    if any(MEASURES[task.keys[0].measure].generates in generating for task in tasks):
        rouge_l([], [])  # raises now, if rouge-score is missing
    settings = settings_of(suite, models, [measure.name for measure in measured])
    is_attacked = any(task.keys[0].measure == "input attack" for task in tasks)
    facts = facts_of(suite, key, attack_examples(suite) if is_attacked else None)
    folder = None if output_dir is None else Path(output_dir)
    found, failed = _measured(tasks, folder, settings, progress, together=suite.is_sharded)
    evaluation = Evaluation(published(settings), found, suite.skipped | failed, facts=facts)
    if output_dir is not None and PartialState().is_main_process:
        evaluation.save(output_dir)
        for path in Path(output_dir).glob(PROGRESS_NAME.format("*")):
            path.unlink()
    PartialState().wait_for_everyone()
    return evaluation


def _named(
    model: nn.Module, sets: Mapping[str, Dataset], adapter_names: Mapping[str, Sequence[str] | str]
) -> dict[str, Dataset]:
    """The sets of rows with a column that names each row's prompt."""
    if not isinstance(adapter_names, Mapping) or set(adapter_names) != set(sets):
        found = (
            f"for {sorted(adapter_names)}"
            if isinstance(adapter_names, Mapping)
            else f"a {type(adapter_names).__name__}"
        )
        raise ValueError(f"adapter_names is {found}; expected a dict with names for each set of rows: {sorted(sets)}.")
    return {name: with_adapter_names(model, rows, adapter_names[name], name) for name, rows in sets.items()}


def _check_prompt(name: str, model: nn.Module, measures: Sequence[str]) -> None:
    """Raise if a model is under a prompt of PEFT that the measures do not support."""
    unlearner = unlearner_of(model)
    try:
        unlearner.check_measurable()
    except TypeError as error:
        raise TypeError(f"{name}: {error}") from error
    if (
        "soft suffix" in measures
        and name in ("model", "retrained")
        and not (unlearner.follows_embeddings or unlearner.reads_tokens)
    ):
        raise TypeError(
            f"{name} is under a prompt of PEFT, which the soft suffix cannot follow; load it by "
            "SoftPromptUnlearner.from_pretrained, or leave 'soft suffix' out of measures."
        )


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
            found = _resumed(folder, settings)
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


def _check_folder(folder: Path, settings: dict[str, Any]) -> None:
    """Raise if a folder holds another evaluation, or one that is not of the settings beside it.

    It would be written over.
    """
    if (folder / EVALUATION_NAME).exists() and not (folder / SETTINGS_NAME).exists():
        raise ValueError(
            f"{str(folder)!r} holds {EVALUATION_NAME} without the {SETTINGS_NAME} that spul.evaluate writes first: "
            "not an evaluation that can be resumed, and not one to write over. Give another output_dir, or move it."
        )
    if not (folder / SETTINGS_NAME).exists():
        return
    theirs = _record(folder / SETTINGS_NAME)
    if other := sorted(name for name in settings | theirs if settings.get(name) != theirs.get(name)):
        raise ValueError(
            f"{str(folder)!r} holds an evaluation that differs in {', '.join(other)}; give another output_dir, or "
            "remove that one."
        )
    evaluation = folder / EVALUATION_NAME
    if evaluation.exists() and _record(evaluation).get("settings") != published(settings):
        raise ValueError(
            f"{EVALUATION_NAME} in {str(folder)!r} is not that of the {SETTINGS_NAME} beside it, and would be written "
            "over. Give another output_dir, or move it."
        )


def _record(path: Path) -> dict[str, Any]:
    """The dict in a JSON file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of JSON or UTF-8
        raise ValueError(
            f"{str(path)!r} cannot be read ({error}): it is damaged, or no file of spul. Remove it with the other "
            "files of that evaluation, or give another output_dir."
        ) from None
    if not isinstance(found, dict):
        raise ValueError(
            f"{str(path)!r} holds a {type(found).__name__}; expected the fields of an evaluation. It is no file of "
            "spul: give another output_dir."
        )
    return found


def _resumed(folder: Path, settings: dict[str, Any]) -> list[Measurement]:
    """The measurements of an interrupted run of the same evaluation in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / SETTINGS_NAME
    _check_folder(folder, settings)
    unknown = [name for name, model in settings["models"].items() if model["weights"] is None]
    if unknown and path.exists():
        warnings.warn(
            f"weights of {', '.join(unknown)} are not in memory and cannot be compared with those of the results in "
            f"{str(folder)!r}, which are taken for the same model's. If they are not, give another output_dir.",
            stacklevel=4,
        )
    write_text(path, json.dumps(settings, indent=1) + "\n")
    parts = sorted(folder.glob(PROGRESS_NAME.format("*")))
    found = [one for file in (folder / MEASUREMENTS_NAME, *parts) for one in read_measurements(file)]
    write_measurements(folder / MEASUREMENTS_NAME, found)  # without an incomplete last line
    for part in parts:
        part.unlink()
    return found
