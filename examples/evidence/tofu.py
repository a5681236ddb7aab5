"""TOFU on a chat model: its rows, the memorized models, and the training of what unlearns."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from paper.memorization import CompletionTrainer
from paper.runs import is_made
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, TrainingArguments, set_seed

from spul import ForgetRetainCollator, UnlearningLoss, UnlearningTrainer
from spul.data import PromptFormat
from spul.data.dataset import forget_retain_dataset
from spul.data.formats import REFUSALS
from spul.data.sources import read_file
from spul.evaluation.metrics import probability, response_likelihoods
from spul.records.files import write_text

COLUMNS = ("question", "answer", "perturbed_answer", "paraphrased_answer")
TOKENS = 60  # of a generated answer


def chat_format(tokenizer: Any) -> PromptFormat:
    """Questions and answers in the model's chat template."""
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "QUESTION"}], tokenize=False, add_generation_prompt=True
    )
    template = asked.replace("{", "{{").replace("}", "}}").replace("QUESTION", "{question}")
    return PromptFormat(
        template,
        completion="{answer}",
        generic_completions=tuple(text.strip() for text in REFUSALS),
        text_field="question",
        append_eos=True,
    )


class Tofu:
    """Rows, models and settings."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.tokenizer = AutoTokenizer.from_pretrained(args.model)
        self.format = chat_format(self.tokenizer)
        self.collator: ForgetRetainCollator = self.format.collator(self.tokenizer, max_length=512, seed=args.seed)
        folder = args.data_dir
        forget = read_file(folder / f"{args.forget_set}_perturbed.json", (*COLUMNS, "paraphrased_question"))
        retain = read_file(folder / "retain_perturbed.json", COLUMNS)
        retain = retain.filter(lambda row: row["question"] not in set(forget["question"])).shuffle(seed=args.seed)
        learned = retain.select(range(args.retain_rows))
        others = {
            name: read_file(folder / f"{name}_perturbed.json", COLUMNS[:3])
            .shuffle(seed=args.seed)
            .select(range(args.other_questions))
            for name in ("real_authors", "world_facts")
        }
        scored = learned.select(range(args.unseen_retain))
        self.questions = {"forget": forget, "retain": scored, **others}
        self.forget, self.learned = self.format.apply(forget), self.format.apply(learned)
        self.retain = self.learned.select(range(args.unseen_retain, args.retain_rows))
        self.answered = {"forget": self.forget, "retain": self.learned.select(range(args.unseen_retain))}
        known = {*forget["question"], *retain["question"]}
        more = read_file(folder / f"retain{100 - int(args.forget_set[-2:])}.json", COLUMNS[:2])
        more = more.filter(lambda row: row["question"] not in known).shuffle(seed=args.seed)
        others_in_turn = concatenate_datasets([retain.select_columns(list(COLUMNS[:2])), more])
        unlearned = others_in_turn.select(range(args.retain_rows, args.retain_rows + len(forget)))
        self.never_learned = self.format.apply(unlearned)
        self.in_other_words = self.format.apply(
            forget.remove_columns("question").rename_column("paraphrased_question", "question")
        )

    @cached_property
    def dataset(self) -> Dataset:
        columns = ["prompt", "completion", "question"]
        return forget_retain_dataset(self.forget.select_columns(columns), self.retain.select_columns(columns))

    def training_arguments(self, batch_size: int | None = None, **own: Any) -> TrainingArguments:
        args = self.args
        return TrainingArguments(
            str(args.output_dir / "trainer"),
            seed=args.seed,
            per_device_train_batch_size=batch_size or args.batch_size,
            max_grad_norm=1.0,
            save_strategy="no",
            report_to="none",
            remove_unused_columns=False,
            logging_steps=25,
            **own,
        )

    @property
    def learned_from(self) -> dict[str, Any]:
        """Settings that a memorized model, and whatever is trained on it, depends on."""
        names = ("forget_set", "retain_rows", "memorize_lr", "memorize_epochs", "batch_size")
        return {"model": Path(self.args.model).name, **{name: getattr(self.args, name) for name in names}}

    def record(self, name: str) -> Path:
        """The file of the base or of the retrained model that is written last."""
        return self.args.output_dir / f"{name}-{self.args.seed}" / "memorized.json"

    def is_memorized(self, name: str) -> bool:
        """Whether the base or the retrained model is there.

        Raises:
            ValueError: if there is one that learned otherwise.
        """
        return is_made(self.record(name), self.learned_from, "learned_from")

    def folder(self, name: str) -> Path:
        """The folder of the base or the retrained model, made if it is missing.

        Raises:
            ValueError: as of `is_memorized`.
        """
        record = self.record(name)
        if self.is_memorized(name):
            return record.parent
        known = Dataset.from_list(list(self.forget) + list(self.learned)) if name == "base" else self.learned
        epochs, stop = self.args.memorize_epochs, Stop(self)
        if name == "retrained":
            epochs, stop = json.loads((self.folder("base") / "memorized.json").read_text())["epochs"], None
        set_seed(self.args.seed)
        model = AutoModelForCausalLM.from_pretrained(self.args.model, dtype=torch.float32)
        learning = get_peft_model(
            model, LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
        )
        arguments = self.training_arguments(
            learning_rate=self.args.memorize_lr,
            num_train_epochs=epochs,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=20,
        )
        callbacks = [] if stop is None else [stop]
        trainer = CompletionTrainer(learning, arguments, self.collator.encoder.batch, known, callbacks=callbacks)
        begun = time.perf_counter()
        trainer.train()
        facts = {"epochs": round(trainer.state.epoch or 0), "seconds": time.perf_counter() - begun}
        facts |= {"rows": len(known), "probability": self.known_probability(learning)}
        facts |= {"learned_from": self.learned_from}
        merged = trainer.accelerator.unwrap_model(learning, keep_fp32_wrapper=False).merge_and_unload()
        merged.save_pretrained(record.parent)
        write_text(record, json.dumps(facts) + "\n")
        print(name, facts, flush=True)
        return record.parent

    def known_probability(self, model: Any) -> float:
        """Mean probability of the answers of twenty forget and twenty retain rows."""
        few = Dataset.from_list(list(self.forget.select(range(20))) + list(self.learned.select(range(20))))
        return float(probability(response_likelihoods(model, few, self.collator.encoder)).mean())

    def load(self, name: str = "base") -> Any:
        return AutoModelForCausalLM.from_pretrained(self.folder(name), dtype=torch.float32).eval().to(self.device)

    def made_in(self, name: str, settings: dict[str, Any], make: Callable[[Path], dict[str, Any]]) -> Path:
        """The folder of an adapter trained with these settings, made unless it is there."""
        settings = settings | {"steps": self.args.steps, "batch_size": self.args.batch_size}
        settings |= {"unseen_retain": self.args.unseen_retain}
        folder = self.args.output_dir / "-".join(map(str, (name, *settings.values(), self.args.seed)))
        settings |= {"learned_from": self.learned_from}
        record = folder / "made_with.json"
        if not is_made(record, settings):
            begun = time.perf_counter()
            facts = make(folder)
            facts |= {"seconds": time.perf_counter() - begun}
            write_text(record, json.dumps({"settings": settings, "cost": facts}) + "\n")
        return folder

    def train(
        self,
        learning: Any,
        loss: UnlearningLoss,
        dataset: Dataset,
        rate: float,
        fraction: float,
        steps: int | None = None,
        batch_size: int | None = None,
    ) -> Any:
        """The model, trained; steps and rows of a step are those of the arguments unless given."""
        arguments = self.training_arguments(
            learning_rate=rate,
            max_steps=steps or self.args.steps,
            batch_size=batch_size,
            lr_scheduler_type="cosine",
            warmup_steps=0.1,
        )
        trainer = UnlearningTrainer(
            learning, arguments, self.collator, dataset, loss=loss, forget_fraction=fraction, reference="cached"
        )
        trainer.train()
        return trainer.accelerator.unwrap_model(learning, keep_fp32_wrapper=False)


class Stop(TrainerCallback):
    """Ends memorizing where the answers have a mean probability of 0.9."""

    def __init__(self, tofu: Tofu) -> None:
        self.tofu = tofu

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        found = self.tofu.known_probability(kwargs["model"])
        kwargs["model"].train()
        print(f"epoch {state.epoch}: probability {found:.3f}", flush=True)
        control.should_training_stop = found >= 0.9


def trained_parameters(model: Any) -> int:
    return sum(one.numel() for one in model.parameters() if one.requires_grad)
