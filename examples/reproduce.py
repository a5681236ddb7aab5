"""Tables and figures of the SPUL paper (arXiv 2406.12038) for any model and data set.

Downloaded from the Hub, as published (a GPU):

    python examples/reproduce.py --table main grid --dataset karuna-bhaila/Unlearning_SST2 \\
        --model meta-llama/Llama-2-7b-hf --blank-lines --draw-once --output-dir out/llama-sst2

From local files, at a size for two CPU cores:

    python examples/reproduce.py --table main --dataset sst2 --data-dir ../shared/data/sst2 \\
        --model ../shared/models/small-lm --second-question --limit 8000 --limit-score 1000 --memorize full \\
        --memorize-lr 1e-3 --memorize-epochs 3 --memorize-batch-size 64 --steps 300 --forget-fraction 0.5 \\
        --prompt-types prefix_tuning --output-dir out/sst2

With nothing but this repository: `--dataset reviews --model small` or `--dataset quiz --model small`.

Tables: `main` (every method), `grid` (SPUL's alpha and beta), `ablation` (SPUL without its terms), `eul-terms` (EUL
without its terms), `forget-size` (parts of the forget set), `models` (several `--model`). Figures: `tsne`,
`prompt-length`, `pareto`. `--search N` chooses alpha, beta and p by N trials. The defaults are the paper's.

Every run is one line of `runs.jsonl` in `--output-dir` as soon as it is done. A repeated command resumes where it
stopped, and other tables use the stored runs. Memorized models are stored beside it, in `models/`.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset
from paper.experiment import Experiment
from paper.figures import draw_forget_size, draw_prompt_length, draw_tradeoff, draw_tsne_coordinates, tsne_coordinates
from paper.options import make_parser, parsed, published_name
from paper.published import published_rows
from paper.runs import EUL_TERMS, PROMPT_TYPES, TOYS, Run, Runs, Setup
from paper.tables import cost_table, score_table
from tqdm.auto import tqdm

from spul.data import UnlearningData
from spul.evaluation.report import save_figure
from spul.records.digests import digest
from spul.training.settings_search import Candidate, search

ALPHAS, BETAS = (0.1, 0.5, 1.0), (0.0, 0.1, 0.5, 1.0)
# Of SPUL, where --beta is not given; 0.5 elsewhere. The published tables are of one alpha, 1, unless they vary it.
PUBLISHED_BETAS = {"forget-size": 1.0, "models": 1.0, "prompt-length": 1.0}
LOSS_TERMS = ((0.0, 0.0), (1.0, 0.0), (0.0, 0.5), (1.0, 0.5))
FORGET_SIZES = (0.25, 0.5, 0.75, 1.0)
PROMPT_LENGTHS = (10, 20, 30, 40, 50)
MOST_LABELS = 10  # distinguishable markers


# ---- which runs ----


def make_run(args: argparse.Namespace, method: str, trainable: str, **settings: Any) -> Run:
    """A run with the settings of the command, except those given."""
    is_prompt = trainable in PROMPT_TYPES
    common = {"alpha": args.alpha, "beta": 0.5 if args.beta is None else args.beta} if is_prompt else {}
    return Run(
        **{
            "method": method,
            "trainable": trainable,
            "learning_rate": args.lr.get(method, args.lr[trainable]),
            "steps": args.steps.get(method, args.steps.get("all")),
            "epochs": args.epochs.get(method, args.epochs.get("all")),
            "batch_size": args.batch_size,
            "forget_fraction": args.forget_fraction,
            "num_virtual_tokens": args.num_virtual_tokens,
            "draw_once": args.draw_once,
            **common,
            **settings,
        }
    )


def trainables(args: argparse.Namespace, method: str) -> list[str]:
    """The trainables of a method."""
    return {"SPUL": args.prompt_types, "EUL": ["layers"]}.get(method, [args.baseline_trainable])


def runs_of(args: argparse.Namespace, what: str) -> list[Run]:
    """The runs of a table or figure, for one model and seed."""
    prompts = [("SPUL", prompt_type) for prompt_type in args.prompt_types]
    if what in ("grid", "ablation"):
        cells = itertools.product(ALPHAS, BETAS) if what == "grid" else LOSS_TERMS
        return [make_run(args, *p, alpha=a, beta=b) for p, (a, b) in itertools.product(prompts, cells)]
    if what == "eul-terms":
        return [make_run(args, "EUL", "layers", without=term) for term in (None, *EUL_TERMS)]
    weights = {} if args.beta is not None else {"beta": PUBLISHED_BETAS.get(what, 0.5)}
    if what == "prompt-length":
        lengths = itertools.product(prompts, args.prompt_lengths)
        return [make_run(args, *p, num_virtual_tokens=length, **weights) for p, length in lengths]
    methods = ["SPUL"] if what in ("models", "tsne") else args.methods
    some = [(method, trainable) for method in methods for trainable in trainables(args, method)]
    sizes = FORGET_SIZES if what == "forget-size" else (1.0,)
    return [
        make_run(args, *each, forget_size=size, **(weights if each[0] == "SPUL" else {}))
        for each in some
        for size in sizes
    ]


def reference_rows(args: argparse.Namespace, what: str) -> list[str]:
    """The rows of a table that are models without unlearning."""
    if what not in ("main", "pareto"):
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
        for run in [*reference_rows(args, what), *runs_of(args, what)]
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


VARIED = {
    "grid": ("method", "alpha", "beta"),
    "ablation": ("method", "alpha", "beta"),
    "eul-terms": ("method", "without"),
    "forget-size": ("method", "forget_size"),
    "models": ("model", "method"),
}
"""Settings by which rows of a table differ, unless it is by the method alone."""


def write_table(args: argparse.Namespace, what: str, records: list[dict[str, Any]]) -> None:
    """Write and print a table as Markdown."""
    columns = VARIED.get(what, ("method",))
    if what in ("grid", "ablation", "eul-terms", "forget-size"):
        # The base has no such settings, and detached is the base.
        empty = dict.fromkeys(columns[1:])
        records = [{**r, "settings": {**empty, **r["settings"]}} for r in records if "detached" not in r["method"]]
    records = named(records)
    dataset = published_name(args.dataset)
    records = [{**record, "dataset": dataset} for record in records]
    parts = []
    for measure in ("accuracy", "f1", "generic"):
        published = published_rows(dataset, table=what) if measure != "generic" else []
        parts.append(score_table(records, measure, by=columns, published=published))
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


def tsne_rows(experiment: Experiment, per_label: int) -> tuple[list[dict[str, Any]], list[bool]]:
    """Training rows for t-SNE, at most so many of each label, and whether they are forget rows.

    The paper draws 500 rows of each label. It does not say how many are forget rows; here half of them are, or all
    there are, and retain rows are the others.
    """
    by_label: dict[str, dict[bool, list[dict[str, Any]]]] = {}
    for is_forget in (False, True):
        for row in experiment.rows["train_forget" if is_forget else "train_retain"]:
            by_label.setdefault(row["completion"].strip(), {False: [], True: []})[is_forget].append(row)
    if len(by_label) > MOST_LABELS:
        raise SystemExit(
            f"t-SNE marks rows by label, of at most {MOST_LABELS}; {experiment.setup.dataset} has {len(by_label)}."
        )
    rng, rows, flags = random.Random(0), [], []
    for groups in by_label.values():
        num_forget = min(len(groups[True]), max(per_label // 2, per_label - len(groups[False])))
        for is_forget, most in ((False, per_label - num_forget), (True, num_forget)):
            some = rng.sample(groups[is_forget], min(most, len(groups[is_forget])))
            rows += some
            flags += [is_forget] * len(some)
    return rows, flags


def draw_tsne(args: argparse.Namespace, experiment: Experiment) -> None:
    """Draw t-SNE of the last layer before and after unlearning; trains the prompt, since runs store no models."""
    run = runs_of(args, "tsne")[0]
    rows, is_forget = tsne_rows(experiment, args.tsne_rows)
    picked = Dataset.from_list(rows)
    labels = [row["completion"].strip() for row in rows]
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


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__.split("\n")[0])
    add = parser.add_argument
    add("--table", choices=("main", *VARIED), nargs="+", default=[])
    add("--figure", choices=("tsne", "prompt-length", "pareto"), nargs="+", default=[])
    add("--search", type=int, metavar="TRIALS", help="number of trials that choose alpha, beta and p")
    add("--max-retain-loss", type=float, default=0.01, help="of the search: largest loss of retain accuracy, in 0..1")
    add("--held-out", type=float, default=0.15, help="of the search: share of the training rows to score on")
    add("--prompt-lengths", nargs="+", type=int, default=list(PROMPT_LENGTHS), help="of --figure prompt-length")
    add("--tsne-rows", type=int, default=500, help="training rows of each label in --figure tsne")
    args = parsed(parser)
    if not (args.table or args.figure or args.search):
        parser.error("nothing to do: give --table, --figure or --search.")
    if args.tsne_rows <= 0:
        parser.error(f"--tsne-rows {args.tsne_rows}: expected a number above 0.")
    if args.search or "tsne" in args.figure:
        for name in ("model", "seeds", "prompt_types"):
            if len(several := getattr(args, name)) > 1:
                given = f"--{name.replace('_', '-')} {' '.join(map(str, several))}"
                parser.error(f"{given}: --figure tsne and --search are of one; give them in a command of their own.")
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
