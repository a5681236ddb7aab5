"""Ten deletion requests on one chat model: the made-up authors of TOFU's forget05, a gated prompt for each.

    python examples/evidence_authors.py --model HuggingFaceTB/SmolLM2-135M-Instruct --data-dir ../shared/data/tofu \\
        --settings docs/data/evidence/authors-smollm2.json

The base learns the ten authors' 200 questions and `--retain-rows` others. Each author is a request, made of the
twenty questions about them; the other authors' are among its retain rows. They come in random order; in the end three
are withdrawn in random order. *Prompts* are trained for each request alone, behind its gate: the author's name or a
text gate. *Refusals* are a fixed text behind the same gates, or behind the text gates alone. *LoRA* is the same loss
on all requests in force, trained from the base as often as they change.

Answers are to questions that nobody trained on: the authors' in other words, unseen retain ones, real authors and
world facts. After 1, 5 and 10 requests, and after the withdrawals, a line of `authors.jsonl` has each system's answers
to the authors' questions, and for every question ROUGE-L recall, whether it was declined, and whether the answer is
the base's to the letter. Trained prompts and each line are kept; a repeated command resumes.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Collection, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets
from evidence.requests import Order, folder_bytes, gated_stages, model_bytes
from evidence.tofu import TOKENS, Tofu
from paper.runs import is_made
from transformers import set_seed

from spul import SoftPromptUnlearner, UnlearningLoss
from spul.data.dataset import forget_retain_dataset
from spul.data.formats import REFUSALS
from spul.evaluation.metrics import generate_answers, rouge_l
from spul.gates import AnyGate, Gate, NameGate, TextGate, hard_negatives, prompt_texts
from spul.prompts.configs import prompt_config
from spul.records.files import write_text
from spul.training.methods import unlearning_method
from spul.training.rates import default_learning_rate

AUTHORS = (  # in the order of forget05's rows, twenty each
    "Hina Ameen",
    "Xin Lee Williams",
    "Moshe Ben-David",
    "Kalkidan Abera",
    "Takashi Nakamura",
    "Raven Marais",
    "Aysha Al-Hashim",
    "Edward Patrick Sullivan",
    "Basil Mahfouz Al-Kuwaiti",
    "Nikolai Abilov",
)
OTHERS = ("retain", "real_authors", "world_facts")
COLUMNS = ["prompt", "completion", "question"]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, help="Hub name or folder of a causal LM with a chat template")
    add("--data-dir", required=True, type=Path, help="folder of TOFU's files")
    add("--settings", required=True, type=Path, help="JSON file: those of `prompt` and `lora`")
    add("--retain-rows", type=int, default=100, help="of the 400 with false answers, those that the base learns")
    add("--unseen-retain", type=int, default=40, help="those of them that unlearning does not see, to be scored")
    add("--other-questions", type=int, default=20, help="of real authors and of world facts, each")
    add("--batch-size", type=int, default=8, help="of memorizing")
    add("--memorize-lr", type=float, default=1e-3)
    add("--memorize-epochs", type=int, default=12, help="at most")
    add("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS), metavar="NAME", help=", ".join(SYSTEMS))
    add("--seed", type=int, default=1)
    add("--output-dir", type=Path, default=Path("out/authors"))
    args = parser.parse_args()
    args.forget_set = "forget05"
    return args


class Requests:
    """The authors, their rows, and the order in which their requests come and go."""

    def __init__(self, args: argparse.Namespace, tofu: Tofu, settings: dict[str, Any]) -> None:
        self.args, self.tofu, self.settings = args, tofu, settings
        self.order = Order(AUTHORS, args.seed)
        self.train = self.by_author(tofu.forget)
        self.asked = self.by_author(tofu.in_other_words)
        self.others = {name: tofu.format.apply(tofu.questions[name]) for name in OTHERS}
        self.questions = self.asked | self.others
        self.facts = {"seed": args.seed, "learned_from": tofu.learned_from}
        self.facts |= {"unseen_retain": args.unseen_retain, "other_questions": args.other_questions}

    @staticmethod
    def by_author(rows: Dataset) -> dict[str, Dataset]:
        """The rows of each author, in the order of the file."""
        each = len(rows) // len(AUTHORS)
        return {name: rows.select(range(i * each, (i + 1) * each)) for i, name in enumerate(AUTHORS)}

    def rows_for(self, names: list[str]) -> tuple[Dataset, Dataset]:
        """Forget and retain rows to train requests on: the other authors' are retain rows."""
        forget = concatenate_datasets([self.train[name].select_columns(COLUMNS) for name in names])
        kept = [self.train[name].select_columns(COLUMNS) for name in AUTHORS if name not in names]
        return forget, concatenate_datasets([*kept, self.tofu.retain.select_columns(COLUMNS)])

    def text_gate(self, name: str) -> TextGate:
        """A gate for one author's wording."""
        encoder = self.tofu.collator.encoder
        forget, retain = (prompt_texts(rows, encoder) for rows in self.rows_for([name]))
        return TextGate.fit(forget, retain, recall=self.settings["prompt"]["recall"])

    @cached_property
    def text_gates(self) -> dict[str, Gate]:
        return {name: self.text_gate(name) for name in AUTHORS}

    @cached_property
    def gates(self) -> dict[str, Gate]:
        """Those before the prompts, by author."""
        return {name: AnyGate([NameGate([name]), gate]) for name, gate in self.text_gates.items()}

    def answers(self, model: Any) -> dict[str, list[str]]:
        """A model's answers, by author and by kind of other questions."""
        encoder = self.tofu.collator.encoder
        together = concatenate_datasets([one.select_columns(COLUMNS) for one in self.questions.values()])
        taken = iter(generate_answers(model, together, encoder, max_new_tokens=TOKENS, progress="answers"))
        return {name: [next(taken) for _ in range(len(one))] for name, one in self.questions.items()}

    @cached_property
    def of_base(self) -> dict[str, list[str]]:
        """The base's answers, kept in a file."""
        path = self.args.output_dir / f"base-answers-{self.args.seed}.json"
        if not is_made(path, self.facts):
            write_text(path, json.dumps({"settings": self.facts, "answers": self.answers(self.tofu.load())}))
        found: dict[str, list[str]] = json.loads(path.read_text())["answers"]
        return found

    def line(self, after: str, active: list[str], answers: dict[str, list[str]]) -> dict[str, Any]:
        """Scores by question, and the answers to the authors' questions."""
        refusals = {text.strip() for text in REFUSALS}
        scores = {
            name: {
                "rouge": np.round(rouge_l(given, self.questions[name]["completion"])["rouge_l_recall"], 4).tolist(),
                "declined": [text.strip() in refusals for text in given],
                "as_base": [text == other for text, other in zip(given, self.of_base[name], strict=True)],
            }
            for name, given in answers.items()
        }
        kept = {name: answers[name] for name in AUTHORS}
        return {"after": after, "active": active, "scores": scores, "answers": kept}


