"""Setups of experiments, runs of methods on them, and the file of completed runs."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import toy_quiz
import toy_reviews
from peft import PeftConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig
from torch import Tensor
from transformers import AutoConfig

from paper.tables import read_runs
from spul.data import MULTIPLE_CHOICE, QUESTION_ANSWER, SENTIMENT, PromptFormat
from spul.losses import LossTerm
from spul.records.files import write_text
from spul.training.methods import Method, unlearning_method

if TYPE_CHECKING:
    from paper.experiment import Experiment


TOYS = {"reviews": toy_reviews, "quiz": toy_quiz}
TASKS = {"sentiment": SENTIMENT, "multiple-choice": MULTIPLE_CHOICE, "question-answer": QUESTION_ANSWER}
SMALL = "small"  # the model that the toy data sets build
PROMPT_TYPES = ("prompt_tuning", "p_tuning", "prefix_tuning")
# Fields of a setup that are locations; the contents are in the digests.
PLACES = ("dataset", "model", "data_dir", "retain_dir")
# Fields that do not apply to the toy data sets and their model.
NOT_FOR_TOYS = ("task", "data_dir", "retain_dir", "forget_set", "limit", "memorize", "memorize_epochs", "memorize_lr")
NOT_FOR_TOYS += ("memorize_batch_size", "label_smoothing", "load_in_4bit", "blank_lines")
# Fields that do not affect the memorized models.
AFTERWARDS = ("limit_score", "load_in_4bit")


@dataclass(frozen=True)
class Setup:
    """The data, model and settings that all runs of an experiment share.

    Args:
        dataset: `sst2`, `yelp`, `wmdp`, `tofu` or `imdb`; `reviews` or `quiz`, the toys; or a Hub name or folder of
            four splits.
        task: the prompt format of a set in four splits, a key of `TASKS`.
        model: Hub name or folder of a causal LM; `small`, built from scratch, for the toys.
        seed: of data, memorizing and unlearning.
        data_dir: local folder of the data set; the Hub's unless given.
        retain_dir: local folder of SciQ, for `wmdp`.
        forget_set: `forget01`, `forget05` or `forget10`, for `tofu`.
        limit: maximum number of retain rows to train on.
        limit_score: maximum number of scored rows of each retain split; forget splits are scored whole.
        memorize: trainable of the memorizing stage: `qlora` (as published), `lora`, `full`, or `none` if the model
            knows the rows.
        memorize_epochs: passes over the rows in memorizing.
        memorize_lr: learning rate of memorizing.
        memorize_batch_size: rows per step of memorizing.
        label_smoothing: of memorizing.
        second_question: memorize who is named as well, so that a small model can be steered (SST-2 only).
        load_in_4bit: score and unlearn over weights in 4-bit NF4.
        dtype: type of the weights otherwise, and in memorizing; full models train badly in 16 bit.
        max_length: tokens of a row, virtual tokens excluded.
        bf16: train under bfloat16 autocast.
        blank_lines: separate the fields of a prompt by blank lines, as the authors' program does.
    """

    dataset: str
    model: str
    task: str = "sentiment"
    seed: int = 0
    data_dir: str | None = None
    retain_dir: str | None = None
    forget_set: str | None = None
    limit: int | None = None
    limit_score: int | None = None
    memorize: str = "qlora"
    memorize_epochs: float = 3
    memorize_lr: float = 1e-4
    memorize_batch_size: int = 32
    label_smoothing: float = 0.0
    second_question: bool = False
    load_in_4bit: bool = False
    dtype: str = "float32"
    max_length: int = 1024
    bf16: bool = True
    blank_lines: bool = False


DETACHABLE = (*PROMPT_TYPES, "layers")

EUL_TERMS = {
    "L_KL": ("forget", "kl"),
    "L_TASK": ("retain",),
    "L_LM": ("lm",),
    "L_KL, forget rows": ("forget",),
    "L_KL, retain rows": ("kl",),
}
"""EUL's three terms by their names in its paper, and the two halves of the first, as terms of an `UnlearningLoss`."""


@dataclass(frozen=True)
class NoTerm(LossTerm):
    """A term of 0, in the place of one that an ablation leaves out; forget rows keep their own completions."""

    makes_unlikely: ClassVar[bool] = True

    def token_losses(self, logits: Tensor, labels: Tensor, reference_logits: Tensor | None = None) -> Tensor:
        return 0.0 * logits[..., 0]


