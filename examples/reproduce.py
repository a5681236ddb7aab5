"""Tables and figures of the SPUL paper (arXiv 2406.12038) for any model and data set.

Downloaded from the Hub, as published (a GPU):

    python examples/reproduce.py --table main --dataset karuna-bhaila/Unlearning_SST2 --model facebook/opt-1.3b \\
        --memorize lora --seeds 0 1 2 --output-dir out/opt-sst2

From local files, at a size for two CPU cores:

    python examples/reproduce.py --table main --dataset sst2 --data-dir ../shared/data/sst2 \\
        --model ../shared/models/small-lm --second-question --limit 8000 --limit-score 1000 --memorize-lr 1e-3 \\
        --memorize-batch-size 64 --steps 300 --forget-fraction 0.5 --prompt-types prefix_tuning --output-dir out/sst2

With nothing but this repository: `--dataset reviews --model small` or `--dataset quiz --model small`.

Tables: `main` (every method), `ablation` (SPUL without its terms), `forget-size` (parts of the forget set), `models`
(several `--model`). Figures: `tsne`, `prompt-length`, `pareto`. `--search N` chooses alpha, beta and p by N trials.

Every run is one line of `runs.jsonl` in `--output-dir` as soon as it is done. A repeated command resumes where it
stopped, and other tables use the stored runs. Memorized models are stored beside it, in `models/`.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset
from paper.experiment import Experiment
from paper.figures import draw_forget_size, draw_prompt_length, draw_tradeoff, draw_tsne_coordinates, tsne_coordinates
from paper.published import published_rows
from paper.runs import PROMPT_TYPES, SMALL, TASKS, TOYS, Run, Runs, Setup
from paper.tables import cost_table, score_table
from tqdm.auto import tqdm

from spul.data import UnlearningData
from spul.evaluation.report import save_figure
from spul.records.digests import digest
from spul.training.methods import METHODS
from spul.training.settings_search import Candidate, search

# P-tuning and layers: as published. The others: found on small models.
LEARNING_RATES = {"p_tuning": 1e-4, "prompt_tuning": 0.05, "prefix_tuning": 0.03}
LEARNING_RATES |= {"full": 1e-5, "lora": 1e-4, "layers": 5e-5}
# Compared unless others are named. AltPO needs alternate answers, RMU the number of a layer: they have no option here.
COMPARED = ("SPUL", "GA", "RL", "GA+KL", "GA+GD", "NPO", "NPO+KL", "NPO+GD", "SimNPO", "SimNPO+KL", "SimNPO+GD", "EUL")
AVAILABLE = tuple(name for name in METHODS if name not in ("AltPO", "RMU"))
PUBLISHED_NAMES = {"Unlearning_SST2": "sst2", "Unlearning_Yelp_Polarity": "yelp"}
LOSS_TERMS = ((0.0, 0.0), (1.0, 0.0), (0.0, 0.5), (1.0, 0.5))
FORGET_SIZES = (0.25, 0.5, 0.75, 1.0)
PROMPT_LENGTHS = (10, 20, 30, 40, 50)
MOST_LABELS = 10  # distinguishable markers


# ---- which runs ----


def make_run(args: argparse.Namespace, method: str, trainable: str, **settings: Any) -> Run:
    """A run with the settings of the command, except those given."""
    is_prompt = trainable in PROMPT_TYPES
    common = {"alpha": args.alpha, "beta": args.beta} if is_prompt else {}
    return Run(
        **{
            "method": method,
            "trainable": trainable,
            "learning_rate": args.lr.get(method, args.lr[trainable]),
            "steps": args.steps.get(method, args.steps.get("all")),
            "epochs": args.epochs,
            "batch_size": args.batch_size,
            "forget_fraction": args.forget_fraction,
            "num_virtual_tokens": args.num_virtual_tokens,
            **common,
            **settings,
        }
    )


def trainables(args: argparse.Namespace, method: str) -> list[str]:
    """The trainables of a method."""
    return {"SPUL": args.prompt_types, "EUL": ["layers"]}.get(method, [args.baseline_trainable])


def grid(args: argparse.Namespace, what: str) -> list[Run]:
    """The runs of a table or figure, for one model and seed."""
    prompts = [("SPUL", prompt_type) for prompt_type in args.prompt_types]
    if what == "ablation":
        return [make_run(args, *p, alpha=a, beta=b) for p in prompts for a, b in LOSS_TERMS]
    if what == "forget-size":
        some = [(method, trainable) for method in args.methods for trainable in trainables(args, method)]
        return [make_run(args, *each, forget_size=size) for each in some for size in FORGET_SIZES]
    if what == "prompt-length":
        return [make_run(args, *p, num_virtual_tokens=length) for p in prompts for length in args.prompt_lengths]
    methods = ["SPUL"] if what in ("models", "tsne") else args.methods
    return [make_run(args, method, trainable) for method in methods for trainable in trainables(args, method)]


def reference_rows(args: argparse.Namespace, what: str) -> list[str]:
    """The rows of a table that are models without unlearning."""
    if what in ("ablation", "forget-size", "prompt-length", "tsne", "models"):
        return ["base"]
    if args.memorize == "none":  # vanilla is the base, and nothing is retrained
        return ["base"]
    return ["base", "retrained"] if args.dataset in TOYS else ["vanilla", "base", "retrained"]


def experiments(args: argparse.Namespace) -> Iterator[Experiment]:
    """An experiment for each model and seed."""
    shared = [field.name for field in dataclasses.fields(Setup) if field.name not in ("model", "seed")]
    for model, seed in itertools.product(args.model, args.seeds):
        setup = Setup(**{name: getattr(args, name) for name in shared}, model=model, seed=seed)
        yield Experiment(setup, args.output_dir / "models" / f"{Path(model).name}-{seed}", args.eval_batch_size)


def compute(args: argparse.Namespace, runs: Runs, what: str) -> list[dict[str, Any]]:
    """Compute or read all runs of a table or figure."""
    work = [
        (experiment, run)
        for experiment in experiments(args)
        for run in [*reference_rows(args, what), *grid(args, what)]
    ]
    found = []
    for experiment, run in tqdm(work, desc=what, unit="run"):
        name = run if isinstance(run, str) else f"{run.method} ({run.trainable})"
        tqdm.write(f"{experiment.setup.model}, seed {experiment.setup.seed}: {name}")
        for record in runs.get(experiment, run):
            found.append(record)
            tqdm.write("  ".join(f"{split} {100 * s['accuracy']:.2f}" for split, s in record["scores"].items()))
    return found


# ---- output ----


def named(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Runs with the trainable in their name if it is LoRA or SPUL has several; the detached model once."""
    kinds = {record["trainable"] for record in records if record["method"] == "SPUL"}
    shown = []
    for record in records:
        if record["method"] == "SPUL" and len(kinds) > 1:
            record = {**record, "method": f"SPUL ({record['trainable'].replace('_', ' ')})"}
        if record["trainable"] == "lora":
            record = {**record, "method": f"{record['method']} (LoRA)"}
        if record["method"] == "SPUL detached" and len(kinds) > 1 and record["trainable"] != sorted(kinds)[0]:
            continue
        shown.append(record)
    return shown