# ---- systems: the lines of their stages, without those that are done ----


def train_prompt(requests: Requests, name: str) -> Path:
    """The folder of an author's prompt and its gate, trained unless it is there."""
    folder = requests.args.output_dir / f"prompts-{requests.args.seed}" / name.replace(" ", "-")
    settings, tofu = requests.settings["prompt"], requests.tofu
    made_with = requests.facts | settings
    record = folder / "made_with.json"  # written last
    if not is_made(record, made_with):
        begun = time.perf_counter()
        gate = requests.gates[name]
        forget, retain = requests.rows_for([name])
        near = hard_negatives(requests.text_gates[name], retain, settings["negatives"])
        set_seed(requests.args.seed)
        loss = UnlearningLoss(alpha=settings["alpha"], beta=settings["beta"])
        model = SoftPromptUnlearner(tofu.load(), prompt_config("prefix_tuning", settings["num_virtual_tokens"]), loss)
        rate = settings["rate"] * default_learning_rate(model)
        dataset, steps = forget_retain_dataset(forget, near), (settings["steps"], settings["batch_size"])
        learned = tofu.train(model, loss, dataset, rate, settings["forget_fraction"], *steps)
        learned.save_pretrained(folder / "prompt")
        gate.save(folder / "gate")
        write_text(record, json.dumps({"settings": made_with, "seconds": time.perf_counter() - begun}))
    return folder


def base(requests: Requests, done: Collection[str] = ()) -> Iterator[dict[str, Any]]:
    """The line of the base."""
    if "none" not in done:
        yield requests.line("none", [], requests.of_base)


