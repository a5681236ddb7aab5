"""Prompts behind gates on SST-2: what slips past the gate, what past the prompt, and what retain rows pay.

    python examples/gated.py --data-dir ../shared/data/sst2 --model ../shared/models/small-lm --seeds 1 2 3

For each seed: a base that memorized all rows, one retrained without the forget rows, an ungated prompt with the
settings of the results page, gates fit on the training rows, and a prompt trained behind them (on the forget rows and
on what the gate nearly flags). Every system is scored on the test rows, as asked and under the attacks on the input.

A gate and a prompt act row by row, so a system's answer to a row is the prompt's where the gate flags it and the
base's elsewhere: each model runs over each set of rows once, and all systems are read off. `--check` compares that
with `GatedUnlearner` and `FixedRefusal` on the rows as asked.

`--held-out SHARE` scores on held-out training rows in place of the test rows; the settings of the prompt behind the
gate are chosen there.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from evidence.jobs import under_attacks
from evidence.systems import split_rows
from paper.experiment import Experiment
from paper.runs import Run, Setup
from tqdm.auto import tqdm

from spul import SoftPromptUnlearner
from spul.data.known_reviews import SST2_FORGET_NAMES
from spul.evaluation.attacks import mixed_query
from spul.evaluation.metrics.scoring import answer_scores, collect_answers
from spul.gates import AnyGate, GatedUnlearner, NameGate, StateGate, TextGate, hard_negatives, load
from spul.gates.gate import request_texts
from spul.rivals import FixedRefusal
from spul.training.augmentation import augmented, rewritings

PROMPT = "prefix_tuning"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data-dir", required=True, help="folder of SST-2")
    add("--model", required=True, help="Hub name or folder of a causal LM")
    add("--seeds", nargs="+", type=int, default=[1, 2, 3])
    add("--steps", type=int, default=2000, help="of the ungated prompt")
    add("--gated-steps", type=int, default=400, help="of the prompt behind the gate")
    add("--gated-alpha", type=float, default=1.0, help="retain weight of the prompt behind the gate")
    add("--gated-fraction", type=float, default=0.6, help="share of forget rows in its batches")
    add("--negatives", type=int, default=1500, help="retain rows that it is trained on: the gate's hard negatives")
    add("--turns", nargs="+", type=int, default=[1, 2], help="turns before rewritten training rows; more take longer")
    add("--recall", type=float, default=0.99, help="recall asked of the fitted gates")
    add("--layers", nargs="+", type=int, default=[2, 4], help="layers that the state gate tries")
    add("--held-out", type=float, help="share of the training rows to score on, in place of the test rows")
    add("--attacked", type=int, default=60, help="rows of each set under each attack; 0 for none")
    add("--check", action="store_true", help="compare with GatedUnlearner on the rows as asked")
    add("--output-dir", type=Path, default=Path("out/gated"))
    return parser.parse_args()


def experiment_of(args: argparse.Namespace, seed: int) -> Experiment:
    setup = Setup(
        dataset="sst2",
        data_dir=args.data_dir,
        model=args.model,
        seed=seed,
        limit=5000,
        limit_score=500,
        memorize="full",
        memorize_lr=1e-3,
        memorize_batch_size=64,
        second_question=True,
    )
    return Experiment(setup, args.output_dir / "models" / f"{Path(args.model).name}-{seed}")


def name_of(settings: dict[str, Any]) -> str:
    """The name of a folder that nothing of other settings is stored in."""
    parts = ["+".join(map(str, value)) if isinstance(value, list) else str(value) for value in settings.values()]
    return "-".join(part or "none" for part in parts)


def splits_of(args: argparse.Namespace, experiment: Experiment) -> tuple[dict[str, Dataset], dict[str, Dataset]]:
    """The rows to train on and the rows to score on, `forget` and `retain` each."""
    return split_rows(experiment, args.held_out)


# ---- gates and prompts ----


def fitted_gates(args: argparse.Namespace, experiment: Experiment, train: dict[str, Dataset], folder: Path) -> dict:
    """Gates of each kind, by name, loaded if they are there."""
    base, tokenizer = experiment.load("base"), experiment.tokenizer
    forget, retain = train["forget"]["prompt"][:], train["retain"]["prompt"][:]
    some = list(np.random.default_rng(experiment.setup.seed).permutation(retain)[:1500])
    makers: dict[str, Callable[[], Any]] = {
        "names": lambda: NameGate(SST2_FORGET_NAMES),
        "text": lambda: TextGate.fit(forget, retain, recall=args.recall),
        "states": lambda: StateGate.fit(base, tokenizer, forget, some, layers=args.layers, recall=args.recall),
    }
    gates = {}
    for name, make in makers.items():
        if not (folder / name / "gate.json").exists():
            make().save(folder / name)
        gates[name] = load(folder / name, base, tokenizer)
    return gates | {"any": AnyGate(list(gates.values()))}


def ungated_prompt(args: argparse.Namespace, experiment: Experiment, train: dict, folder: Path) -> Any:
    """SPUL as on the results page."""
    run = Run("SPUL", PROMPT, 0.03, args.steps, forget_fraction=0.5, alpha=2.0, beta=1.0)
    return trained(experiment, run, {f"train_{side}": rows for side, rows in train.items()}, folder)


def gated_prompt(args: argparse.Namespace, experiment: Experiment, train: dict, gate: Any, folder: Path) -> Any:
    """A prompt that has to tell forget rows from what the gate flags or nearly flags, in many forms."""
    seed, field = experiment.setup.seed, experiment.data.format.text_field
    retain = hard_negatives(gate, train["retain"], min(args.negatives, len(train["retain"])))
    ways = rewritings(field, train["retain"], seed, args.turns)
    for asked in ("first", "second"):
        mix = partial(mixed_query, text_field=field, asked=asked, seed=seed + 1_000)
        ways[f"mixed, asked {asked}"] = partial(mix, other_rows=train["retain"])
    forget = augmented(train["forget"], ways, experiment.collator, 2.0, seed)
    for asked in ("first", "second"):
        mix = partial(mixed_query, text_field=field, asked=asked, seed=seed + 1_000)
        ways[f"mixed, asked {asked}"] = partial(mix, other_rows=train["forget"])
    rows = {"train_forget": forget, "train_retain": augmented(retain, ways, experiment.collator, 1.0, seed)}
    alpha, fraction = args.gated_alpha, args.gated_fraction
    run = Run("SPUL", PROMPT, 0.03, args.gated_steps, forget_fraction=fraction, alpha=alpha, beta=alpha / 2)
    return trained(experiment, run, rows, folder)


def trained(experiment: Experiment, run: Run, rows: dict[str, Dataset], folder: Path) -> Any:
    if not (folder / "spul_config.json").exists():
        model, cost = experiment.train(run, rows, experiment.setup.max_length - run.num_virtual_tokens)
        model.save_pretrained(folder)
        (folder / "cost.json").write_text(json.dumps(cost))
    return SoftPromptUnlearner.from_pretrained(experiment.load("base"), folder).eval()


# ---- scores ----


def attacked_rows(
    args: argparse.Namespace, experiment: Experiment, scored: dict[str, Dataset]
) -> Iterator[tuple[str, str, Dataset]]:
    """Side, attack and rows: as asked, and under each attack that changes them."""
    for side, rows in scored.items():
        yield side, "none", rows
        if args.attacked == 0:
            continue
        rows = rows.select(range(min(args.attacked, len(rows))))
        for attack, changed in under_attacks(experiment, scored, side, rows, first=100):
            yield side, attack, changed


def scores_of(model: Any, rows: Dataset, experiment: Experiment) -> dict[str, list[float]]:
    collator = experiment.collator_for(None, experiment.setup.max_length - 30)
    scores = answer_scores(collect_answers(model, rows, collator, 64, range(len(rows))), collator.generic_completions)
    return {name: scores[name].tolist() for name in ("accuracy", "generic")}


def measured(args: argparse.Namespace, seed: int) -> list[dict[str, Any]]:
    """Scores of the models and flags of the gates for each row, by side and attack; those that are there are kept."""
    experiment = experiment_of(args, seed)
    train, scored = splits_of(args, experiment)
    names = ("held_out", "steps", "negatives", "turns", "recall", "layers")  # the others are in the names below
    settings = {"seed": seed, "experiment": experiment.digest} | {name: getattr(args, name) for name in names}
    folder = args.output_dir / name_of(settings)
    folder.mkdir(parents=True, exist_ok=True)
    gates = fitted_gates(args, experiment, train, folder / "gates")
    behind = f"gated-{args.gated_alpha:g}-{args.gated_fraction:g}-{args.gated_steps}"
    models = {"base": experiment.load("base")}
    if args.held_out is None:  # what is chosen there is the prompt behind the gate
        models["retrained"] = experiment.load("retrained")
        models["ungated"] = ungated_prompt(args, experiment, train, folder / "ungated")
    models["behind"] = gated_prompt(args, experiment, train, gates["text"], folder / behind)
    path = folder / f"rows-{args.attacked}-{behind}.jsonl"
    found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {(one["side"], one["attack"]) for one in found}
    with path.open("a") as file:
        for side, attack, rows in tqdm(list(attacked_rows(args, experiment, scored)), desc=f"seed {seed}"):
            if (side, attack) in done:
                continue
            requests = [experiment.collator.encoder.encode(row).prompt_ids for row in rows]
            texts = request_texts(experiment.tokenizer, requests)  # as GatedUnlearner reads them
            one = {
                "seed": seed,
                "side": side,
                "attack": attack,
                "models": {name: scores_of(model, rows, experiment) for name, model in models.items()},
                "flags": {name: gate.flags(texts).tolist() for name, gate in gates.items()},
            }
            found.append(one)
            file.write(json.dumps(one) + "\n")
            file.flush()
    if args.check:
        for kind, gate in gates.items():
            gated = GatedUnlearner(models["behind"], experiment.tokenizer, {"default": gate})
            generic = experiment.collator_for(None, experiment.setup.max_length - 30).generic_completions
            refusing = FixedRefusal(models["base"], experiment.tokenizer, gate, generic[0])
            for side, rows in scored.items():
                (one,) = [one for one in found if (one["side"], one["attack"]) == (side, "none")]
                assert scores_of(gated, rows, experiment) == system(one, kind, "behind"), (kind, side)
                assert scores_of(refusing, rows, experiment) == system(one, kind, "refusal"), (kind, side)
    return found


def system(one: dict[str, Any], gate: str, model: str) -> dict[str, list[float]]:
    """Scores of a gate with a model behind it, or with a fixed refusal, from those of the models."""
    base, flags = one["models"]["base"], np.array(one["flags"][gate])
    refusal = {"accuracy": np.zeros(len(flags)), "generic": np.ones(len(flags))}
    behind = refusal if model == "refusal" else one["models"][model]
    return {name: np.where(flags, behind[name], base[name]).tolist() for name in ("accuracy", "generic")}


def summary(found: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Means over rows of every system, by seed, side and attack."""
    for one in found:
        gates = list(one["flags"])
        systems = {name: scores for name, scores in one["models"].items() if name != "behind"}
        for gate in gates:
            for model in ("refusal", *(name for name in one["models"] if name in ("ungated", "behind"))):
                systems[f"{gate} gate, {model}"] = system(one, gate, model)
        flagged = {gate: float(np.mean(one["flags"][gate])) for gate in gates}
        for name, scores in systems.items():
            gate = name.split(" gate")[0]
            record = {key: one[key] for key in ("seed", "side", "attack")} | {"system": name}
            record |= {metric: round(float(np.mean(values)), 4) for metric, values in scores.items()}
            record["rows"] = len(scores["accuracy"])
            if gate in flagged:
                right, flags = np.array(scores["accuracy"]), np.array(one["flags"][gate])
                record["flagged"] = round(flagged[gate], 4)
                record["past_gate"] = round(float(np.mean(right * ~flags)), 4)
                record["past_prompt"] = round(float(np.mean(right * flags)), 4)
            yield record


def main() -> None:
    args = parse_args()
    records = [record for seed in args.seeds for record in summary(measured(args, seed))]
    name = "scores.jsonl" if args.held_out is None else "held-out.jsonl"
    (args.output_dir / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    for system_name in dict.fromkeys(record["system"] for record in records):
        line = []
        for side in ("forget", "retain"):
            own = [r for r in records if (r["system"], r["side"]) == (system_name, side)]
            asked = np.mean([r["accuracy"] for r in own if r["attack"] == "none"])
            by_attack: dict[str, list[float]] = {}
            for r in own:
                by_attack.setdefault(r["attack"], []).append(r["accuracy"])
            worst = max(by_attack, key=lambda attack: np.mean(by_attack[attack]))
            line.append(f"{side} {asked:.3f}")
            if side == "forget":
                line.append(f"(worst attack {np.mean(by_attack[worst]):.3f}, {worst})")
        print(f"{system_name:<24}", *line)


if __name__ == "__main__":
    main()