def write_table(args: argparse.Namespace, what: str, records: list[dict[str, Any]]) -> None:
    """Write and print a table as Markdown."""
    by = {
        "ablation": ("method", "alpha", "beta"),
        "forget-size": ("method", "forget_size"),
        "models": ("model", "method"),
    }
    columns = by.get(what, ("method",))
    if what in ("ablation", "forget-size"):  # the base has no such settings, and detached is the base
        empty = {"alpha": None, "beta": None, "forget_size": None}
        records = [{**r, "settings": {**empty, **r["settings"]}} for r in records if "detached" not in r["method"]]
    records = named(records)
    dataset = PUBLISHED_NAMES.get(Path(args.dataset).name, args.dataset)
    published = published_rows(dataset) if what in ("main", "models") else []
    records = [{**record, "dataset": dataset} for record in records]
    parts = [score_table(records, by=columns, published=published), score_table(records, "generic", by=columns)]
    trained = [record for record in records if record["cost"]]
    if trained:
        parts.append(cost_table(trained, by=columns))
    text = "\n\n".join(parts)
    path = args.output_dir / f"table-{what}.md"
    path.write_text(text + "\n", encoding="utf-8")
    print(f"\n{text}\nwritten to {path}")
    if what == "forget-size":
        methods = [record for record in records if record["method"] != "base"]
        report(save_figure(draw_forget_size(methods), args.output_dir / "figure-forget-size"))


