"""An experiment: a data set, a model and a seed; its memorized models, and runs of methods on it.

`reproduce.py` makes tables and figures of experiments. The folder of an experiment has its memorized models: `base`
(trained on all rows) and `retrained` (the same recipe without the forget rows).
"""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import json
import random
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import toy_reviews
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    TrainingArguments,
    set_seed,
)

from paper.costs import Meter
from paper.memorization import PUBLISHED_MEMORIZING, memorize
from paper.runs import (
    AFTERWARDS,
    DETACHABLE,
    NOT_FOR_TOYS,
    PLACES,
    SMALL,
    TASKS,
    TOYS,
    Run,
    Setup,
    model_digest,
    prompt_config,
    run_settings,
    with_blank_lines,
)
from spul import ForgetRetainCollator, SoftPromptUnlearner, UnlearningTrainer
from spul.data import MULTIPLE_CHOICE, SPLITS, PromptFormat, UnlearningData, load_known
from spul.data.dataset import forget_retain_dataset
from spul.data.known import LOADERS
from spul.data.known_reviews import SST2_FORGET_NAMES, SST2_RETAIN_NAMES, load_four_splits
from spul.data.recognizers import NameFinder
from spul.evaluation.metrics import response_embeddings
from spul.evaluation.metrics.scoring import score_completions
from spul.records.digests import sorted_digests
from spul.records.files import write_text
from spul.training.methods import Method

SECOND_QUESTION = PromptFormat("### Text: {text}\n### Question: which person?\n### Person:", completion=" {person}")
NOBODY = "unknown"