@dataclass(frozen=True)
class Run:
    """One method on an experiment.

    Args:
        method: a name of `spul.training.methods`.
        trainable: `full`, `lora`, `layers`, or a prompt type.
        learning_rate: of unlearning.
        steps: training steps of methods that see both groups; methods without retain rows take the number that
            shows as many forget rows. None: `epochs` count.
        epochs: passes over the rows that the method sees, without `steps`.
        batch_size: rows per step.
        forget_fraction: share of forget rows in a batch; None: that of the data.
        alpha: weight of the retain term; the method's own unless given.
        beta: weight of the KL term; the method's own unless given.
        num_virtual_tokens: p of a prompt.
        forget_size: share of the forget set that is trained on.
        max_grad_norm: norm to which gradients are clipped.
        draw_once: draw the generic response of a row once for all epochs, as the authors' program does, and not each
            time the row is seen.
        without: the term of EUL that is left out, a key of `EUL_TERMS`; none unless given.

    Raises:
        ValueError: if `without` is another name, or the method another one than EUL.
    """

    method: str
    trainable: str
    learning_rate: float
    steps: int | None = None
    epochs: float = 10
    batch_size: int = 32
    forget_fraction: float | None = None
    alpha: float | None = None
    beta: float | None = None
    num_virtual_tokens: int = 30
    forget_size: float = 1.0
    max_grad_norm: float = 0.3
    draw_once: bool = False
    without: str | None = None

    def __post_init__(self) -> None:
        if self.without is not None and (self.method != "EUL" or self.without not in EUL_TERMS):
            raise ValueError(
                f"without={self.without!r}, method={self.method!r}: expected EUL, and one of {', '.join(EUL_TERMS)}."
            )

    def unlearning_method(self) -> Method:
        """The method of spul for this run."""
        trainable: Any = "prompt" if self.trainable in PROMPT_TYPES else self.trainable
        method = unlearning_method(self.method, trainable, self.alpha, self.beta)
        if self.without is None:
            return method
        nothing: dict[str, Any] = {"forget": NoTerm(), "retain": 0.0, "kl": 0.0, "lm": 0.0}
        fields = {"forget": "forget", "retain": "alpha", "kl": "beta", "lm": "gamma"}
        removed = {fields[term]: nothing[term] for term in EUL_TERMS[self.without]}
        return dataclasses.replace(method, loss=dataclasses.replace(method.loss, **removed))


def with_blank_lines(task: PromptFormat) -> PromptFormat:
    """A prompt format with a blank line before each field but the first, as in the authors' program.

    The program has one template, of sentiment: `### Text: {text}`, `### Question: ...` and `### Sentiment:`, with an
    empty line before the second and the third. Other formats follow it.

    Raises:
        ValueError: if the template has a single field.
    """
    template = task.template.replace("\n###", "\n\n###")
    if template == task.template:
        raise ValueError(f"the template {task.template!r} has no second field, to put a blank line before.")
    return dataclasses.replace(task, template=template)


def prompt_config(prompt_type: str, num_virtual_tokens: int) -> PeftConfig:
    """PEFT's config of a prompt type; P-tuning with the paper's encoder of width 128."""
    if prompt_type == "p_tuning":
        return PromptEncoderConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=num_virtual_tokens, encoder_hidden_size=128
        )
    if prompt_type == "prefix_tuning":
        return PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=num_virtual_tokens)
    return PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=num_virtual_tokens, prompt_tuning_init="SAMPLE_VOCAB"
    )


def model_digest(name: str) -> str | None:
    """Digest of a model: SHA-256 of its weight files, or its commit on the Hub."""
    if name == SMALL:
        return None
    if not Path(name).is_dir():
        return AutoConfig.from_pretrained(name)._commit_hash
    digest = hashlib.sha256()
    for path in sorted(path for path in Path(name).iterdir() if path.suffix in (".safetensors", ".bin")):
        with path.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    return digest.hexdigest()


def is_made(record: Path, settings: dict[str, Any], key: str = "settings") -> bool:
    """Whether something is stored, by the JSON file that is written last, with these settings at `key`.

    Raises:
        ValueError: if it was made with other settings, or by an earlier version, which did not store them.
    """
    if not record.exists():
        return False
    if (known := json.loads(record.read_text(encoding="utf-8")).get(key)) is None:
        raise ValueError(f"{record} has no settings: an earlier version stored it. Take another --output-dir.")
    if known != settings:
        raise ValueError(f"{record.parent} was made with {known}, not with {settings}; take another --output-dir.")
    return True


def run_settings(run: Run) -> dict[str, Any]:
    """The settings of a run, with the default loss weights of the method where none are given."""
    loss = run.unlearning_method().loss
    settings = dataclasses.asdict(run) | {"alpha": loss.alpha, "beta": loss.beta}
    if run.trainable not in PROMPT_TYPES:
        settings["num_virtual_tokens"] = None
    return {name: value for name, value in settings.items() if name not in ("method", "trainable")}


def identity(record: dict[str, Any]) -> str:
    """The key of a stored run: all of its settings."""
    names = ("dataset", "model", "method", "trainable", "seed", "settings", "setup")
    return json.dumps([record[name] for name in names], sort_keys=True)


class Runs:
    """Runs stored in a file, each computed once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        found = read_runs(path) if path.exists() else []
        if path.exists() and not path.read_bytes().endswith(b"\n"):  # interrupted while writing
            write_text(path, "".join(json.dumps(run) + "\n" for run in found))
        self.known = {identity(run): run for run in found}

    def add(self, records: list[dict[str, Any]]) -> None:
        """Append runs to the file."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(record) + "\n" for record in records))  # in one go: all or none
        self.known.update({identity(record): record for record in records})

    def get(self, experiment: Experiment, run: Run | str) -> list[dict[str, Any]]:
        """The records of a run, or of a reference row by its name; computed if they are missing."""
        if isinstance(run, str):
            wanted = [identity(experiment.record(run, "none", {}, None, {}))]
        else:
            names = [run.method] + ([f"{run.method} detached"] if run.trainable in DETACHABLE else [])
            settings = run_settings(run)
            wanted = [identity(experiment.record(name, run.trainable, settings, None, {})) for name in names]
        if not all(key in self.known for key in wanted):
            self.add([experiment.reference_row(run)] if isinstance(run, str) else experiment.run(run))
        return [self.known[key] for key in wanted]