def report(paths: list[Path]) -> None:
    """Print the paths of written files."""
    print("written: " + ", ".join(map(str, paths)))


def draw_tsne(args: argparse.Namespace, experiment: Experiment) -> None:
    """Draw t-SNE of the last layer before and after unlearning; trains the prompt, since runs store no models."""
    run = grid(args, "tsne")[0]
    rng = random.Random(0)
    rows, is_forget = [], []
    for split in ("test_retain", "test_forget"):
        some = list(experiment.rows[split])
        some = rng.sample(some, min(len(some), args.tsne_rows))
        rows += some
        is_forget += [split == "test_forget"] * len(some)
    picked = Dataset.from_list(rows)
    labels = [row["completion"].strip() for row in rows]
    if len(different := set(labels)) > MOST_LABELS:
        raise SystemExit(f"t-SNE marks rows by label, of at most {MOST_LABELS}; {args.dataset} has {len(different)}.")
    model, _ = experiment.train(run)
    after = experiment.embeddings(model, picked, "after")
    with model.disable_adapter():
        before = experiment.embeddings(model, picked, "before")
    points = tsne_coordinates({"before": before, "after": after}, is_forget, labels)
    path = args.output_dir / "figure-tsne"
    path.with_suffix(".json").write_text(json.dumps(points) + "\n", encoding="utf-8")
    report([*save_figure(draw_tsne_coordinates(points), path), path.with_suffix(".json")])


def journal_key(args: argparse.Namespace, experiment: Experiment) -> str:
    """Digest by which searches of the same setup, prompt and schedule share their trials."""
    run = dataclasses.asdict(make_run(args, "SPUL", args.prompt_types[0]))
    known = [experiment.identity, run, args.held_out]
    return digest(known)[:12]


def run_search(args: argparse.Namespace, experiment: Experiment) -> None:
    """Choose alpha, beta and p by scores on held-out training rows."""
    data: UnlearningData = experiment.data
    train, held_out = {}, {}
    for group in ("forget", "retain"):
        halves = data.rows(f"train_{group}").train_test_split(test_size=args.held_out, seed=experiment.setup.seed)
        train[f"train_{group}"], held_out[group] = halves["train"], halves["test"]
    base = experiment.load("base")
    bound = experiment.accuracy(base, held_out["retain"]) - args.max_retain_loss

    def train_and_score(candidate: Candidate) -> tuple[float, float]:
        run = make_run(args, "SPUL", args.prompt_types[0], **dataclasses.asdict(candidate))
        model, _ = experiment.train(run, train)
        return experiment.accuracy(model, held_out["retain"]), experiment.accuracy(model, held_out["forget"])

    found = search(
        train_and_score,
        min_retain=max(0.0, bound),
        num_trials=args.search,
        seed=experiment.setup.seed,
        storage=args.output_dir / f"search-{journal_key(args, experiment)}.journal",
    )
    content = {
        "min_retain": found.min_retain,
        "best": found.best and found.best.to_dict(),
        "front": [trial.to_dict() for trial in found.front],
        "trials": [trial.to_dict() for trial in found.trials],
    }
    path = args.output_dir / "search.json"
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    lines = ["| alpha | beta | p | retain | forget | |", "|---:|---:|---:|---:|---:|---|"]
    for trial in found.trials:
        c = trial.candidate
        mark = "chosen" if trial == found.best else "front" if trial in found.front else ""
        cells = (c.alpha, c.beta, c.num_virtual_tokens, f"{100 * trial.retain:.2f}", f"{100 * trial.forget:.2f}", mark)
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    print(f"Accuracy on held-out rows in %; retain at least {100 * found.min_retain:.2f}.\n" + "\n".join(lines))
    if found.best is None:
        print("No trial met the bound; raise --max-retain-loss, or train longer.")
    print(f"written to {path}")