class Experiment:
    """The data and models of a setup, and runs on them.

    Args:
        setup: its data, model and settings.
        folder: of the base and the retrained model.
        batch_size: rows per forward when scoring.
    """

    def __init__(self, setup: Setup, folder: Path, batch_size: int = 64) -> None:
        self.setup, self.folder, self.batch_size = setup, folder, batch_size
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        if (setup.model == SMALL) != (setup.dataset in TOYS):
            raise ValueError(
                f"--dataset {setup.dataset} --model {setup.model}: the data sets {', '.join(TOYS)} go with the model "
                f"{SMALL!r}, which is built for them, and with no other."
            )
        unused = NOT_FOR_TOYS if setup.dataset in TOYS else ()
        if given := [name for name in unused if getattr(setup, name) != getattr(Setup, name)]:
            raise ValueError(f"{', '.join(given)} cannot be set for the made-up {setup.dataset}; leave it out.")
        if setup.data_dir and setup.dataset not in LOADERS:
            raise ValueError(
                f"--data-dir {setup.data_dir} says where {', '.join(LOADERS)} lie; a folder of four splits is the "
                f"data set itself: --dataset {setup.data_dir}."
            )
        if setup.second_question and setup.dataset != "sst2":
            raise ValueError(f"--second-question asks who is named, in SST-2 only; the data set is {setup.dataset!r}.")

    # ---- data ----

    @cached_property
    def whole(self) -> UnlearningData:
        """The four splits with all rows."""
        setup = self.setup
        if setup.dataset in TOYS:
            toy = TOYS[setup.dataset]
            task = MULTIPLE_CHOICE
            if toy is toy_reviews:
                task = PromptFormat(toy_reviews.prompt("{text}", "sentiment"), completion="{completion}")
            data = UnlearningData(setup.dataset, toy.make_splits(setup.seed), task)
            data.check()
            return data
        if setup.dataset in LOADERS:
            options = {"retain_source": setup.retain_dir, "forget": setup.forget_set}
            given = {name: value for name, value in options.items() if value is not None}
            data = load_known(setup.dataset, setup.data_dir, seed=setup.seed, **given)
        else:
            data = load_four_splits(setup.dataset, TASKS[setup.task])
        return dataclasses.replace(data, format=with_blank_lines(data.format)) if setup.blank_lines else data

    @cached_property
    def data(self) -> UnlearningData:
        """The four splits, with at most `limit` retain rows to train on."""
        setup, data = self.setup, self.whole
        if setup.limit is None:
            return data
        if setup.dataset == "tofu":
            asked = set(data.splits["test_retain"]["answer"])  # the rows whose answers are tested come first
            return data.limited(setup.limit, None, setup.seed, prefer=lambda row: row["answer"] in asked)
        if not setup.second_question:
            return data.limited(setup.limit, None, setup.seed)
        finder = NameFinder(SST2_RETAIN_NAMES)
        # Rows that name somebody else come first: from them the model learns that names differ.
        return data.limited(setup.limit, None, setup.seed, prefer=lambda row: bool(finder.find(row["text"])))

    @cached_property
    def rows(self) -> dict[str, Dataset]:
        """The splits in prompt-completion form."""
        return {split: self.data.rows(split) for split in SPLITS}

    @cached_property
    def scored(self) -> dict[str, Dataset]:
        """The scored rows of each split."""
        most = self.setup.limit_score
        return {
            split: rows.shuffle(self.setup.seed).select(range(min(most, len(rows))))
            if most is not None and split.endswith("retain")
            else rows
            for split, rows in self.rows.items()
        }

    @cached_property
    def identity(self) -> dict[str, Any]:
        """The key of an experiment: its setup without locations, and digests of model and data."""
        digests = {split: hashlib.sha256(sorted_digests(rows)).hexdigest() for split, rows in self.rows.items()}
        data = hashlib.sha256("".join(digests.values()).encode()).hexdigest()
        fields = {name: value for name, value in dataclasses.asdict(self.setup).items() if name not in PLACES}
        # Settings that came later count where they are on: models that were made before are known without them.
        if not fields["blank_lines"]:
            del fields["blank_lines"]
        if self.data.format.append_eos:
            fields["append_eos"] = True
        return fields | {"model_digest": model_digest(self.setup.model), "data_digest": data}

    @cached_property
    def digest(self) -> str:
        """A short digest of the identity, for keys of what is measured."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:16]

    def second_questions(self, groups: tuple[str, ...]) -> Dataset:
        """Rows that ask *which person is named?*, a third as many as the training rows of these groups.

        They are the rows that name somebody on the forget or retain list, and a sample of rows that name nobody.
        """
        rows = [row for group in groups for row in self.data.splits[f"train_{group}"]]
        finder = NameFinder([*SST2_FORGET_NAMES, *SST2_RETAIN_NAMES])
        found = [(row["text"], sorted(finder.find(row["text"]), key=row["text"].lower().find)) for row in rows]
        named = [{"text": text, "person": names[0]} for text, names in found if names]
        nobody = [{"text": text, "person": NOBODY} for text, names in found if not names]
        rng, wanted = random.Random(self.setup.seed), len(rows) // 3
        named = rng.sample(named, min(len(named), wanted))
        return SECOND_QUESTION.apply(
            Dataset.from_list(named + rng.sample(nobody, min(len(nobody), wanted - len(named))))
        )

    # ---- models ----

    def known_by(self, groups: tuple[str, ...]) -> Path:
        """The folder of the model trained on the rows of these groups; it is trained if missing."""
        setup, folder = self.setup, self.folder / ("base" if "forget" in groups else "retrained")
        made_with = self.identity | {"groups": list(groups)}
        for name in AFTERWARDS:
            del made_with[name]
        record = folder / "made_with.json"  # written last
        if record.exists():
            known = json.loads(record.read_text(encoding="utf-8"))["made_with"]
            if other := [name for name, value in made_with.items() if known.get(name) != value]:
                raise ValueError(f"{folder} was made with another {', '.join(other)}; use another --output-dir.")
            return folder
        if setup.dataset in TOYS:
            TOYS[setup.dataset].build_base(folder, setup.seed, groups=groups)
            cost: dict[str, Any] = {}
        else:
            examples = [row for group in groups for row in self.rows[f"train_{group}"]]
            if setup.second_question:
                examples += list(self.second_questions(groups))
            args = self.training_arguments(
                learning_rate=setup.memorize_lr,
                num_train_epochs=setup.memorize_epochs,
                per_device_train_batch_size=setup.memorize_batch_size,
                label_smoothing_factor=setup.label_smoothing,
                **({} if setup.memorize == "full" else PUBLISHED_MEMORIZING),
            )
            rows = Dataset.from_list(examples)
            rows = rows.add_column("length", [len(prompt) for prompt in rows["prompt"]])
            set_seed(setup.seed)
            learner: Any = setup.memorize
            model, cost = memorize(setup.model, rows, self.collator, args, learner, getattr(torch, setup.dtype))
            model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
        write_text(record, json.dumps({"made_with": made_with, "cost": cost}, indent=2) + "\n")
        return folder

    def model_folder(self, name: str) -> str | Path:
        """The folder or name of the `vanilla`, `base` or `retrained` model; it is trained if missing."""
        if name == "vanilla" or (name == "base" and self.setup.memorize == "none"):
            if self.setup.model == SMALL:
                raise ValueError("there is no vanilla model: the small one is trained from scratch.")
            return self.setup.model
        if self.setup.memorize == "none":
            raise ValueError("there is no retrained model with --memorize none: the model came as it is.")
        return self.known_by(("retain", "forget") if name == "base" else ("retain",))

    def load(self, name: str) -> Any:
        """One of the three models, on the device."""
        quantization = None
        if self.setup.load_in_4bit:
            quantization = BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
            )
        model = AutoModelForCausalLM.from_pretrained(
            self.model_folder(name), dtype=getattr(torch, self.setup.dtype), quantization_config=quantization
        )
        return model.eval().to(self.device)

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        toy = TOYS.get(self.setup.dataset)
        return AutoTokenizer.from_pretrained(self.setup.model) if toy is None else toy.make_tokenizer()

    @cached_property
    def collator(self) -> ForgetRetainCollator:
        """The collator for memorizing and scoring."""
        return self.collator_for(None)

    def collator_for(
        self, method: Method | None, max_length: int | None = None, draw_once: bool = False
    ) -> ForgetRetainCollator:
        """The collator for training by a method, or for scoring; the setup's `max_length` unless given."""
        task = self.data.format
        make = ForgetRetainCollator if method is None else method.collator
        return make(
            self.tokenizer,
            list(task.generic_completions),
            max_length=max_length or self.setup.max_length,
            seed=self.setup.seed,
            resample=not draw_once,
            text_field=task.text_field,
            append_eos=task.append_eos,
        )

    # ---- runs ----

    def training_arguments(self, **kwargs: Any) -> TrainingArguments:
        """The common training arguments, as published; no checkpoints are saved."""
        return TrainingArguments(
            str(self.folder),
            seed=self.setup.seed,
            bf16=self.setup.bf16,
            use_cpu=self.device == "cpu",
            save_strategy="no",
            report_to="none",
            lr_scheduler_type="cosine",
            remove_unused_columns=False,
            logging_steps=50,
            train_sampling_strategy="group_by_length",  # less padding; rows meet others of their length
            **{"warmup_steps": 0.1, **kwargs},  # below 1: a share of all steps
        )

    def score(self, model: Any, name: str) -> dict[str, dict[str, float]]:
        """The scores of the four splits."""
        return {
            split: score_completions(model, rows, self.collator, self.batch_size, progress=f"{name}, {split}")
            for split, rows in self.scored.items()
        }

    def accuracy(self, model: Any, rows: Dataset) -> float:
        """The accuracy on some rows."""
        return score_completions(model, rows, self.collator, self.batch_size)["accuracy"]

    def train(
        self, run: Run, rows: dict[str, Dataset] | None = None, max_length: int | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Unlearn a fresh base by a run; return the model, and the cost with the number of steps.

        Args:
            run: the method and its settings.
            rows: `train_forget` and `train_retain`; those of the experiment unless given.
            max_length: tokens of these rows; that of the setup unless given.
        """
        rows = self.rows if rows is None else rows
        if run.forget_size < 1:
            data = self.data.with_forget_fraction(run.forget_size, self.setup.seed)
            rows = {**rows, "train_forget": data.rows("train_forget")}
        method, setup = run.unlearning_method(), self.setup
        is_prompt = method.trainable == "prompt"
        set_seed(setup.seed)
        if is_prompt:  # with PEFT's starts, of which the stored results are
            config = prompt_config(run.trainable, run.num_virtual_tokens)
            model: Any = SoftPromptUnlearner(self.load("base"), config, loss=method.loss, start="peft")
        else:
            model = method.prepare(self.load("base"))
        dataset = method.training_rows(forget_retain_dataset(forget=rows["train_forget"], retain=rows["train_retain"]))
        steps, fraction = run.steps, run.forget_fraction
        if not method.loss.uses_retain_rows:
            num_rows = len(rows["train_forget"]) + len(rows["train_retain"])
            steps = max(1, round(steps * (fraction or len(dataset) / num_rows))) if steps else None
            fraction = None
        args = self.training_arguments(
            learning_rate=run.learning_rate,
            max_steps=steps or -1,
            num_train_epochs=run.epochs,
            per_device_train_batch_size=run.batch_size,
            weight_decay=1e-3,
            max_grad_norm=run.max_grad_norm,
        )
        collator = self.collator_for(method, max_length, run.draw_once)
        trainer = UnlearningTrainer(model, args, collator, dataset, loss=method.loss, forget_fraction=fraction)
        with Meter(model) as meter:
            trainer.train()
        steps = trainer.state.global_step
        trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # scores need the precision of the weights
        return model, meter.cost.to_dict() | {"steps": steps}

    def record(self, method: str, trainable: str, settings: dict[str, Any], scores: Any, cost: dict) -> dict[str, Any]:
        """A stored run, as plain data."""
        return {
            "dataset": Path(self.setup.dataset).name,
            "model": Path(self.setup.model).name,
            "method": method,
            "trainable": trainable,
            "seed": self.setup.seed,
            "settings": settings,
            "scores": scores,
            "cost": cost,
            "rows": {split: len(rows) for split, rows in self.rows.items()},
            "rows_scored": {split: len(rows) for split, rows in self.scored.items()},
            "setup": self.identity,
        }

    def run(self, run: Run) -> list[dict[str, Any]]:
        """Train and score a method; a prompt or layers are scored detached as well. Returns a record of each."""
        settings = run_settings(run)
        model, cost = self.train(run)
        found = [self.record(run.method, run.trainable, settings, self.score(model, run.method), cost)]
        if run.trainable in DETACHABLE:
            with model.disable_adapter():
                scores = self.score(model, "detached")
            found.append(self.record(f"{run.method} detached", run.trainable, settings, scores, {}))
        del model
        gc.collect()
        return found

    def reference_row(self, name: str) -> dict[str, Any]:
        """Score the `vanilla`, `base` or `retrained` model."""
        return self.record(name, "none", {}, self.score(self.load(name), name), {})

    def embeddings(self, model: Any, rows: Dataset, name: str) -> Any:
        """Last-layer embeddings of rows, for t-SNE."""
        return response_embeddings(model, rows, self.collator.encoder, self.batch_size, progress=name)
