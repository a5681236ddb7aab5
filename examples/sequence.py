"""Requests that arrive one after the other, and what is served after each: the methods that `five_requests.py`
and `eul_imdb.py` compare."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from peft import PrefixTuningConfig
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase, TrainingArguments, set_seed

from spul import (
    ForgetRetainCollator,
    SoftPromptUnlearner,
    UnlearningLayers,
    UnlearningLayersConfig,
    UnlearningTrainer,
    combine,
    fuse,
)
from spul.data.dataset import forget_retain_dataset
from spul.evaluation.metrics.scoring import score_completions
from spul.layers import gather_inputs
from spul.records.files import write_text
from spul.training.methods import Method

WIDE = UnlearningLayersConfig(reduction=0.5, train_down=False)

Served = Iterator[tuple[Any, float]]
"""After each request: the model that is served then, and the seconds that this request took."""


@dataclass
class Requests:
    """Requests on one base, in the order in which they come.

    Args:
        base: loads the base afresh.
        tokenizer: the base's.
        generic: what is answered about what is forgotten.
        train: the forget rows of each request.
        test: rows about the same things that were not trained on.
        retain: rows that nobody asks to forget, to train on.
        test_retain: the same to test on.
        retrain: trains a model as the base was, on some rows.
        folder: where prompts and layers are saved; one for each base, order and settings.
        settings: what the requests were made with, to be known by.
        seed: of the training.
        steps: training steps of one request, by method's part: `layers`, `wide`, `prompt`, `distill`.
        rates: learning rates by the same names.
        layers: the method whose loss the layers learn.
        generic_layers: another, which answers generically.
        prompt: the method whose loss the prompts learn.
        num_virtual_tokens: of a prompt.
        layers_config: the layers' shape, EUL's.
        wide_config: another, wide and with a fixed down projection, that is easier to fuse.
        batch_size: rows per step.
        max_length: tokens of a row.
        bf16: train under bfloat16 autocast.
    """

    base: Callable[[], Any]
    tokenizer: PreTrainedTokenizerBase
    generic: list[str]
    train: list[Dataset]
    test: list[Dataset]
    retain: Dataset
    test_retain: Dataset
    retrain: Callable[[Dataset], Any]
    folder: Path
    settings: str
    seed: int
    steps: dict[str, int]
    rates: dict[str, float]
    layers: Method
    generic_layers: Method
    prompt: Method
    num_virtual_tokens: int = 30
    layers_config: UnlearningLayersConfig = field(default_factory=UnlearningLayersConfig)
    wide_config: UnlearningLayersConfig = WIDE
    batch_size: int = 32
    max_length: int = 512
    bf16: bool = False

    # ---- rows ----

    def forget(self, requests: range) -> Dataset:
        """The forget rows of some requests."""
        return concatenate_datasets([self.train[i] for i in requests])

    def kept(self, after: int) -> Dataset:
        """What is to be kept after request `after`: the retain rows and what nobody has asked to forget yet."""
        return concatenate_datasets([self.retain, *self.train[after + 1 :]])

    def scoring(self) -> ForgetRetainCollator:
        """The collator to score with."""
        return ForgetRetainCollator(self.tokenizer, self.generic, max_length=self.max_length, seed=self.seed)

    def arguments(self, part: str, steps: int | None = None) -> TrainingArguments:
        """The training arguments of a method's part."""
        return TrainingArguments(
            str(self.folder / "checkpoints"),
            max_steps=self.steps[part] if steps is None else steps,
            per_device_train_batch_size=self.batch_size,
            learning_rate=self.rates[part],
            lr_scheduler_type="cosine",
            warmup_steps=0.1,
            weight_decay=1e-3,
            max_grad_norm=1.0,
            save_strategy="no",
            report_to="none",
            logging_steps=50,
            bf16=self.bf16,
            use_cpu=not torch.cuda.is_available(),
            seed=self.seed,
        )

    def train_on(self, model: Any, method: Method, part: str, forget: Dataset, retain: Dataset) -> None:
        """Have a prompt or layers learn a request; half of every batch are forget rows."""
        set_seed(self.seed)
        collator = method.collator(self.tokenizer, self.generic, max_length=self.max_length, seed=self.seed)
        rows = forget_retain_dataset(forget=forget, retain=retain)
        trainer = UnlearningTrainer(model, self.arguments(part), collator, rows, loss=method.loss, forget_fraction=0.5)
        trainer.train()
        trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # scored in the weights' own precision

    # ---- methods ----

    def new_prompt(self) -> SoftPromptUnlearner:
        """A fresh prompt on a fresh base."""
        set_seed(self.seed)
        config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=self.num_virtual_tokens)
        return SoftPromptUnlearner(self.base(), config, loss=self.prompt.loss)

    def prompt_of(self, i: int) -> tuple[Path, float]:
        """The folder of request i's own prompt, trained if it is not there, and the seconds that this took."""

        def train(folder: Path) -> None:
            unlearner = self.new_prompt()
            self.train_on(unlearner, self.prompt, "prompt", self.train[i], self.kept(i))
            unlearner.save_pretrained(str(folder))

        return once(self.folder / f"prompt-{i}", train)

    def layers_of(self, i: int, method: Method, wide: bool = False) -> tuple[Path, float]:
        """The folder of request i's own layers, trained and gathered if they are not there, and the seconds.

        Those of the published shape gather their forget set alone, as published; wide ones some retain rows too.
        """

        def train(folder: Path) -> None:
            layers = UnlearningLayers(self.base(), self.wide_config if wide else self.layers_config)
            self.train_on(layers, method, "wide" if wide else "layers", self.train[i], self.kept(i))
            some = self.retain.shuffle(seed=self.seed).select(range(min(500, len(self.retain)))) if wide else None
            gather_inputs(layers, self.train[i], self.scoring(), self.batch_size, retain=some)
            layers.save_pretrained(folder)

        return once(self.folder / f"{'wide-' if wide else ''}layers-{method.name}-{i}", train)

    def alone(self, kind: str) -> Served:
        """Each request's own prompt or layers, on their own: what the combined ones are held against."""
        for i in range(len(self.train)):
            if kind == "prompt":
                folder, seconds = self.prompt_of(i)
                yield SoftPromptUnlearner.from_pretrained(self.base(), folder), seconds
            else:
                method = self.layers if kind == "layers" else self.generic_layers
                folder, seconds = self.layers_of(i, method, wide=kind == "wide layers")
                yield UnlearningLayers.from_pretrained(self.base(), folder), seconds

    def fused(self, method: Method, wide: bool = False) -> Served:
        """Layers of each request, fused."""
        folders = []
        for i in range(len(self.train)):
            folder, seconds = self.layers_of(i, method, wide)
            folders.append(folder)
            start = time.perf_counter()
            yield fuse(folders, self.base()), seconds + time.perf_counter() - start

    def one_set_of_layers(self, method: Method) -> Served:
        """One set of layers, trained on with each request."""
        layers = UnlearningLayers(self.base(), self.layers_config)
        for i in range(len(self.train)):
            start = time.perf_counter()
            self.train_on(layers, method, "layers", self.train[i], self.kept(i))
            yield layers, time.perf_counter() - start

    def combined(self, how: str) -> Served:
        """Prompts of each request, made one: concatenated, or distilled, with or without the forget sets.

        Distilled from all of them at each request, or one by one: from the one that was served and the new one.
        """
        folders = []
        for i in range(len(self.train)):
            folder, seconds = self.prompt_of(i)
            folders.append(folder)
            start = time.perf_counter()
            if i == 0:
                served = SoftPromptUnlearner.from_pretrained(self.base(), folders[0])
            elif how == "concatenate":
                served = combine(self.base(), folders)
            else:
                rows = forget_retain_dataset(forget=self.forget(range(i + 1)), retain=self.kept(i))
                parts = [self.folder / "distilled", folder] if how == "distill one by one" else folders
                settings: dict[str, Any] = {"loss": self.prompt.loss, "forget_fraction": 0.5}
                if how == "distill without forget sets":  # only what the prompts do over unmarked rows
                    rows, settings = rows.remove_columns("is_forget").shuffle(seed=self.seed), {}
                served = combine(
                    self.base(),
                    parts,
                    method="distill",
                    train_dataset=rows,
                    data_collator=self.scoring(),
                    args=self.arguments("distill"),
                    **settings,
                )
            if how == "distill one by one":
                served.save_pretrained(str(self.folder / "distilled"))
            yield served, seconds + time.perf_counter() - start

    def prompt_on_all(self) -> Served:
        """A fresh prompt for all requests so far, trained anew after each."""
        for i in range(len(self.train)):
            start = time.perf_counter()
            unlearner = self.new_prompt()
            self.train_on(unlearner, self.prompt, "prompt", self.forget(range(i + 1)), self.kept(i))
            yield unlearner, time.perf_counter() - start

    def retrained(self) -> Served:
        """The base's own recipe on what is kept."""
        for i in range(len(self.train)):
            start = time.perf_counter()
            yield self.retrain(self.kept(i)), time.perf_counter() - start

    def methods(self) -> dict[str, Callable[[], Served]]:
        """What there is to compare, by the name in the table."""
        return {
            "each request's own prompt": lambda: self.alone("prompt"),
            "each request's own layers, EUL": lambda: self.alone("layers"),
            "each request's own layers, generic answer": lambda: self.alone("generic layers"),
            "each request's own layers, wide, generic answer": lambda: self.alone("wide layers"),
            "EUL, fused": lambda: self.fused(self.layers),
            "EUL, one set of layers trained on": lambda: self.one_set_of_layers(self.layers),
            "layers, generic answer, fused": lambda: self.fused(self.generic_layers),
            "layers, wide, generic answer, fused": lambda: self.fused(self.generic_layers, wide=True),
            "prompts concatenated": lambda: self.combined("concatenate"),
            "prompts distilled": lambda: self.combined("distill"),
            "prompts distilled, one by one": lambda: self.combined("distill one by one"),
            "prompts distilled without forget sets": lambda: self.combined("distill without forget sets"),
            "one prompt trained on all": self.prompt_on_all,
            "retrained": self.retrained,
        }

    # ---- what is measured ----

    def score(self, model: Any, after: int) -> dict[str, Any]:
        """Accuracy on each request's rows, on what is kept and on test rows."""
        collator = self.scoring()

        def accuracy(rows: Dataset) -> float:
            return score_completions(model, rows, collator, 128)["accuracy"]

        return {
            "forget": [accuracy(rows) for rows in self.train],
            "test_forget": [accuracy(rows) for rows in self.test],
            "retain": accuracy(self.retain),
            "test_retain": accuracy(self.test_retain),
        }


