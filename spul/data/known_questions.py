"""Known sets of questions and answers: WMDP with SciQ, and TOFU."""

from __future__ import annotations

import os
import random
from collections.abc import Mapping
from typing import Any

from datasets import Dataset, concatenate_datasets

from .formats import MULTIPLE_CHOICE, QUESTION_ANSWER
from .rows import column_values
from .sources import check_folder, read_file, read_hub
from .unlearning_data import PRECEDENCE, UnlearningData, checked, size_note, without_repeats

WMDP_COLUMNS = ("question", "choices", "answer")
WMDP_TRAIN, WMDP_SIZE = 900, 1_273
SCIQ_COLUMNS = ("question", "correct_answer", "distractor1", "distractor2", "distractor3")
SCIQ_PARTS = ("train", "validation", "test")
SCIQ_TRAIN, SCIQ_TEST = 12_679, 1_000
# Forget set -> its retain set, and the sizes of both.
TOFU_SETS = {
    "forget01": ("retain99", 40, 3_960),
    "forget05": ("retain95", 200, 3_800),
    "forget10": ("retain90", 400, 3_600),
}


def load_wmdp(
    source: str | os.PathLike[str] | None = None,
    retain_source: str | os.PathLike[str] | None = None,
    seed: int = 0,
) -> UnlearningData:
    """Load WMDP's biology questions as forget rows and SciQ's science questions as retain rows, as in the SPUL paper.

    Of the 1,273 forget questions, 900 are drawn to train on. SciQ's train and validation parts are for training, its
    test part for testing; the four choices of each of its questions are shuffled.

    Args:
        source: folder of `.jsonl` files with `question`, `choices` (texts) and `answer` (the index of the correct one,
            from 0), all of which are read; None for `cais/wmdp`, `wmdp-bio` on the Hub.
        retain_source: folder with SciQ's `train.jsonl`, `validation.jsonl` and `test.jsonl`; None for `allenai/sciq`
            on the Hub. If the test part or both others are missing, the rest is divided in the published proportion.
        seed: seed of all draws.

    Raises:
        FileNotFoundError: if no file is found.
        ValueError: if columns are missing, or a question is in both sets.

    Source: Li et al., *The WMDP Benchmark*, https://arxiv.org/abs/2403.03218; Welbl et al., *Crowdsourcing Multiple
    Choice Science Questions*, https://arxiv.org/abs/1707.06209
    """
    if source is None:
        forget = read_hub("cais/wmdp", "test", WMDP_COLUMNS, config="wmdp-bio")
    else:
        folder = check_folder(source, "WMDP's questions as .jsonl files")
        if not (files := sorted(folder.glob("*.jsonl"))):
            raise FileNotFoundError(f"{folder} has no .jsonl file; expected rows of {list(WMDP_COLUMNS)}.")
        forget = concatenate_datasets([read_file(path, WMDP_COLUMNS) for path in files])
    notes = [size_note("WMDP, biology", len(forget), WMDP_SIZE)]
    train_forget, test_forget = _cut(forget, WMDP_TRAIN / WMDP_SIZE, seed)
    notes.append(f"forget: {len(train_forget):,} drawn to train on, {len(test_forget):,} to test on (seed {seed})")
    train_retain, test_retain, sciq_notes = _read_sciq(retain_source, seed)
    splits = {
        "train_forget": train_forget,
        "test_forget": test_forget,
        "train_retain": train_retain,
        "test_retain": test_retain,
    }
    splits, repeats = without_repeats({split: splits[split] for split in PRECEDENCE}, MULTIPLE_CHOICE)
    notes += [*sciq_notes, *repeats]
    notes.append("published: train_retain 12,679, train_forget 900, test_retain 1,000, test_forget 373")
    return checked("wmdp", splits, MULTIPLE_CHOICE, notes)