# ---- the command ----


def make_parser(description: str) -> argparse.ArgumentParser:
    """A parser with the options of experiments and runs."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--dataset", default="reviews", help="sst2, yelp, wmdp, tofu, imdb; reviews, quiz; Hub name or folder")
    add("--task", choices=TASKS, default="sentiment", help="prompt format of a data set in four splits")
    add("--data-dir", help="local folder of a known data set; the Hub unless given")
    add("--retain-dir", help="local folder of SciQ, for wmdp")
    add("--model", nargs="+", default=[SMALL], help=f"Hub name or folder; {SMALL!r} for reviews and quiz")
    add("--methods", nargs="+", choices=AVAILABLE, default=list(COMPARED), metavar="METHOD", help=", ".join(AVAILABLE))
    add("--seeds", nargs="+", type=int, default=[0])
    add("--limit", type=int, help="maximum number of retain rows to train on")
    add("--limit-score", type=int, help="maximum number of scored rows of each retain split")
    add("--forget-set", choices=("forget01", "forget05", "forget10"), help="for tofu; forget10 unless given")
    add(
        "--memorize",
        choices=("full", "lora", "qlora", "none"),
        default="full",
        help="trainable of the memorizing stage",
    )
    add("--memorize-epochs", type=float, default=3)
    add("--memorize-lr", type=float, default=1e-4)
    add("--memorize-batch-size", type=int, default=32)
    add("--label-smoothing", type=float, default=0.0, help="of memorizing; a less certain model is easier to steer")
    add("--second-question", action="store_true", help="memorize who is named as well (SST-2, for small models)")
    add("--load-in-4bit", action="store_true", help="score and unlearn over weights in 4-bit NF4")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="type of the weights otherwise")
    add("--max-length", type=int, default=1024, help="tokens of a row, virtual tokens excluded")
    add("--bf16", action=argparse.BooleanOptionalAction, default=True, help="train under bfloat16 autocast")
    add("--prompt-types", nargs="+", choices=PROMPT_TYPES, default=["p_tuning"], metavar="TYPE", help="of SPUL")
    add(
        "--baseline-trainable",
        choices=("full", "lora"),
        default="full",
        help="trainable of methods other than SPUL and EUL",
    )
    add("--num-virtual-tokens", type=int, default=30)
    add("--alpha", type=float, default=1.0, help="weight of SPUL's retain term")
    add("--beta", type=float, default=0.5, help="weight of SPUL's KL term")
    add("--lr", nargs="+", default=[], metavar="NAME=LR", help=f"by trainable or method; defaults {LEARNING_RATES}")
    add("--epochs", type=float, default=10, help="passes over the rows, unless --steps is given")
    add(
        "--steps",
        nargs="+",
        default=[],
        metavar="N or METHOD=N",
        help="training steps; methods without retain rows take the number that shows as many forget rows",
    )
    add("--batch-size", type=int, default=32)
    add("--eval-batch-size", type=int, default=64)
    add("--forget-fraction", type=float, help="share of forget rows in a batch; unless given, that of the data")
    add("--output-dir", type=Path, default=Path("out/reproduce"))
    return parser


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse and check the options."""
    args = parser.parse_args()
    for name in ("model", "methods", "seeds", "prompt_types"):
        if len(set(values := getattr(args, name))) < len(values):
            parser.error(f"--{name.replace('_', '-')} {' '.join(map(str, values))}: one is given twice.")
    for name in ("batch_size", "eval_batch_size", "num_virtual_tokens", "epochs", "limit", "limit_score"):
        if (value := getattr(args, name)) is not None and value <= 0:
            parser.error(f"--{name.replace('_', '-')} {value}: expected a number above 0.")
    if args.forget_fraction is not None and not 0 < args.forget_fraction < 1:
        parser.error(f"--forget-fraction {args.forget_fraction}: expected a share above 0 and below 1.")
    try:
        args.lr = {**LEARNING_RATES, **by_name(args.lr, (*LEARNING_RATES, *METHODS))}
        args.steps = {name: int(steps) for name, steps in by_name(args.steps, ("all", *METHODS), "all").items()}
    except ValueError as error:
        parser.error(str(error))
    return args


