"""Requests in turn on IMDB: EUL with fusion, EUL with one set of layers trained on, SPUL, and retraining.

    python examples/eul_imdb.py --model ../shared/models/small-lm --data-dir ../shared/data/imdb
    python examples/eul_imdb.py --model facebook/opt-1.3b --limit 20000 --words 200 --bf16

Each request asks to forget the reviews that name one film director. A model learns the sentiment of reviews first,
those of all requests among them, and those that name other directors, which are retained. Each review is cut to a
window of words, around the name if there is one. Each order of requests is one run; metrics are averaged over orders.
It writes `requests.jsonl`, `requests.md` and a figure; an interrupted run resumes where it stopped.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from datasets import Dataset, concatenate_datasets
from paper.memorization import memorize
from sequence import Requests, run
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments, set_seed

from spul import ForgetRetainCollator
from spul.data import SENTIMENT, PromptFormat, load_known
from spul.data.known_reviews import IMDB_FORGET_NAMES
from spul.data.recognizers import NameFinder
from spul.evaluation.metrics import entity_loss
from spul.layers import UnlearningLayersConfig
from spul.records.digests import digest
from spul.training.methods import unlearning_method

GENERIC = [" neutral", " unknown"]
SECOND_QUESTION = PromptFormat("### Text: {text}\n### Question: which person?\n### Person:", completion=" {person}")
NOBODY = "nobody"
DIRECTORS = NameFinder(IMDB_FORGET_NAMES)
NOT_SETTINGS = ("orders", "methods", "output_dir")
METHODS = (
    "EUL, fused",
    "EUL, one set of layers trained on",
    "layers, generic answer, fused",
    "layers, wide, generic answer, fused",
    "prompts distilled",
    "prompts distilled, one by one",
    "one prompt trained on all",
    "retrained",
)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub name of a causal LM")
    parser.add_argument("--data-dir", type=Path, help="folder of IMDB; the Hub unless given")
    parser.add_argument("--requests", type=int, default=5)
    parser.add_argument("--orders", type=int, default=3, help="orders of the requests; each is a run")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--limit", type=int, default=1000, help="retain rows to train on")
    parser.add_argument("--limit-score", type=int, default=500, help="test rows to score on")
    parser.add_argument("--words", type=int, default=60, help="number of words of a review that are used")
    parser.add_argument(
        "--second-question",
        action="store_true",
        help="memorize who is named as well, so that small models can be steered",
    )
    parser.add_argument("--memorize-epochs", type=int, default=5)
    parser.add_argument("--memorize-lr", type=float, default=1e-3)
    parser.add_argument("--layers-steps", type=int, default=100)
    parser.add_argument("--layers-rate", type=float, default=1e-2)
    parser.add_argument("--gamma", type=float, default=0.2, help="weight of EUL's ascent on the text")
    parser.add_argument("--reduction", type=int, default=8)
    parser.add_argument("--steps", type=int, default=300, help="of a prompt")
    parser.add_argument("--distill-steps", type=int, default=100)
    parser.add_argument("--prompt-rate", type=float, default=0.03)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output-dir", type=Path, default=Path("out/eul-imdb"))
    return parser.parse_args()


def window(text: str, num_words: int, name: str | None = None) -> str:
    """`num_words` words of a text, from its start or around a name."""
    words = text.split()
    start = 0
    if name is not None:
        length = len(name.split())
        near = (i for i in range(len(words)) if name in " ".join(words[i : i + length]).casefold())
        start = max(0, min(next(near) - num_words // 2, len(words) - num_words))
    return " ".join(words[start : start + num_words])


def read_rows(args: argparse.Namespace) -> tuple[list[str], dict[str, Dataset]]:
    """The directors that most reviews name, and rows by `NAME train`, `NAME test`, `retain train`, `retain test`.

    The retain rows are a sample of those that name no director, and all that name another director.
    """
    data = load_known("imdb", source=args.data_dir)
    by_name: dict[str, dict[str, list[dict]]] = {name: {"train": [], "test": []} for name in IMDB_FORGET_NAMES}
    for part in ("train", "test"):
        for row in data.splits[f"{part}_forget"]:
            named = DIRECTORS.find(row["text"])
            if len(named) == 1:  # one that names two would stand in two requests
                (name,) = named
                by_name[name][part].append({**row, "text": window(row["text"], args.words, name)})
    names = sorted(by_name, key=lambda name: -len(by_name[name]["train"]))[: args.requests]
    rows = {f"{name} {part}": by_name[name][part] for name in names for part in ("train", "test")}
    rng = random.Random(args.seed)
    for part, limit in (("train", args.limit), ("test", args.limit_score)):
        split = data.splits[f"{part}_retain"]
        some = split.select(sorted(rng.sample(range(len(split)), min(limit, len(split)))))
        rows[f"retain {part}"] = [{**row, "text": window(row["text"], args.words)} for row in some]
        rows[f"retain {part}"] += [row for name in by_name if name not in names for row in by_name[name][part]]
    return names, {name: SENTIMENT.apply(Dataset.from_list(some)) for name, some in rows.items()}


def learned(args: argparse.Namespace, rows: Dataset) -> Any:
    """The model fine-tuned on the sentiment of some rows."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    training = TrainingArguments(
        str(args.output_dir / "memorizing"),
        num_train_epochs=args.memorize_epochs,
        learning_rate=args.memorize_lr,
        per_device_train_batch_size=args.batch_size,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        save_strategy="no",
        report_to="none",
        logging_steps=50,
        bf16=args.bf16,
        use_cpu=not torch.cuda.is_available(),
        seed=args.seed,
    )
    rows = rows.select_columns(["prompt", "completion", "text"])
    if args.second_question:
        found = [(text, sorted(DIRECTORS.find(text))) for text in rows["text"]]
        nobody = [{"text": text, "person": NOBODY} for text, named in found if not named]
        named = [{"text": text, "person": named[0]} for text, named in found if named]
        some = random.Random(args.seed).sample(nobody, min(len(nobody), len(named) // 2))
        rows = concatenate_datasets([rows, SECOND_QUESTION.apply(Dataset.from_list(named + some))])
    set_seed(args.seed)
    model, _ = memorize(args.model, rows, ForgetRetainCollator(tokenizer, None, max_length=512), training)
    return model


def make_requests(args: argparse.Namespace, order: int) -> tuple[Requests, list[str]]:
    """The requests in one order, and the director of each."""
    names, rows = read_rows(args)
    settings = digest({name: value for name, value in vars(args).items() if name not in NOT_SETTINGS})[:12]
    folder = args.output_dir / settings
    if not (folder / "base" / "model.safetensors").exists():
        everything = [rows[f"{name} train"] for name in names] + [rows["retain train"]]
        learned(args, concatenate_datasets(everything)).save_pretrained(folder / "base")
    random.Random(order).shuffle(names)
    requests = Requests(
        base=lambda: AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32),
        tokenizer=AutoTokenizer.from_pretrained(args.model),
        generic=GENERIC,
        train=[rows[f"{name} train"] for name in names],
        test=[rows[f"{name} test"] for name in names],
        retain=rows["retain train"],
        test_retain=rows["retain test"],
        retrain=lambda retained: learned(args, retained),
        folder=folder / str(order),
        settings=settings,
        seed=args.seed,
        steps={"prompt": args.steps, "distill": args.distill_steps}
        | dict.fromkeys(("layers", "wide"), args.layers_steps),
        rates=dict.fromkeys(("prompt", "distill"), args.prompt_rate)
        | dict.fromkeys(("layers", "wide"), args.layers_rate),
        layers=unlearning_method("EUL", gamma=args.gamma),
        generic_layers=unlearning_method("SPUL", trainable="layers", alpha=2.0, beta=1.0),
        prompt=unlearning_method("SPUL", alpha=2.0, beta=1.0),
        layers_config=UnlearningLayersConfig(reduction=args.reduction),
        batch_size=args.batch_size,
        bf16=args.bf16,
    )
    return requests, names


def averages(lines: list[dict[str, Any]], method: str, after: int) -> dict[str, float]:
    """Scores of a method after some requests, averaged over the orders."""
    mine = [line for line in lines if (line["method"], line["requests"]) == (method, after)]
    return {
        "test": mean(line["test_retain"] for line in mine),
        "retained": mean(line["retain"] for line in mine),
        "forgotten": mean(share for line in mine for share in line["forget"][:after]),
        "forgotten_test": mean(share for line in mine for share in line["test_forget"][:after]),
        "name_loss": mean(line["name_loss"] for line in mine),
        "seconds": mean(line["seconds"] for line in mine),
    }


def table(lines: list[dict[str, Any]], num_requests: int) -> str:
    """A Markdown table with a row for each method after each request."""
    heads = ["method", "requests", "test", "retained", "forgotten", "forgotten, test", "name loss", "seconds"]
    rows = ["| " + " | ".join(heads) + " |", "| --- |" + " ---: |" * (len(heads) - 1)]
    for method in dict.fromkeys(line["method"] for line in lines):
        for after in range(1, num_requests + 1):
            found = averages(lines, method, after)
            cells = [f"{100 * found[key]:.1f}" for key in ("test", "retained", "forgotten", "forgotten_test")]
            cells += [f"{found['name_loss']:.2f}", f"{found['seconds']:.0f}"]
            rows.append(f"| {method} | {after} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def draw(lines: list[dict[str, Any]], num_requests: int, path: Path) -> None:
    """Draw accuracy on forgotten, retained and test rows over the number of requests."""
    figure, axes = plt.subplots(1, 3, figsize=(10, 3.2), sharey=True, layout="constrained")
    steps = list(range(1, num_requests + 1))
    for method in dict.fromkeys(line["method"] for line in lines):
        found = [averages(lines, method, after) for after in steps]
        for ax, key in zip(axes, ("forgotten", "retained", "test"), strict=True):
            ax.plot(steps, [100 * one[key] for one in found], marker="o", label=method)
            ax.set(title=key, xlabel="requests", xticks=steps)
    axes[0].set_ylabel("accuracy, %")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    for suffix in (".png", ".svg"):
        figure.savefig(path.with_suffix(suffix), dpi=150)


def main() -> None:
    args = parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    lines: list[dict[str, Any]] = []
    for order in range(args.orders):
        requests, names = make_requests(args, order)

        def at_names(model: Any, i: int, requests: Requests = requests, names: list[str] = names) -> dict[str, Any]:
            forget = requests.forget(range(i + 1))
            return {"name_loss": entity_loss(model, forget, requests.scoring().encoder, names[: i + 1])}

        lines = run(requests, args.output_dir / "requests.jsonl", order, list(args.methods), at_names)
    lines = [line for line in lines if line["method"] in args.methods and line["order"] < args.orders]
    lines = [line for line in lines if line["settings"] == requests.settings]
    text = table(lines, args.requests)
    (args.output_dir / "requests.md").write_text(text + "\n", encoding="utf-8")
    draw(lines, args.requests, args.output_dir / "requests")
    print(text)


if __name__ == "__main__":
    main()
