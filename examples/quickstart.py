"""Unlearn some people's film reviews, from a cold start, with nothing downloaded.

    python examples/quickstart.py                                # two to three minutes on 2 CPU cores
    python examples/quickstart.py --seed 1 --output-dir out/one
    python examples/quickstart.py --model NAME --forget forget.jsonl --retain retain.jsonl --generic " unknown"

The first form trains a small language model on made-up reviews (`toy_reviews.py`), then trains a soft prompt on the
frozen model so that it answers *neutral* or *unknown* about some people and as before about all others. The last
form runs the same on a model and rows of your own: JSON lines with `prompt` and `completion`.

It prints one table, and writes the adapter, `metrics.json` and `before_after.png` into the output folder.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from datasets import Dataset
from peft import PeftModel, PrefixTuningConfig
from toy_reviews import GENERIC, build_base, make_splits
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments, set_seed

from spul import (
    ForgetRetainCollator,
    SoftPromptUnlearner,
    UnlearningLoss,
    UnlearningTrainer,
    forget_retain_dataset,
    score_completions,
)
from spul.prompts import DiscriminativeStart

SPLITS = ("train_retain", "train_forget", "test_retain", "test_forget")
ROWS = {
    "base": "before",
    "unlearned": "with the prompt",
    "reloaded": "reloaded with plain PEFT",
    "detached": "prompt detached",
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model of your own, by name or folder, with --forget and --retain")
    parser.add_argument("--forget", type=Path, help="JSON lines of rows to forget: prompt, completion")
    parser.add_argument("--retain", type=Path, help="JSON lines of rows to retain: prompt, completion")
    parser.add_argument("--generic", nargs="+", default=GENERIC, help="generic responses, leading space included")
    parser.add_argument("--num-virtual-tokens", type=int, default=30)
    parser.add_argument("--start", choices=("discriminative", "random"), default="discriminative")
    parser.add_argument("--learning-rate", type=float, help="0.1 on the small model, 1e-2 on one of your own")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--alpha", type=float, default=2.0, help="weight of the retain loss")
    parser.add_argument("--beta", type=float, default=0.5, help="weight of the KL to the frozen model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output-dir", type=Path, default=Path("out/quickstart"))
    args = parser.parse_args()
    if len({args.model is None, args.forget is None, args.retain is None}) > 1:
        parser.error("--model, --forget and --retain go together: give all three, or none for the made-up reviews.")
    return args


def own_splits(args: argparse.Namespace) -> dict[str, Dataset]:
    """The user's rows: 70 % of each file for training, the rest for testing."""
    splits = {}
    for name, path in (("forget", args.forget), ("retain", args.retain)):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        if len(rows) < 4:
            raise SystemExit(f"{path} has {len(rows)} rows; at least 4 are needed to train and to test on.")
        halves = Dataset.from_list(rows).train_test_split(test_size=0.3, seed=args.seed)
        splits[f"train_{name}"], splits[f"test_{name}"] = halves["train"], halves["test"]
    return splits


def table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """A text table of accuracy in %, with the share of generic answers in brackets."""
    lines = [f"{'accuracy % (generic %)':28}" + "".join(f"{name.replace('_', ' '):>18}" for name in SPLITS)]
    for key, title in ROWS.items():
        cells = [f"{100 * results[key][s]['accuracy']:.1f} ({100 * results[key][s]['generic']:.1f})" for s in SPLITS]
        lines.append(f"{title:28}" + "".join(f"{cell:>18}" for cell in cells))
    return "\n".join(lines)


def draw(results: dict[str, dict[str, dict[str, float]]], path: Path) -> None:
    """Draw forget and retain accuracy on the test rows, before and after."""
    figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
    keys = ("base", "unlearned", "detached")
    for i, (split, color) in enumerate((("test_retain", "#3b6fb6"), ("test_forget", "#c8553d"))):
        heights = [100 * results[key][split]["accuracy"] for key in keys]
        bars = axes.bar([x + 0.38 * i for x in range(len(keys))], heights, 0.36, label=split[5:], color=color)
        axes.bar_label(bars, fmt="%.0f", padding=2)
    axes.set_xticks([x + 0.19 for x in range(len(keys))], [ROWS[key] for key in keys])
    axes.set_ylabel("accuracy on test rows, %")
    axes.set_ylim(0, 128)  # room for the legend
    axes.set_yticks(range(0, 101, 20))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper center", ncols=2, frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    args = parse_args()
    set_seed(args.seed)
    out = args.output_dir
    out.mkdir(parents=True, exist_ok=True)

    # 1. A frozen causal LM, its tokenizer, and the rows: forget and retain rows, for training and for testing.
    if args.model is None:
        base_dir, splits = build_base(out / "base", seed=args.seed), make_splits(args.seed)
    else:
        base_dir, splits = args.model, own_splits(args)
    learning_rate = args.learning_rate or (0.1 if args.model is None else 1e-2)
    model = AutoModelForCausalLM.from_pretrained(base_dir)
    tokenizer = AutoTokenizer.from_pretrained(base_dir)
    dataset = forget_retain_dataset(forget=splits["train_forget"], retain=splits["train_retain"])
    collator = ForgetRetainCollator(tokenizer, args.generic, max_length=args.max_length, seed=args.seed)

    def score(scored, name: str) -> dict[str, dict[str, float]]:
        return {s: score_completions(scored, splits[s], collator, 128, progress=f"{name}: {s}") for s in SPLITS}

    results = {"base": score(model, "base")}

    # 2. Train the prompt. Prefix tuning (keys and values in every layer) is by far the strongest type on small models,
    # and can begin with keys that tell the forget rows from the others. PromptTuningConfig and PromptEncoderConfig
    # take no such start.
    unlearner = SoftPromptUnlearner(
        model,
        PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=args.num_virtual_tokens),
        loss=UnlearningLoss(alpha=args.alpha, beta=args.beta),
        start=DiscriminativeStart(dataset, collator) if args.start == "discriminative" else args.start,
    )
    unlearner.print_trainable_parameters()
    training = TrainingArguments(
        str(out / "checkpoints"),
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        logging_steps=max(1, args.steps // 6),
        save_strategy="no",
        report_to="none",
        seed=args.seed,
    )
    trainer = UnlearningTrainer(
        unlearner, training, collator, dataset, processing_class=tokenizer, forget_fraction=0.5
    )
    trainer.train()

    # 3. Score the model with the prompt and without it; save the prompt with its scores.
    results["unlearned"] = score(unlearner, "unlearned")
    with unlearner.disable_adapter():
        results["detached"] = score(unlearner, "detached")
    unlearner.spul_config.metrics = results["unlearned"]
    unlearner.save_pretrained(str(out / "adapter"))

    # 4. Load the prompt with plain PEFT.
    reloaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_dir), str(out / "adapter"))
    results["reloaded"] = score(reloaded, "reloaded")

    results = {key: results[key] for key in ROWS}
    (out / "metrics.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    draw(results, out / "before_after.png")
    print("\n" + table(results))
    print(f"\nDetached, the model knows what it knew: the prompt hides knowledge, it does not delete it.\nIn {out}/:")
    print("  adapter/ (the prompt, to load or share), base/, metrics.json, before_after.png")


if __name__ == "__main__":
    main()
