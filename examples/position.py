"""A prompt at the start of every row and one just before the text, on SST-2, with much or little before the question.

    python examples/position.py --data-dir ../shared/data/sst2 --model ../shared/models/small-lm --seeds 1 2 3

For each seed, a base that memorized all rows is put under a prompt at each position, trained alike. Each is scored on
the test rows as asked, behind other questions with their answers (`--turns`), and with texts before, after and around
the question; so is the base without a prompt. A record for each is written to `scores.jsonl`; what is there already is
not measured again.

`--held-out SHARE` scores on held-out training rows in place of the test rows, into `held-out.jsonl`; choose settings
there. `--train-turns` puts turns before a part of the training rows as well, at both positions.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from gated import experiment_of, name_of, splits_of
from paper.experiment import Experiment
from paper.runs import prompt_config
from tqdm.auto import tqdm
from transformers import set_seed

from spul import ForgetRetainCollator, SoftPromptUnlearner, UnlearningLoss, UnlearningTrainer
from spul.data.dataset import forget_retain_dataset
from spul.evaluation.attacks import JAILBREAKS, diluted, in_document, with_prefix, with_suffix
from spul.evaluation.attacks.changes import tokens_lost
from spul.evaluation.metrics import score_completions
from spul.training.augmentation import augmented

POSITIONS = ("start", "message")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data-dir", required=True, help="folder of SST-2")
    add("--model", required=True, help="Hub name or folder of a causal LM")
    add("--seeds", nargs="+", type=int, default=[1, 2, 3])
    add("--positions", nargs="+", choices=POSITIONS, default=list(POSITIONS))
    add("--prompt", choices=("prompt_tuning", "p_tuning"), default="prompt_tuning", help="prefixes stand at the start")
    add("--num-virtual-tokens", type=int, default=30)
    add("--steps", type=int, default=600)
    add("--learning-rate", type=float, default=0.03)
    add("--alpha", type=float, default=2.0, help="retain weight")
    add("--beta", type=float, default=1.0, help="weight of the KL term")
    add("--forget-fraction", type=float, default=0.5, help="share of forget rows in a batch")
    add("--train-turns", nargs="*", type=int, default=[], help="turns before rewritten training rows; none by default")
    add("--turns", nargs="+", type=int, default=[1, 4, 16], help="turns before the scored rows")
    add("--rows", type=int, default=60, help="scored rows of each set with something before or after; all as asked")
    add("--held-out", type=float, help="share of the training rows to score on, in place of the test rows")
    add("--models-dir", type=Path, help="folder with the memorized models, in models/; the output folder unless given")
    add("--output-dir", type=Path, default=Path("out/position"))
    return parser.parse_args()


def settings_of(args: argparse.Namespace, experiment: Experiment, seed: int, position: str) -> dict[str, Any]:
    """The settings by which a trained prompt is found."""
    names = ("prompt", "num_virtual_tokens", "steps", "learning_rate", "alpha", "beta", "forget_fraction")
    names = (*names, "train_turns", "held_out")
    found = {"seed": seed, "experiment": experiment.digest, "position": position}
    return found | {name: getattr(args, name) for name in names}


def collator_of(args: argparse.Namespace, experiment: Experiment, position: str) -> ForgetRetainCollator:
    """The collator of a position: that of the experiment, and where the text begins."""
    task = experiment.data.format
    return ForgetRetainCollator(
        experiment.tokenizer,
        list(task.generic_completions),
        max_length=experiment.setup.max_length - args.num_virtual_tokens,
        seed=experiment.setup.seed,
        text_field=task.text_field,
        prompt_position=position,
    )


def trained(
    args: argparse.Namespace, experiment: Experiment, train: dict[str, Dataset], settings: dict[str, Any]
) -> SoftPromptUnlearner:
    """A prompt at a position, trained unless it is there."""
    folder, position = args.output_dir / "prompts" / name_of(settings), settings["position"]
    if not (folder / "spul_config.json").exists():
        rows, collator = train, collator_of(args, experiment, position)
        if args.train_turns:
            ways = {
                f"{num} turns": partial(diluted, filler_rows=train["retain"], num_turns=num, seed=settings["seed"] + 1)
                for num in args.train_turns
            }
            shares = {"forget": 1.0, "retain": 0.5}
            rows = {side: augmented(some, ways, collator, shares[side]) for side, some in train.items()}
        set_seed(settings["seed"])
        config = prompt_config(args.prompt, args.num_virtual_tokens)
        loss = UnlearningLoss(alpha=args.alpha, beta=args.beta)
        model = SoftPromptUnlearner(experiment.load("base"), config, loss, prompt_position=position)
        arguments = experiment.training_arguments(
            learning_rate=args.learning_rate,
            max_steps=args.steps,
            per_device_train_batch_size=32,
            weight_decay=1e-3,
            max_grad_norm=0.3,
        )
        dataset = forget_retain_dataset(rows["forget"], rows["retain"])
        trainer = UnlearningTrainer(model, arguments, collator, dataset, forget_fraction=args.forget_fraction)
        trainer.train()
        model.save_pretrained(str(folder))
        cost = {"seconds": trainer.state.log_history[-1]["train_runtime"], "log": trainer.state.log_history}
        (folder / "training.json").write_text(json.dumps(settings | cost))
    return SoftPromptUnlearner.from_pretrained(experiment.load("base"), folder).eval()


def asked_rows(
    args: argparse.Namespace, experiment: Experiment, scored: dict[str, Dataset]
) -> Iterator[tuple[str, str, Dataset]]:
    """Side, what stands around the question, and rows."""
    seed, field = experiment.setup.seed, experiment.data.format.text_field
    for side, rows in scored.items():
        yield side, "as asked", rows
        rows = rows.select(range(min(args.rows, len(rows))))
        filler = scored["retain"].select(range(min(args.rows, len(scored["retain"]) // 2), len(scored["retain"])))
        for num in args.turns:
            yield side, f"{num} turns before", diluted(rows, filler, num, seed)
        yield side, "a text before", with_prefix(rows, JAILBREAKS[0])
        yield side, "all texts before", with_prefix(rows, "\n".join(JAILBREAKS))
        yield side, "a text after", with_suffix(rows, JAILBREAKS[0], field)
        yield side, "in a document of 300 words", in_document(rows, 300, field, seed=seed)


def measured(args: argparse.Namespace, seed: int, path: Path) -> list[dict[str, Any]]:
    """The records of a seed: those in the file, and new ones, which are added to it."""
    own = argparse.Namespace(**{**vars(args), "output_dir": args.models_dir or args.output_dir})
    experiment = experiment_of(own, seed)
    train, scored = splits_of(args, experiment)
    sets = list(asked_rows(args, experiment, scored))
    known = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    found: list[dict[str, Any]] = []
    for position in ("none", *args.positions):
        settings = settings_of(args, experiment, seed, position)
        if position == "none":  # the base does not depend on a prompt's settings
            settings = {name: settings[name] for name in ("seed", "experiment", "position", "held_out")}
        model = None
        for side, around, rows in tqdm(sets, desc=f"seed {seed}, {position}"):
            key = settings | {"side": side, "around": around, "rows": len(rows)}
            record = next((one for one in known if {name: one.get(name) for name in key} == key), None)
            if record is None:
                if model is None:
                    is_base = position == "none"
                    model = experiment.load("base") if is_base else trained(args, experiment, train, settings)
                collator = collator_of(args, experiment, "start" if position == "none" else position)
                scores = score_completions(model, rows, collator, experiment.batch_size)
                record = key | scores | {"tokens_lost": tokens_lost(rows, collator.encoder)}
                with path.open("a") as file:
                    file.write(json.dumps(record) + "\n")
            found.append(record)
    return found


def main() -> None:
    args = parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    path = args.output_dir / ("scores.jsonl" if args.held_out is None else "held-out.jsonl")
    records = [record for seed in args.seeds for record in measured(args, seed, path)]
    positions = list(dict.fromkeys(record["position"] for record in records))
    print(f"{'accuracy (generic answers)':<36}" + "".join(f"{position:>18}" for position in positions))
    for side, around in dict.fromkeys((record["side"], record["around"]) for record in records):
        line = f"{side + ', ' + around:<36}"
        for position in positions:
            own = [r for r in records if (r["side"], r["around"], r["position"]) == (side, around, position)]
            accuracy, generic = (np.mean([record[name] for record in own]) for name in ("accuracy", "generic"))
            line += f"{f'{accuracy:.3f} ({generic:.3f})':>18}"
        print(line)


if __name__ == "__main__":
    main()