def once(folder: Path, train: Callable[[Path], None]) -> tuple[Path, float]:
    """Train into a folder, if that was not done before; the folder, and the seconds that it took."""
    note = folder / "seconds.json"
    if not note.exists():
        start = time.perf_counter()
        train(folder)
        write_text(note, json.dumps(time.perf_counter() - start))
    return folder, float(json.loads(note.read_text(encoding="utf-8")))


def run(
    requests: Requests,
    path: Path,
    order: int,
    names: list[str] | None = None,
    extra: Callable[[Any, int], dict[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """Run the methods, one JSON line for each after each request; methods that are there to the end are not redone.

    Args:
        requests: what comes.
        path: the file of results.
        order: the number of this order of requests.
        names: which methods; all unless given.
        extra: further measures of a served model after request i.
    """
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    key = {"order": order, "seed": requests.seed, "settings": requests.settings}
    chosen = {name: served for name, served in requests.methods().items() if names is None or name in names}
    for name, served in tqdm(chosen.items(), desc=f"order {order}, seed {requests.seed}"):
        mine = [line for line in lines if line["method"] == name and {k: line[k] for k in key} == key]
        if len(mine) == len(requests.train):
            continue
        tqdm.write(name)
        found = []
        for i, (model, seconds) in enumerate(served()):
            scores = requests.score(model, i) | (extra(model, i) if extra else {})
            found.append({"method": name, **key, "requests": i + 1, "seconds": seconds, **scores})
            forgotten = ", ".join(f"{100 * share:.0f}" for share in scores["test_forget"])
            tqdm.write(f"  after {i + 1}: test forget {forgotten}; test retain {100 * scores['test_retain']:.1f}")
            del model
            gc.collect()
        lines = [line for line in lines if line not in mine] + found
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return lines