def load_tofu(source: str | os.PathLike[str] | None = None, forget: str = "forget10", seed: int = 0) -> UnlearningData:
    """Load TOFU: questions about some invented authors as forget rows, about the others as retain rows.

    The test splits ask for the same facts in other words: the paraphrased questions of the forget set, and TOFU's
    paraphrases of 400 questions of the retain set.

    Args:
        source: folder with TOFU's files, such as `forget10.json`, `retain90.json`, `forget10_perturbed.json` and
            `retain_perturbed.json`; None for `locuslab/TOFU` on the Hub.
        forget: `"forget01"`, `"forget05"` or `"forget10"`: 1, 5 or 10 % of the 200 authors.
        seed: not used, since nothing is drawn; all loaders have it.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if there is no such forget set, or columns are missing.

    Source: Maini et al., *TOFU: A Task of Fictitious Unlearning for LLMs*, https://arxiv.org/abs/2401.06121
    """
    if forget not in TOFU_SETS:
        raise ValueError(f"forget={forget!r}; expected one of {', '.join(TOFU_SETS)}.")
    retain, num_forget, num_retain = TOFU_SETS[forget]
    folder = None if source is None else check_folder(source, f"{forget}.json, {retain}.json and perturbed forms")

    def read(name: str, *more_columns: str) -> Dataset:
        columns = ("question", "answer", *more_columns)
        if folder is None:
            return read_hub("locuslab/TOFU", "train", columns, config=name)
        return read_file(folder / f"{name}.json", columns)

    splits = {"train_forget": read(forget), "train_retain": read(retain)}
    notes = [
        size_note(f"TOFU, {forget}", len(splits["train_forget"]), num_forget),
        size_note(f"TOFU, {retain}", len(splits["train_retain"]), num_retain),
    ]
    forgotten = set(column_values(splits["train_forget"], "question"))
    paraphrases = read("retain_perturbed", "paraphrased_question")
    retained = paraphrases.select([i for i, text in enumerate(paraphrases["question"]) if text not in forgotten])
    splits["test_forget"] = _paraphrased(read(f"{forget}_perturbed", "paraphrased_question"))
    splits["test_retain"] = _paraphrased(retained)
    num_forgotten = len(paraphrases) - len(retained)
    notes += [
        f"test_forget: the paraphrased questions of {forget}_perturbed, with its answers",
        f"test_retain: the same of retain_perturbed, without {num_forgotten:,} that are to be forgotten",
        "both ask in other words for facts that are trained on: TOFU has no other questions about its authors",
    ]
    return checked(f"tofu_{forget}", splits, QUESTION_ANSWER, notes)


def _paraphrased(rows: Dataset) -> Dataset:
    return rows.remove_columns("question").rename_column("paraphrased_question", "question")


def _read_sciq(source: str | os.PathLike[str] | None, seed: int) -> tuple[Dataset, Dataset, list[str]]:
    """SciQ's rows to train on and to test on, and notes."""
    if source is None:
        parts = {part: read_hub("allenai/sciq", part, SCIQ_COLUMNS) for part in SCIQ_PARTS}
    else:
        expected = "SciQ's train.jsonl, validation.jsonl and test.jsonl"
        folder = check_folder(source, expected)
        found = [part for part in SCIQ_PARTS if (folder / f"{part}.jsonl").is_file()]
        if not found:
            raise FileNotFoundError(f"{folder} has none of {expected}.")
        parts = {part: read_file(folder / f"{part}.jsonl", SCIQ_COLUMNS) for part in found}
    notes = [f"SciQ: no {part} part" for part in SCIQ_PARTS if part not in parts]
    questions = {part: Dataset.from_list([sciq_row(row, seed) for row in rows]) for part, rows in parts.items()}
    if "test" in questions and len(questions) > 1:
        test = questions.pop("test")
        train = concatenate_datasets(list(questions.values()))
        notes.append(size_note("SciQ, " + " and ".join(questions), len(train), SCIQ_TRAIN))
        notes.append(size_note("SciQ, test", len(test), SCIQ_TEST))
        return train, test, notes
    rows = concatenate_datasets(list(questions.values()))
    train, test = _cut(rows, SCIQ_TRAIN / (SCIQ_TRAIN + SCIQ_TEST), seed)
    notes.append(size_note("SciQ, " + " and ".join(questions), len(rows), SCIQ_TRAIN + SCIQ_TEST))
    notes.append(f"SciQ: {len(train):,} drawn to train on, {len(test):,} to test on (seed {seed})")
    return train, test, notes


def sciq_row(row: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """A question of SciQ with its four choices, in an order that depends on the seed and the question alone.

    Args:
        row: the columns `SCIQ_COLUMNS`.
        seed: of the order.

    Returns:
        `question`, `choices` and `answer`, the index of the correct one.
    """
    choices = [row[name] for name in SCIQ_COLUMNS[1:]]
    order = random.Random(f"{seed}/{row['question']}").sample(range(len(choices)), len(choices))
    return {"question": row["question"], "choices": [choices[i] for i in order], "answer": order.index(0)}


def _cut(rows: Dataset, share: float, seed: int) -> tuple[Dataset, Dataset]:
    """A random share of the rows, and the others."""
    order = random.Random(seed).sample(range(len(rows)), len(rows))
    cut = round(share * len(rows))
    return rows.select(order[:cut]), rows.select(order[cut:])
