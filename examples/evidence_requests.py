"""Many requests on one base: ten people of SST-2, a gated prompt each, against LoRA merged request by request.

    python examples/evidence_requests.py --model ../shared/models/small-lm --data-dir ../shared/data/sst2 \\
        --plan docs/data/evidence/sst2-small-lm-plan.json --settings docs/data/evidence/requests-small-lm.json

Each person is a request. They come in random order; in the end three are withdrawn in random order. A prompt behind a
text gate is trained for each request alone, with the other people's rows among its retain rows; prompts are added to
and taken off one frozen base. *Refusals* are a fixed text behind the same gates. *Merged* is SPUL's loss on LoRA,
merged into the weights before the next request; a withdrawn request cannot be undone there. *Trained anew* is that
loss on LoRA from the base on all requests in force, as often as they change; only those that are scored are trained.
*One prompt for all* stands behind one gate for the rows of all ten.

After 1, 5 and 10 requests, and after the withdrawals, a line of `requests.jsonl` has each system's accuracy on the
test rows of the requests in force, of the people not (or no longer) asked for, and of the others; bytes, seconds of
training, milliseconds to add and to withdraw. Trained prompts are kept; a repeated command resumes.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from evidence.plan import Plan
from evidence.requests import CHECKPOINTS, Order, folder_bytes, gated_stages, model_bytes
from evidence.systems import build, row_scores
from paper.experiment import Experiment
from paper.runs import is_made
from transformers import set_seed

from spul import SoftPromptUnlearner, UnlearningTrainer
from spul.data.dataset import forget_retain_dataset
from spul.data.known_reviews import SST2_FORGET_NAMES
from spul.data.recognizers import NameFinder
from spul.gates import AnyGate, GatedUnlearner, load
from spul.records.files import write_text
from spul.rivals import FixedRefusal
from spul.training.methods import unlearning_method


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, help="Hub name or folder of a causal LM")
    add("--data-dir", required=True, help="folder of SST-2")
    add("--plan", type=Path, required=True, help="whose `setup` memorizes, such as docs/data/evidence/sst2-plan.json")
    add(
        "--settings",
        type=Path,
        required=True,
        help="JSON file: those of `prompt`, `together`, `lora` and `anew`; `retain_rows`",
    )
    add("--seed", type=int, default=1)
    add("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS), metavar="NAME", help=", ".join(SYSTEMS))
    add("--models-dir", type=Path, help="folder of the memorized models; in the output folder unless given")
    add("--output-dir", type=Path, default=Path("out/many-requests"))
    return parser.parse_args()


def by_person(rows: Dataset, people: Sequence[str]) -> dict[str, Dataset]:
    """Rows that name each person, of several the first in the list."""
    found = [
        next((name for name in people if name in names), None) for names in map(NameFinder(people).find, rows["text"])
    ]
    return {name: rows.select([i for i, one in enumerate(found) if one == name]) for name in people}


class Requests:
    """The people, their rows, and the order in which they come and go."""

    def __init__(self, args: argparse.Namespace, experiment: Experiment, settings: dict[str, Any]) -> None:
        self.args, self.experiment, self.settings = args, experiment, settings
        self.people = list(SST2_FORGET_NAMES[:10])
        self.train = by_person(experiment.rows["train_forget"], self.people)
        self.test = by_person(experiment.rows["test_forget"], self.people)
        self.retain, test_retain = experiment.rows["train_retain"], experiment.scored["test_retain"]
        self.test_retain = test_retain.select(range(min(len(test_retain), settings["retain_rows"])))
        self.order = Order(self.people, args.seed)

    def rows_for(self, names: Sequence[str]) -> dict[str, Dataset]:
        """Rows to train requests on: the other people's are retain rows."""
        others = [self.train[other] for other in self.people if other not in names]
        forget = concatenate_datasets([self.train[name] for name in names])
        return {"forget": forget, "retain": concatenate_datasets([*others, self.retain])}

    def scores(self, model: Any, position: str, active: Sequence[str]) -> dict[str, float | None]:
        """Accuracy on the rows of requests in force, of the other people, and of everybody else."""
        found = {
            name: row_scores(model, self.test[name], self.experiment, position)["accuracy"] for name in self.people
        }
        kept = row_scores(model, self.test_retain, self.experiment, position)["accuracy"]
        inactive = [value for name in self.people if name not in active for value in found[name]]
        return {
            "forget": float(np.mean([value for name in active for value in found[name]])),
            "worst request": max(float(np.mean(found[name])) for name in active),
            "other people": float(np.mean(inactive)) if inactive else None,
            "retain": float(np.mean(kept)),
        }


def train_prompt(requests: Requests, name: str, rows: dict[str, Dataset], settings: dict[str, Any]) -> Path:
    """The folder of a prompt and its gate, trained unless it is there."""
    folder = requests.args.output_dir / f"prompts-{requests.args.seed}" / name.replace(" ", "-")
    made_with = {"experiment": requests.experiment.digest} | settings
    if not is_made(folder / "cost.json", made_with):
        _, cost = build("gated", requests.experiment, rows, settings, folder)
        write_text(folder / "cost.json", json.dumps({"settings": made_with} | cost))
    return folder


def position_of(requests: Requests) -> str:
    return requests.settings["prompt"].get("position", "start")


def measured_prompts(requests: Requests) -> list[dict[str, Any]]:
    """The lines of prompts that come and go on one base."""
    experiment, order, found = requests.experiment, requests.order, []
    base, position = experiment.load("base"), position_of(requests)
    folders = {
        name: train_prompt(requests, name, requests.rows_for([name]), requests.settings["prompt"])
        for name in order.added
    }
    seconds = {name: json.loads((folder / "cost.json").read_text())["seconds"] for name, folder in folders.items()}
    for after, gated, active, times in gated_stages(order, base, experiment.tokenizer, folders):
        size = sum(folder_bytes(folders[name] / part) for name in active for part in ("prompt", "gate"))
        costs = {"train_seconds": sum(seconds[name] for name in active), "bytes": size}
        found.append({"after": after, **requests.scores(gated, position, active), **costs, **times})
    return found