def by_name(texts: list[str], names: tuple[str, ...], default: str | None = None) -> dict[str, float]:
    """Numbers above 0 out of `NAME=NUMBER`, or a number alone for the default name."""
    values = {}
    for text in texts:
        name, _, number = text.rpartition("=")
        name = name or (default or "")
        try:
            values[name] = float(number)
        except ValueError:
            values[name] = math.nan
        if name not in names or not 0 < values[name] < math.inf:
            expected = f"NAME=NUMBER{'' if default is None else ' or NUMBER'}"
            raise ValueError(f"{text!r}: expected {expected}, above 0, with NAME one of {', '.join(names)}.")
    return values


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__.split("\n")[0])
    add = parser.add_argument
    add("--table", choices=("main", "ablation", "forget-size", "models"), nargs="+", default=[])
    add("--figure", choices=("tsne", "prompt-length", "pareto"), nargs="+", default=[])
    add("--search", type=int, metavar="TRIALS", help="number of trials that choose alpha, beta and p")
    add("--max-retain-loss", type=float, default=0.01, help="of the search: largest loss of retain accuracy, in 0..1")
    add("--held-out", type=float, default=0.15, help="of the search: share of the training rows to score on")
    add("--prompt-lengths", nargs="+", type=int, default=list(PROMPT_LENGTHS), help="of --figure prompt-length")
    add("--tsne-rows", type=int, default=300, help="rows of each test split in --figure tsne")
    args = parsed(parser)
    if not (args.table or args.figure or args.search):
        parser.error("nothing to do: give --table, --figure or --search.")
    if args.tsne_rows <= 0:
        parser.error(f"--tsne-rows {args.tsne_rows}: expected a number above 0.")
    baselines = set(args.methods) - {"SPUL", "EUL"} and {"main", "forget-size", "pareto"} & {*args.table, *args.figure}
    if args.load_in_4bit and args.baseline_trainable == "full" and baselines:
        parser.error("--load-in-4bit: 4-bit weights do not train; give --baseline-trainable lora, or --methods SPUL.")
    return args


def main() -> None:
    args = parse_args()
    runs = Runs(args.output_dir / "runs.jsonl")
    for what in args.table:
        write_table(args, what, compute(args, runs, what))
    for what in args.figure:
        if what == "tsne":
            draw_tsne(args, next(experiments(args)))
            continue
        records = compute(args, runs, "main" if what == "pareto" else what)
        if what == "pareto":
            report(save_figure(draw_tradeoff(named(records)), args.output_dir / "figure-pareto"))
        for prompt_type in args.prompt_types if what == "prompt-length" else ():
            some = [record for record in records if (record["method"], record["trainable"]) == ("SPUL", prompt_type)]
            report(save_figure(draw_prompt_length(some), args.output_dir / f"figure-prompt-length-{prompt_type}"))
    if args.search:
        run_search(args, next(experiments(args)))


if __name__ == "__main__":
    main()
