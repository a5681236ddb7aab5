"""Unlearning requests in turn, and the model served after each: methods that `five_requests.py` and `eul_imdb.py`
compare."""

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
"""After each request: the served model, and the seconds of the request."""


@dataclass
class Requests:
    """Unlearning requests on one base, in their order.

    Args:
        base: loads a fresh copy of the base.
        tokenizer: the base's.
        generic: generic completions of forget rows.
        train: the forget rows of each request.
        test: test rows of each request.
        retain: retain rows to train on.
        test_retain: retain rows to test on.
        retrain: trains a model on some rows by the recipe of the base.
        folder: of saved prompts and layers; one for each base, order and settings.
        settings: digest of the settings of the requests.
        seed: of training.
        steps: training steps of a request by part of a method: `layers`, `wide`, `prompt`, `distill`.
        rates: learning rates by the same names.
        layers: method of EUL's layers.
        generic_layers: method of layers that answer generically.
        prompt: method of the prompts.
        num_virtual_tokens: p of a prompt.
        layers_config: shape of EUL's layers.
        wide_config: shape of wide layers with a fixed down projection, which are easier to fuse.
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

    def retained(self, after: int) -> Dataset:
        """The rows to retain after request `after`: the retain rows and the forget rows of later requests."""
        return concatenate_datasets([self.retain, *self.train[after + 1 :]])

    def scoring(self) -> ForgetRetainCollator:
        """The collator for scoring."""
        return ForgetRetainCollator(self.tokenizer, self.generic, max_length=self.max_length, seed=self.seed)

    def arguments(self, part: str, steps: int | None = None) -> TrainingArguments:
        """The training arguments of a part of a method."""
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
        """Train a prompt or layers on a request; half of every batch are forget rows."""
        set_seed(self.seed)
        collator = method.collator(self.tokenizer, self.generic, max_length=self.max_length, seed=self.seed)
        rows = forget_retain_dataset(forget=forget, retain=retain)
        trainer = UnlearningTrainer(model, self.arguments(part), collator, rows, loss=method.loss, forget_fraction=0.5)
        trainer.train()
        trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # scores need the precision of the weights

    # ---- methods ----

    def new_prompt(self) -> SoftPromptUnlearner:
        """A fresh prompt on a fresh base."""
        set_seed(self.seed)
        config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=self.num_virtual_tokens)
        return SoftPromptUnlearner(self.base(), config, loss=self.prompt.loss)

    def prompt_of(self, i: int) -> tuple[Path, float]:
        """The folder of the prompt of request i, trained if it is missing, and the seconds of its training."""

        def train(folder: Path) -> None:
            unlearner = self.new_prompt()
            self.train_on(unlearner, self.prompt, "prompt", self.train[i], self.retained(i))
            unlearner.save_pretrained(str(folder))

        return once(self.folder / f"prompt-{i}", train)

    def layers_of(self, i: int, method: Method, wide: bool = False) -> tuple[Path, float]:
        """The folder of the layers of request i, trained and gathered if they are missing, and the seconds.

        Layers of the published shape gather inputs of their forget set alone; wide layers also of some retain rows.
        """

        def train(folder: Path) -> None:
            layers = UnlearningLayers(self.base(), self.wide_config if wide else self.layers_config)
            self.train_on(layers, method, "wide" if wide else "layers", self.train[i], self.retained(i))
            some = self.retain.shuffle(seed=self.seed).select(range(min(500, len(self.retain)))) if wide else None
            gather_inputs(layers, self.train[i], self.scoring(), self.batch_size, retain=some)
            layers.save_pretrained(folder)

        return once(self.folder / f"{'wide-' if wide else ''}layers-{method.name}-{i}", train)

    def alone(self, kind: str) -> Served:
        """The prompt or layers of each request alone: the controls of fusing and combining."""
        for i in range(len(self.train)):
            if kind == "prompt":
                folder, seconds = self.prompt_of(i)
                yield SoftPromptUnlearner.from_pretrained(self.base(), folder), seconds
            else:
                method = self.layers if kind == "layers" else self.generic_layers
                folder, seconds = self.layers_of(i, method, wide=kind == "wide layers")
                yield UnlearningLayers.from_pretrained(self.base(), folder), seconds

    def fused(self, method: Method, wide: bool = False) -> Served:
        """The layers of all requests so far, fused."""
        folders = []
        for i in range(len(self.train)):
            folder, seconds = self.layers_of(i, method, wide)
            folders.append(folder)
            start = time.perf_counter()
            yield fuse(folders, self.base()), seconds + time.perf_counter() - start

    def one_set_of_layers(self, method: Method) -> Served:
        """One set of layers, trained further on each request."""
        layers = UnlearningLayers(self.base(), self.layers_config)
        for i in range(len(self.train)):
            start = time.perf_counter()
            self.train_on(layers, method, "layers", self.train[i], self.retained(i))
            yield layers, time.perf_counter() - start

    def combined(self, how: str) -> Served:
        """Prompts of each request, distilled into one, with or without the forget sets.

        Either from all prompts at each request, or one by one: from the one that was served and the new one.
        """
        folders = []
        for i in range(len(self.train)):
            folder, seconds = self.prompt_of(i)
            folders.append(folder)
            start = time.perf_counter()
            if i == 0:
                served = SoftPromptUnlearner.from_pretrained(self.base(), folders[0])
            else:
                rows = forget_retain_dataset(forget=self.forget(range(i + 1)), retain=self.retained(i))
                parts = [self.folder / "distilled", folder] if how == "distill one by one" else folders
                settings: dict[str, Any] = {"loss": self.prompt.loss, "forget_fraction": 0.5}
                if how == "distill without forget sets":  # rows without marks
                    rows, settings = rows.remove_columns("is_forget").shuffle(seed=self.seed), {}
                served = combine(
                    self.base(),
                    parts,
                    train_dataset=rows,
                    data_collator=self.scoring(),
                    args=self.arguments("distill"),
                    **settings,
                )
            if how == "distill one by one":
                served.save_pretrained(str(self.folder / "distilled"))
            yield served, seconds + time.perf_counter() - start

    def prompt_on_all(self) -> Served:
        """A prompt trained from scratch on all requests so far."""
        for i in range(len(self.train)):
            start = time.perf_counter()
            unlearner = self.new_prompt()
            self.train_on(unlearner, self.prompt, "prompt", self.forget(range(i + 1)), self.retained(i))
            yield unlearner, time.perf_counter() - start

    def retrained(self) -> Served:
        """A model retrained on the rows to retain."""
        for i in range(len(self.train)):
            start = time.perf_counter()
            yield self.retrain(self.retained(i)), time.perf_counter() - start

    def methods(self) -> dict[str, Callable[[], Served]]:
        """The compared methods by their name in the table."""
        return {
            "each request's own prompt": lambda: self.alone("prompt"),
            "each request's own layers, EUL": lambda: self.alone("layers"),
            "each request's own layers, generic answer": lambda: self.alone("generic layers"),
            "each request's own layers, wide, generic answer": lambda: self.alone("wide layers"),
            "EUL, fused": lambda: self.fused(self.layers),
            "EUL, one set of layers trained on": lambda: self.one_set_of_layers(self.layers),
            "layers, generic answer, fused": lambda: self.fused(self.generic_layers),
            "layers, wide, generic answer, fused": lambda: self.fused(self.generic_layers, wide=True),
            "prompts distilled": lambda: self.combined("distill"),
            "prompts distilled, one by one": lambda: self.combined("distill one by one"),
            "prompts distilled without forget sets": lambda: self.combined("distill without forget sets"),
            "one prompt trained on all": self.prompt_on_all,
            "retrained": self.retrained,
        }

    # ---- scores ----

    def score(self, model: Any, after: int) -> dict[str, Any]:
        """Accuracy on the rows of each request, on retain rows and on test rows."""
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
    """Train into a folder unless it is complete; return the folder and the seconds of the training."""
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
    """Run the methods and store a JSON line for each after each request; complete methods are not repeated.

    Args:
        requests: the requests in their order.
        path: the file of results.
        order: the number of this order of requests.
        names: names of methods; all unless given.
        extra: further scores of a served model after request i.
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
