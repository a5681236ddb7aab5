"""Train methods on one experiment and evaluate each with every measure and attack.

    python examples/evaluate_methods.py --methods SPUL GA+GD EUL --prompt-types prefix_tuning --steps 600 \\
        --lr prefix_tuning=0.1 --forget-fraction 0.5 --row-length 98          # the quick start's model
    python examples/evaluate_methods.py --methods SPUL --augment 2 ...        # trained on rewritten rows, too

The options are those of `reproduce.py`, and some more. Each method is held against the model as it was before, and
against one retrained without the forget rows. For each method and seed there is a folder with `evaluation.json`,
`measurements.jsonl`, a report and figures; `attacks.md` has all of them side by side. An interrupted run goes on where
it stopped.

`--augment` trains on rows in other letter case, with other spaces, asides and turns before as well, so many for each
row as it is (`spul.augmentation`); the attacks that are evaluated have other texts, shares and draws.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from experiment import Experiment
from reproduce import carriers, experiments, make_parser, make_run, parsed
from runs import Run, run_settings
from tqdm.auto import tqdm

import spul
from spul import ForgetRetainCollator, SoftPromptUnlearner, UnlearningLayers
from spul.augmentation import augmented, rewritings
from spul.data.sources import read_file, read_hub
from spul.evaluate import MEASURES
from spul.evaluation import topic_neighbours
from spul.evaluation.results import EVALUATION_NAME, Evaluation, join
from spul.evaluation.suite import AttackSettings
from spul.report import write_report

# The questions of the made-up and the real reviews in other words.
WORDINGS = {
    "text": {
        "### Question: What is the sentiment of the given text?": "### Question: Did the writer like it?",
        "what is the sentiment": "is it good or bad",
    }
}


def perturbed_questions(args: argparse.Namespace) -> dict[str, Dataset]:
    """TOFU's questions with wrong answers, at most so many of each set as are attacked."""
    if args.dataset != "tofu":
        return {}
    names = {"forget": f"{args.forget_set or 'forget10'}_perturbed"}
    names |= {name: f"{name}_perturbed" for name in ("retain", "real_authors", "world_facts")}
    columns = ("question", "answer", "perturbed_answer")
    found = {}
    for name, file in names.items():
        more = ("paraphrased_answer",) if name in ("forget", "retain") else ()
        if args.data_dir is None:
            rows = read_hub("locuslab/TOFU", "train", columns + more, config=file)
        else:
            rows = read_file(Path(args.data_dir) / f"{file}.json", columns + more)
        found[name] = rows.shuffle(seed=0).select(range(min(args.attack_rows, len(rows))))
    return found


def near_rows(experiment: Experiment, most: int) -> Dataset:
    """Of the test retain rows a quarter, or so many, whose words are most like those of forget rows."""
    forget, retain = (experiment.rows[split] for split in ("train_forget", "test_retain"))
    num = min(most, len(retain) // 4)
    return topic_neighbours(forget, retain, num, experiment.data.format.text_field)


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__.split("\n")[0])
    add = parser.add_argument
    add("--augment", type=float, help="rewritten training rows for each forget row; retain rows get a quarter of that")
    add("--augment-turns", nargs="+", type=int, default=[1, 2, 3, 5, 8], help="of the rewritten rows, as --turns")
    add("--attack-rows", type=int, default=200, help="at most so many rows of a set are attacked")
    add("--turns", nargs="+", type=int, default=[1, 4], help="of other questions and answers, that dilute a prompt")
    add("--unrelated-texts", type=Path, help="a file of running text, one on each line")
    add("--measures", nargs="+", choices=MEASURES, default=list(MEASURES), metavar="MEASURE", help=", ".join(MEASURES))
    add("--row-length", type=int, help="tokens of a row in unlearning and scoring; --max-length unless given")
    parser.set_defaults(output_dir=Path("out/evaluations"))
    args = parsed(parser)
    path = args.unrelated_texts
    args.unrelated_texts = [] if path is None else path.read_text(encoding="utf-8").splitlines()
    return args