def measured_refusals(requests: Requests) -> list[dict[str, Any]]:
    """The lines of a fixed refusal behind the gates of the prompts."""
    experiment, found = requests.experiment, []
    base, refusal = experiment.load("base"), experiment.data.format.generic_completions[0]
    folders = {
        name: train_prompt(requests, name, requests.rows_for([name]), requests.settings["prompt"]) / "gate"
        for name in requests.order.added
    }
    for after, active in requests.order.stages.items():
        gate = AnyGate([load(folders[name], base, experiment.tokenizer) for name in active])
        model = FixedRefusal(base, experiment.tokenizer, gate, refusal)
        found.append({"after": after, **requests.scores(model, "start", active)})
        found[-1]["bytes"] = sum(folder_bytes(folders[name]) for name in active)
    return found


def merged(requests: Requests, model: Any, rows: dict[str, Dataset], settings: dict[str, Any]) -> Any:
    """A model with SPUL's loss trained on LoRA, merged."""
    method, experiment = unlearning_method("IDK", trainable="lora"), requests.experiment
    set_seed(requests.args.seed)
    learning = method.prepare(model)
    arguments = experiment.training_arguments(
        learning_rate=settings["learning_rate"],
        max_steps=settings["steps"],
        per_device_train_batch_size=settings["batch_size"],
        max_grad_norm=1.0,
    )
    dataset = forget_retain_dataset(rows["forget"], rows["retain"])
    collator = experiment.collator_for(method)
    trainer = UnlearningTrainer(learning, arguments, collator, dataset, loss=method.loss, forget_fraction=0.5)
    trainer.train()
    return trainer.accelerator.unwrap_model(learning, keep_fp32_wrapper=False).merge_and_unload().eval()


def measured_merged(requests: Requests) -> list[dict[str, Any]]:
    """The lines of LoRA that is merged request by request; the rows of earlier requests are in neither set."""
    found, seconds, model = [], 0.0, requests.experiment.load("base")
    for i, name in enumerate(requests.order.added, start=1):
        begun, asked = time.perf_counter(), requests.order.added[:i]
        rows = requests.rows_for(asked) | {"forget": requests.train[name]}
        model = merged(requests, model, rows, requests.settings["lora"])
        seconds += time.perf_counter() - begun
        if i in CHECKPOINTS:
            found.append({"after": f"{i} added", **requests.scores(model, "start", asked), "train_seconds": seconds})
            found[-1]["bytes"] = model_bytes(model)
        gc.collect()
    *_, (after, left) = requests.order.stages.items()
    return [*found, {"after": after, **requests.scores(model, "start", left)}]


def measured_anew(requests: Requests) -> list[dict[str, Any]]:
    """The lines of LoRA that is trained from the base on all requests in force; seconds are of the last training."""
    found = []
    for after, active in requests.order.stages.items():
        begun = time.perf_counter()
        model = merged(
            requests, requests.experiment.load("base"), requests.rows_for(active), requests.settings["anew"]
        )
        seconds = time.perf_counter() - begun
        found.append({"after": after, **requests.scores(model, "start", active), "train_seconds": seconds})
        found[-1]["bytes"] = model_bytes(model)
        del model
        gc.collect()
    return found


def measured_together(requests: Requests) -> list[dict[str, Any]]:
    """The line of one prompt for all."""
    experiment = requests.experiment
    rows, settings = requests.rows_for(requests.people), requests.settings["together"]
    folder = train_prompt(requests, "all", rows, settings)
    base = experiment.load("base")
    unlearner = SoftPromptUnlearner.from_pretrained(base, folder / "prompt")
    gate = load(folder / "gate", base, experiment.tokenizer)
    model = GatedUnlearner(unlearner, experiment.tokenizer, {"default": gate}).eval()
    cost = json.loads((folder / "cost.json").read_text())
    size = folder_bytes(folder / "prompt") + folder_bytes(folder / "gate")
    scores = requests.scores(model, settings.get("position", "start"), requests.order.added)
    return [{"after": "10 added", **scores, "train_seconds": cost["seconds"], "bytes": size}]


def measured_base(requests: Requests) -> list[dict[str, Any]]:
    """The line of the base."""
    return [{"after": "none", **requests.scores(requests.experiment.load("base"), "start", requests.order.added)}]


SYSTEMS = {
    "base": measured_base,
    "prompts behind gates": measured_prompts,
    "refusals behind gates": measured_refusals,
    "one prompt for all": measured_together,
    "LoRA, merged each time": measured_merged,
    "LoRA, trained anew each time": measured_anew,
}


def main() -> None:
    args = parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    folder = args.models_dir or args.output_dir / "models"
    experiment = Plan.read(args.plan).experiment(args.seed, args.model, args.data_dir, folder)
    requests = Requests(args, experiment, json.loads(args.settings.read_text()))
    path = args.output_dir / "requests.jsonl"
    done = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    facts = {"seed": args.seed, "model": Path(args.model).name, "experiment": experiment.digest}
    facts |= {"settings": requests.settings}
    for name in args.systems:
        if any({**one, **facts, "system": name} == one for one in done):
            continue
        lines = [facts | {"system": name} | line for line in SYSTEMS[name](requests)]
        with path.open("a") as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines))
        for line in lines:
            values = {key: round(value, 3) for key, value in line.items() if isinstance(value, float)}
            print(f"{name}, {line['after']}: {values}", flush=True)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
