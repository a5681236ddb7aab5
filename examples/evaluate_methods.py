"""Train methods on one experiment and evaluate each with every measure and attack.

    python examples/evaluate_methods.py --methods SPUL GA+GD EUL --prompt-types prefix_tuning --steps 600 \\
        --lr prefix_tuning=0.1 --forget-fraction 0.5 --row-length 98          # the quick start's model
    python examples/evaluate_methods.py --methods SPUL --augment 2 ...        # trained on rewritten rows as well

The options are those of `reproduce.py` and some more. Each method is compared with the model before unlearning and
with one retrained without the forget rows. For each method and seed there is a folder with `evaluation.json`,
`measurements.jsonl`, a report and figures; `attacks.md` has all of them side by side. An interrupted run resumes where
it stopped. The controls of a seed, the model before unlearning and the retrained one, are measured once.

`--augment N` adds N rewritings of each forget row to the training rows: other letter case, spaces, asides and turns
before (`spul.training.augmentation`). The evaluated attacks have other texts, shares and random draws.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from evaluation_rows import add_options, attack_settings, further_rows, identity
from paper.experiment import Experiment
from paper.options import make_parser, parsed
from paper.runs import Run, run_settings
from reproduce import experiments, make_run, trainables
from tqdm.auto import tqdm

import spul
from spul import ForgetRetainCollator, SoftPromptUnlearner, UnlearningLayers
from spul.evaluation import Measurement
from spul.evaluation.measures import variant_in_words
from spul.evaluation.report import write_report
from spul.evaluation.results import (
    EVALUATION_NAME,
    MEASUREMENTS_NAME,
    Evaluation,
    join,
    read_measurements,
    write_measurements,
)
from spul.evaluation.resuming import SETTINGS_NAME
from spul.models.causal_lm import bare_model
from spul.records.digests import digest, digest_of_rows, fingerprint
from spul.training.augmentation import augmented, rewritings

CONTROLS_NAME = "controls.json"
SHOWN = ("accuracy", "generic", "success", "probability", "rouge_l_recall")  # in the table


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__.split("\n")[0])
    add = parser.add_argument
    add("--augment", type=float, help="rewritten training rows for each forget row; retain rows get a quarter of that")
    add("--augment-turns", nargs="+", type=int, default=[1, 2, 3, 5, 8], help="of the rewritten rows, as --turns")
    add("--row-length", type=int, help="tokens of a row in unlearning and scoring; --max-length unless given")
    add_options(parser)
    parser.set_defaults(output_dir=Path("out/evaluations"))
    return parsed(parser)


def trained(args: argparse.Namespace, experiment: Experiment, run: Run, folder: Path) -> Any:
    """The model of a run; a prompt or layers are stored in the folder, and loaded if they are there."""
    trainable: Any = UnlearningLayers if run.trainable == "layers" else SoftPromptUnlearner
    if (folder / "spul_config.json").exists():
        return trainable.from_pretrained(experiment.load("base"), folder, is_trainable=True)
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
    if run.trainable not in ("full", "lora"):
        model.save_pretrained(folder)
    return model


def evaluated(args: argparse.Namespace, experiment: Experiment, run: Run, folder: Path) -> Evaluation:
    """The evaluation of a run, loaded if it is stored, and its report, written if it is missing."""
    if (folder / EVALUATION_NAME).exists():
        found = Evaluation.load(folder)
    else:
        task = experiment.data.format
        found = evaluated_once(
            folder,
            args.measures,
            trained(args, experiment, run, folder / "adapter"),
            experiment.scored,
            experiment.collator_for(None, args.row_length),
            base=experiment.load("base") if run.trainable == "full" else None,
            retrained=experiment.load("retrained") if experiment.setup.memorize != "none" else None,
            **further_rows(args, experiment),
            attacks=attack_settings(args, task, relearn_lr=run.learning_rate, relearn_model_lr=args.memorize_lr),
            batch_size=args.eval_batch_size,
            max_new_tokens=args.max_new_tokens,
            free_form=args.free_form,
            seed=experiment.setup.seed,
        )
    if not (folder / "report.html").exists():  # written last
        write_report(found, folder)
    return found


def evaluated_once(
    folder: Path,
    measures: Sequence[str],
    model: Any,
    splits: Mapping[str, Dataset],
    collator: ForgetRetainCollator,
    **options: Any,
) -> Evaluation:
    """Evaluate a model, with measurements of the controls (the detached and the retrained model) reused if possible.

    They are taken from an evaluation of another method in a folder beside it, with equal controls, rows and settings.
    """
    settings = spul.evaluate(model, splits, collator, measures=(), progress=False, **options).settings
    sets = {**splits, "unseen": options.get("unseen"), "unrelated_texts": options.get("unrelated_texts")}
    sets |= {**(options.get("neighbors") or {}), **(options.get("questions") or {})}
    settings["digests"] = {
        name: digest_of_rows(rows, getattr(rows, "column_names", ()))
        for name, rows in sets.items()
        if rows is not None
    }
    base = options.get("base")
    detached = fingerprint(bare_model(model) if base is None else base)
    if not (folder / SETTINGS_NAME).exists():  # nothing was measured yet
        reuse_controls(folder, settings, detached)
    return spul.evaluate(model, splits, collator, measures=measures, output_dir=folder, **options)


def reuse_controls(folder: Path, settings: dict[str, Any], detached: str | None) -> None:
    """Copy the measurements of the same controls from a finished evaluation beside the folder.

    Args:
        folder: of an evaluation that has not begun.
        settings: of that evaluation, with digests of its rows.
        detached: the fingerprint of the model before unlearning.
    """
    # Neither the unlearned model nor the list of measures affects the controls.
    own = ("model", "base", "relearn_lr")
    others = {
        name: {key: one for key, one in value.items() if key not in own} if isinstance(value, dict) else value
        for name, value in settings.items()
        if name != "measures"
    }
    mine = json.loads(json.dumps({"detached": detached, **others}))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONTROLS_NAME).write_text(json.dumps(mine, indent=1) + "\n", encoding="utf-8")
    found: list[Measurement] = []
    weights = [one["weights"] for one in mine["models"].values()]
    if None not in (detached, *weights):  # otherwise some weights are not in memory
        for path in sorted(folder.parent.glob(f"*/{CONTROLS_NAME}")):
            other = path.parent
            if (other / EVALUATION_NAME).exists() and json.loads(path.read_text(encoding="utf-8")) == mine:
                found = [one for one in read_measurements(other / MEASUREMENTS_NAME) if one.model != "unlearned"]
                tqdm.write(f"{len(found)} measurements of the controls are those of {other}")
                break
    write_measurements(folder / MEASUREMENTS_NAME, found)


def table(found: dict[str, Evaluation]) -> str:
    """A Markdown table of all methods: scores under each attack in %; the last columns are the controls."""
    first = next(iter(found.values()))
    columns = [(name, evaluation, "unlearned") for name, evaluation in found.items()]
    columns += [(name, first, name) for name in first.models if name != "unlearned"]
    shown = [
        one
        for one in first.metrics
        if one.model == "unlearned" and (one.name in SHOWN or (one.measure, one.name) == ("membership", "auc"))
    ]
    lines = [
        "| | | | " + " | ".join(name for name, *_ in columns) + " |",
        "| --- | --- | --- |" + " ---: |" * len(columns),
    ]
    for one in shown:
        cells = []
        for _, evaluation, model in columns:
            try:
                value = evaluation.metric(one.measure, one.rows, one.name, model, one.attack, one.level).value
                cells.append(f"{value:.2f}" if one.name == "auc" else f"{100 * value:.1f}")
            except KeyError:
                cells.append("")
        what = f"{one.measure} {variant_in_words(one)}".replace("|", r"\|")
        lines.append(f"| {what} | {one.rows.replace('_', ' ')} | {one.name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    args = parse_args()
    work = [
        (experiment, make_run(args, method, trainable))
        for experiment in experiments(args)
        for method in args.methods
        for trainable in trainables(args, method)
    ]
    found: dict[str, list[Evaluation]] = {}
    for experiment, run in tqdm(work, desc="evaluations"):
        name = f"{run.method} ({run.trainable.replace('_', ' ')})" + (
            ", augmented" if args.augment is not None else ""
        )
        if len(args.model) > 1:
            name = f"{name}, {Path(experiment.setup.model).name}"
        what = [run_settings(run), args.augment, args.augment and args.augment_turns, args.row_length, *identity(args)]
        key = digest([experiment.identity, *what])[:8]
        folder = args.output_dir / f"{name.replace(' ', '-')}-{experiment.setup.seed}-{key}"
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