def trained(args: argparse.Namespace, experiment: Experiment, run: Run, folder: Path) -> Any:
    """A run's model; a prompt or layers are kept and found again."""
    carrier: Any = UnlearningLayers if run.carrier == "layers" else SoftPromptUnlearner
    if (folder / "spul_config.json").exists():
        return carrier.from_pretrained(experiment.load("base"), folder, is_trainable=True)
    rows = {name: experiment.rows[name] for name in ("train_forget", "train_retain")}
    if (augment := args.augment) is not None:
        field, retain = experiment.data.format.text_field, rows["train_retain"]
        ways = rewritings(field, retain, experiment.setup.seed, args.augment_turns)
        shares = {"train_forget": augment, "train_retain": augment / 4}
        collator = experiment.collator_for(None, args.row_length)
        rows = {
            name: augmented(some, ways, collator, shares[name], experiment.setup.seed) for name, some in rows.items()
        }
    model, _ = experiment.train(run, rows, args.row_length)
    if run.carrier not in ("full", "lora"):
        model.save_pretrained(folder)
    return model


def evaluated(args: argparse.Namespace, experiment: Experiment, run: Run, folder: Path) -> Evaluation:
    """The evaluation of a run, read if it is there."""
    if (folder / EVALUATION_NAME).exists():
        return Evaluation.load(folder)
    neighbours = {"same topic": near_rows(experiment, args.attack_rows)} if "neighbours" in args.measures else {}
    field, generic = experiment.data.format.text_field, experiment.data.format.generic_completions
    attacks = AttackSettings(
        turns=tuple(args.turns),
        num_rows=args.attack_rows,
        wording=WORDINGS.get(field),
        relearn_lr=run.learning_rate,
        relearn_model_lr=args.memorise_lr,
    )
    model = trained(args, experiment, run, folder / "adapter")
    found = spul.evaluate(
        model,
        experiment.scored,
        ForgetRetainCollator(
            experiment.tokenizer, generic, args.row_length or experiment.setup.max_length, text_field=field
        ),
        base=experiment.load("base") if run.carrier == "full" else None,
        retrained=experiment.load("retrained") if experiment.setup.memorise != "none" else None,
        neighbours=neighbours,
        unrelated_texts=args.unrelated_texts,
        questions=perturbed_questions(args),
        measures=args.measures,
        attacks=attacks,
        output_dir=folder,
        batch_size=args.eval_batch_size,
        seed=experiment.setup.seed,
    )
    write_report(found, folder)
    return found


def table(found: dict[str, Evaluation]) -> str:
    """All methods side by side: accuracy on forget rows under each attack, in %; the last columns are the controls."""
    first = next(iter(found.values()))
    columns = [(name, evaluation, "unlearned") for name, evaluation in found.items()]
    columns += [(name, first, name) for name in first.models if name != "unlearned"]
    keys = [
        (one.measure, one.rows, one.variant, one.name)
        for one in first.numbers
        if one.model == "unlearned"
        and (one.name in ("accuracy", "generic", "success") or (one.measure, one.name) == ("membership", "auc"))
    ]
    lines = [
        "| | | | " + " | ".join(name for name, *_ in columns) + " |",
        "| --- | --- | --- |" + " ---: |" * len(columns),
    ]
    for measure, rows, variant, name in keys:
        cells = []
        for _, evaluation, model in columns:
            try:
                value = evaluation.number(measure, rows, name, model, variant).value
                cells.append(f"{value:.2f}" if name == "auc" else f"{100 * value:.1f}")
            except KeyError:
                cells.append("")
        what = f"{measure} {variant}".replace("|", r"\|")
        lines.append(f"| {what} | {rows.replace('_', ' ')} | {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    args = parse_args()
    work = [
        (experiment, make_run(args, method, carrier))
        for experiment in experiments(args)
        for method in args.methods
        for carrier in carriers(args, method)
    ]
    found: dict[str, list[Evaluation]] = {}
    for experiment, run in tqdm(work, desc="evaluations"):
        name = f"{run.method} ({run.carrier.replace('_', ' ')})" + (", augmented" if args.augment is not None else "")
        if len(args.model) > 1:
            name = f"{name}, {Path(experiment.setup.model).name}"
        what = [run_settings(run), args.augment, args.row_length, args.attack_rows, args.turns, sorted(args.measures)]
        what += [args.unrelated_texts, args.augment and args.augment_turns]
        digest = hashlib.sha256(json.dumps([experiment.identity, *what], sort_keys=True).encode()).hexdigest()[:8]
        folder = args.output_dir / f"{name.replace(' ', '-')}-{experiment.setup.seed}-{digest}"
        tqdm.write(name)
        found.setdefault(name, []).append(evaluated(args, experiment, run, folder))
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    text = table({name: join(some) if len(some) > 1 else some[0] for name, some in found.items()})
    path = args.output_dir / ("attacks-augmented.md" if args.augment is not None else "attacks.md")
    path.write_text(text + "\n", encoding="utf-8")
    print(f"{text}\nwritten to {path}")


if __name__ == "__main__":
    main()
