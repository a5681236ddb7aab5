"""One call that tells how well something was forgotten, what else was lost, and whether it comes back."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import nn
from tqdm.auto import tqdm

from ..data.checks import check_rows
from ..data.collator import ForgetRetainCollator
from ..data.formats import QUESTION_ANSWER, PromptFormat
from ..data.unlearning_data import SPLITS, UnlearningData
from ..models.causal_lm import bare_model, unwrapped
from ..models.compat import PartialState, broadcast, gathered, is_sharded
from ..models.unlearner import unlearner_of
from ..records.files import write_text
from . import measures as measure_tasks
from .aggregation import Measurement, name_of_key
from .attacks import tasks as attack_tasks
from .metrics.free_form import rouge_l
from .metrics.scoring import DivergedError
from .results import MEASUREMENTS_NAME, Evaluation, append_measurements, read_measurements, write_measurements
from .settings import settings_of
from .suite import AttackSettings, Suite, Task

TASKS: dict[str, Callable[[Suite], Iterator[Task]]] = {
    "utility": measure_tasks.utility,
    "kl": measure_tasks.kl,
    "membership": measure_tasks.membership,
    "neighbors": measure_tasks.near,
    "unrelated text": measure_tasks.unrelated,
    "questions": measure_tasks.tofu,
    "input attack": attack_tasks.inputs,
    "relearning": attack_tasks.relearning,
    "quantized": attack_tasks.quantized,
    "sampling": attack_tasks.sampling,
    "soft suffix": attack_tasks.suffix,
    "linear probe": attack_tasks.probe,
}
MEASURES = tuple(TASKS)
"""What can be measured, in the order in which it is."""

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
    measures: Sequence[str] = MEASURES,
    attacks: AttackSettings | None = None,
    output_dir: str | os.PathLike | None = None,
    batch_size: int = 32,
    max_new_tokens: int = 200,
    free_form: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> Evaluation:
    """Is it forgotten, is the rest intact, can it be told that it was there, and does it come back?

    Measures the unlearned model; the model as it was before (*detached*: the prompt, the layers or LoRA taken off, or
    `base`); and, if given, one that was `retrained` without the forget rows, the yardstick. What each number means
    is on the evaluation page of the documentation.

    With `output_dir` results are written as they come, and the same call goes on where an interrupted one stopped.
    Under `accelerate launch` the pieces are shared out among the processes, each with the models on its own device;
    the numbers are those of one process.

    Args:
        model: the unlearned causal LM: under a prompt of spul, unlearning layers or LoRA, or tuned as a whole.
        splits: `train_retain`, `train_forget`, `test_retain` and `test_forget`, as `UnlearningData` or as data sets
            with `prompt` and `completion`.
        collator: for tokenizing and padding; its `generic_completions` are those counted as generic, its `text_field`
            the text that attacks on the input change. Give it room (`max_length`) for what they add.
        base: the model before unlearning, where it cannot be had by switching an adapter off.
        retrained: a model that learned the retain rows and never saw the forget rows.
        reference: another model that never saw them, for the reference attack on membership.
        unseen: rows like the forget rows that nobody trained on; `test_forget` unless given.
        neighbors: rows near to what is forgotten, by name; see `name_neighbors` and its like.
        unrelated_texts: running text.
        questions: TOFU's perturbed files: `forget`, and `retain`, `real_authors` and `world_facts` for model utility.
        question_format: how questions and answers become prompts and completions, as in training.
        measures: which of `MEASURES`.
        attacks: how the attacks are done.
        output_dir: a folder for results, one for each evaluation.
        batch_size: rows per forward.
        max_new_tokens: of a free-form answer; TOFU takes 200.
        free_form: whether answers are texts and no classes, so that probability, ROUGE-L and their like are measured,
            too; more than 32 different ones are in any case.
        seed: of all draws.
        progress: whether to show a progress bar.

    Raises:
        ValueError: if rows of the collator's `max_length` do not fit the model, a split or `generic_completions` is
            missing, a measure or set of questions is not known, two of the models are one, a model is sharded, or
            `output_dir` holds another evaluation.
        TypeError: if rows are no `datasets.Dataset`, or a model is under a prompt of plain PEFT, and that is of a type
            that spul does not know, or a soft suffix is asked for.
        ImportError: if free-form answers are to be scored, and `rouge-score` is not installed.

    Example:
        ```python
        found = spul.evaluate(unlearner, data, collator, retrained=retrained, output_dir="out/evaluation")
        print(found.number("utility", "test_forget", "accuracy"))
        write_report(found, "out/evaluation")
        ```
    """
    if unknown := [name for name in measures if name not in TASKS]:
        raise ValueError(f"measures {unknown} are not known; expected some of {', '.join(MEASURES)}.")
    sets = {name: splits.rows(name) for name in SPLITS} if isinstance(splits, UnlearningData) else dict(splits)
    if missing := [name for name in SPLITS if name not in sets]:
        raise ValueError(f"splits lack {missing}; they have {list(sets)}.")
    sets = {name: sets[name] for name in SPLITS}
    others = {**(neighbors or {}), **({} if unseen is None else {"unseen": unseen})}
    for name, rows in {**sets, **others}.items():
        check_rows(rows, name=name)
    if not collator.generic_completions:
        raise ValueError("the collator has no generic_completions; give it those that count as a generic answer.")
    given = {"model": model, "base": base, "retrained": retrained, "reference": reference}
    models = {name: unwrapped(one) for name, one in given.items() if one is not None}
    for name, one in models.items():
        if is_sharded(one):
            raise ValueError(f"{name} is sharded (FSDP, DeepSpeed); evaluate with the whole model in each process.")
        _check_prompt(name, one, measures)
    bare = [bare_model(one) for one in models.values()]
    if len({id(one) for one in bare}) < len(bare):
        raise ValueError(
            f"{', '.join(models)} share a base; load each of them for itself, and leave base= out of them."
        )
    if other := sorted(set(questions or ()) - {"forget", "retain", "real_authors", "world_facts"}):
        raise ValueError(f"questions {other}: expected forget, retain, real_authors and world_facts.")
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
            f"the collator has max_length={collator.encoder.max_length}, and the model room for {suite.room} tokens "
            f"beside its virtual ones; attacked rows may be long, so give one with max_length of at most {suite.room}."
        )
    if "detached" not in suite.models:
        suite.left_out["detached"] = "the model as it was; give base=, since one tuned as a whole has none within it"
    if retrained is None:
        suite.left_out["retrained"] = (
            "what forgetting should look like; give retrained=, trained without the forget rows"
        )
    tasks = [task for name in MEASURES if name in measures for task in TASKS[name](suite)]
    if any(_generates(task, suite) for task in tasks):
        rouge_l([], [])  # where rouge-score is missing, that is to be known now
    settings = settings_of(suite, models, [name for name in MEASURES if name in measures])
    found, failed = _measured(tasks, None if output_dir is None else Path(output_dir), settings, progress)
    suite.left_out |= failed
    evaluation = Evaluation(settings, found, suite.left_out)
    if output_dir is not None and PartialState().is_main_process:
        evaluation.save(output_dir)
        for path in Path(output_dir).glob(PROGRESS_NAME.format("*")):
            path.unlink()
    PartialState().wait_for_everyone()
    return evaluation


def _check_prompt(name: str, model: nn.Module, measures: Sequence[str]) -> None:
    """Raise if a model is under a prompt that the measures cannot follow, before any of them is taken."""
    unlearner = unlearner_of(model)
    try:
        unlearner.check_measurable()
    except TypeError as error:
        raise TypeError(f"{name}: {error}") from error
    if "soft suffix" in measures and name in ("model", "retrained") and not unlearner.follows_embeddings:
        raise TypeError(
            f"{name} is under a prompt of PEFT, which the soft suffix cannot follow; load it by "
            "SoftPromptUnlearner.from_pretrained, or leave 'soft suffix' out of measures."
        )


def _generates(task: Task, suite: Suite) -> bool:
    """Whether a task compares free-form answers with the true ones."""
    measure = task.produces[0][0]
    answered = ("utility", "neighbors", "input attack", "relearning", "quantized", "sampling")
    return measure == "questions" or (suite.is_free_form and measure in answered)


def _measured(
    tasks: Sequence[Task], folder: Path | None, settings: dict[str, Any], progress: bool
) -> tuple[list[Measurement], dict[str, str]]:
    """What all tasks give, in their order: read where it is there, else done, each task by one of the processes.

    Beside it which could not be done, since the model gives no numbers any more.
    """
    state = PartialState()
    found: list[Measurement] = []
    if folder is not None:
        if state.is_main_process:
            found = _resumed(folder, settings)
        found = broadcast(found)
    done = {one.key for one in found}
    todo = [task for task in tasks if not done.issuperset(task.produces)]
    if progress and state.is_main_process and len(todo) < len(tasks):
        tqdm.write(f"{len(tasks) - len(todo)} of {len(tasks)} pieces are read from {folder}")
    new: list[Measurement] = []
    failed: list[tuple[str, str]] = []
    bar = tqdm(todo[state.process_index :: state.num_processes], disable=not (progress and state.is_main_process))
    for task in bar:
        bar.set_description(name_of_key(task.produces[0]))
        try:
            measured = task.run()
        except DivergedError as error:
            failed += [(name_of_key(key), str(error)) for key in task.produces]
            continue
        if folder is not None:
            append_measurements(folder / PROGRESS_NAME.format(state.process_index), measured)
        new += measured
    if state.num_processes > 1:
        new, failed = gathered(new), gathered(failed)
    by_key = {one.key: one for one in [*found, *new]}
    return [by_key[key] for task in tasks for key in task.produces if key in by_key], dict(failed)


def _resumed(folder: Path, settings: dict[str, Any]) -> list[Measurement]:
    """What a folder has of the same evaluation."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / SETTINGS_NAME
    if path.exists():
        theirs = json.loads(path.read_text(encoding="utf-8"))
        if other := sorted(name for name in settings | theirs if settings.get(name) != theirs.get(name)):
            raise ValueError(
                f"{str(folder)!r} holds an evaluation that differs in {', '.join(other)}; give another output_dir, or "
                "remove that one."
            )
        if unknown := [name for name, model in settings["models"].items() if model["weights"] is None]:
            warnings.warn(
                f"weights of {', '.join(unknown)} are not in memory, so that it is not known whether what is in "
                f"{str(folder)!r} is of the same; it is taken to be. If not, give another output_dir.",
                stacklevel=4,
            )
    write_text(path, json.dumps(settings, indent=1) + "\n")
    parts = sorted(folder.glob(PROGRESS_NAME.format("*")))
    found = [one for file in (folder / MEASUREMENTS_NAME, *parts) for one in read_measurements(file)]
    write_measurements(folder / MEASUREMENTS_NAME, found)  # a line that was cut off is gone, before others follow it
    for part in parts:
        part.unlink()
    return found