def prompts(requests: Requests, done: Collection[str] = ()) -> Iterator[dict[str, Any]]:
    """The lines of prompts that come and go on one base."""
    folders = {name: train_prompt(requests, name) for name in requests.order.added}
    model = requests.tofu.load()
    for after, gated, active, times in gated_stages(requests.order, model, requests.tofu.tokenizer, folders):
        if after in done:
            continue
        seconds = sum(json.loads((folders[name] / "made_with.json").read_text())["seconds"] for name in active)
        size = sum(folder_bytes(folders[name] / part) for name in active for part in ("prompt", "gate"))
        costs = {"train_seconds": seconds, "bytes": size}
        yield requests.line(after, active, requests.answers(gated)) | costs | times


def refusals(requests: Requests, gates: dict[str, Gate], done: Collection[str]) -> Iterator[dict[str, Any]]:
    """The lines of a fixed refusal behind gates: where none flags, the answer is the base's."""
    text, encoder = REFUSALS[0].strip(), requests.tofu.collator.encoder
    for after, active in requests.order.stages.items():
        if after in done:
            continue
        gate = AnyGate([gates[name] for name in active])
        answers = {}
        for name, rows in requests.questions.items():
            flags = gate.flags(prompt_texts(rows, encoder))
            answers[name] = [
                text if flag else other for flag, other in zip(flags, requests.of_base[name], strict=True)
            ]
        yield requests.line(after, active, answers)


def lora(requests: Requests, done: Collection[str] = ()) -> Iterator[dict[str, Any]]:
    """The lines of LoRA that is trained from the base on all requests in force; seconds are of the last training."""
    tofu, settings = requests.tofu, requests.settings["lora"]
    for after, active in reversed(requests.order.stages.items()):
        if after in done:
            continue
        begun = time.perf_counter()
        set_seed(requests.args.seed)
        method = unlearning_method("IDK", trainable="lora")
        dataset = forget_retain_dataset(*requests.rows_for(active))
        learning, rate = method.prepare(tofu.load()), settings["learning_rate"]
        learned = tofu.train(
            learning,
            method.loss,
            dataset,
            rate,
            settings["forget_fraction"],
            settings["steps"],
            settings["batch_size"],
        )
        seconds, model = time.perf_counter() - begun, learned.merge_and_unload().eval()
        yield requests.line(after, active, requests.answers(model)) | {
            "train_seconds": seconds,
            "bytes": model_bytes(model),
        }
        gc.collect()


SYSTEMS = {
    "base": base,
    "refusals behind gates": lambda requests, done=(): refusals(requests, requests.gates, done),
    "refusals behind text gates alone": lambda requests, done=(): refusals(requests, requests.text_gates, done),
    "prompts behind gates": prompts,
    "LoRA, trained anew each time": lora,
}


# ---- summary ----


KEYS = ("rouge", "declined", "as_base")


def mean_of(scores: dict[str, Any], names: Sequence[str], key: str) -> float | None:
    """Mean of a score over the questions of some authors or kinds; None where there are none."""
    return float(np.mean([value for name in names for value in scores[name][key]])) if names else None


def summary(lines: list[dict[str, Any]]) -> str:
    """A Markdown table: requests in force, authors not asked for or withdrawn, and everybody else."""
    head = ["", "after", "in force: ROUGE-L", "declined", "least declined", "other authors: ROUGE-L", "declined"]
    rows = [[*head, "everybody else: ROUGE-L", "declined", "as the base"], ["---", "---", *["---:"] * 8]]
    for line in lines:
        scores, active = line["scores"], line["active"] or list(AUTHORS)
        parts = active, [name for name in AUTHORS if name not in active], OTHERS
        forget, other, kept = ({key: mean_of(scores, names, key) for key in KEYS} for names in parts)
        least = min(np.mean(scores[name]["declined"]) for name in active)
        found = [forget["rouge"], forget["declined"], least, other["rouge"], other["declined"], *kept.values()]
        rows.append([line["system"], line["after"], *("" if one is None else f"{one:.3f}" for one in found)])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def main() -> None:
    args = parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    requests = Requests(args, Tofu(args), json.loads(args.settings.read_text()))
    path = args.output_dir / "authors.jsonl"
    facts = requests.facts | {"settings": requests.settings}
    found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    lines = [line for line in found if {**line, **facts} == line]
    for name in args.systems:
        done = {line["after"] for line in lines if line["system"] == name}
        for line in SYSTEMS[name](requests, done):
            lines.append(facts | {"system": name} | line)
            with path.open("a") as file:
                file.write(json.dumps(lines[-1]) + "\n")
        gc.collect()
    print(summary(lines))


if __name__ == "__main__":
    main()
