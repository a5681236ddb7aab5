"""Forget the film reviews that name certain people: the SPUL paper's experiment on SST-2, with any causal LM.

A model first learns to classify all reviews, then a soft prompt makes it answer *neutral* or *unknown* where a review
names one of the people in `--entities`, and leaves the other reviews alone. Only the prompt is trained for that.

The paper's data from the Hub, P-tuning, the published schedule (a GPU):

    python examples/sst2.py --model facebook/opt-1.3b --memorise lora --prompt-types p_tuning --output-dir out/opt

Local files (`train.tsv` and `dev.tsv` of GLUE's SST-2) and a small local model, three kinds of prompt side by side:

    python examples/sst2.py --model ../shared/models/small-lm --data-dir ../shared/data/sst2 --second-question \\
        --limit-retain 8000 --limit-eval 1000 --memorise-batch-size 64 --memorise-lr 1e-3 --steps 500 \\
        --forget-fraction 0.5 --prompt-lr p_tuning=0.003 --output-dir out/sst2

Another prompt later, beside those that are there, without memorising again: the same command with
`--base out/sst2/base --prompt-types prefix_tuning`.

Written to `--output-dir`: `metrics.json`, `results.md`, `figure.png`, the prompts (`adapters/`) and the memorised
model (`base/`).
"""

from __future__ import annotations

import argparse
import json
import random
import re
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig, PeftConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from spul import (
    ForgetRetainCollator,
    SoftPromptUnlearner,
    UnlearningLoss,
    UnlearningTrainer,
    forget_retain_dataset,
    score_completions,
)
from spul.losses import token_nll
from spul.prefix import logits_at, response_positions

HUB_DATASET = "karuna-bhaila/Unlearning_SST2"
SPLITS = ("train_retain", "train_forget", "test_retain", "test_forget")
GENERIC = [" neutral", " unknown"]
NOBODY = " unknown"
PROMPT = "### Text: {text}\n### Question: positive or negative?\n### Sentiment:"
SECOND_PROMPT = "### Text: {text}\n### Question: which person?\n### Person:"

# Whole words of the lower-cased texts: 1,219 of the 67,850 different sentences name one of these ...
FORGET_ENTITIES = (
    "spielberg, sandler, chan, murphy, washington, bond, soderbergh, seagal, williams, scorsese, wilde, shyamalan, "
    "polanski, kissinger, woody allen, de niro, bullock, herzog, sarandon, broomfield, hopkins, witherspoon, chabrol, "
    "godard, madonna, kidman, fiennes, schwarzenegger, nicholson, clooney"
)
# ... and 938 name one of these; 77 of them also name one of those above, and are forgotten.
RETAIN_ENTITIES = (
    "jackson, hoffman, lawrence, benigni, moore, eastwood, lopez, solondz, dickens, willis, britney, freeman, rohmer, "
    "kaufman, kahlo, huppert, duvall, tarantino, judd, caine, bruckheimer, shakespeare, auteuil, affleck, hewitt, "
    "hartley, gibson, hitchcock, costner, binoche, assayas, mcdormand, jolie, carpenter, pryor, tsai, diesel, kapur, "
    "cage"
)

# P-tuning's is the published one; the others were found on a small model.
PROMPT_LRS = {"prompt_tuning": 0.05, "p_tuning": 1e-4, "prefix_tuning": 0.03}

# Accuracy in %, in the order of SPLITS (arXiv 2406.12038).
PUBLISHED = {
    "LLaMA-2-7B, base": (99.89, 99.72, 95.57, 96.07),
    "LLaMA-2-7B, GA": (55.66, 53.93, 55.96, 56.89),
    "LLaMA-2-7B, RL": (33.31, 13.82, 31.00, 14.26),
    "LLaMA-2-7B, GA+KL": (55.64, 53.96, 55.94, 56.89),
    "LLaMA-2-7B, GA+GD": (97.17, 13.75, 94.43, 11.31),
    "LLaMA-2-7B, SPUL": (99.15, 12.98, 94.93, 16.07),
    "OPT-1.3B, SPUL": (94.87, 16.84, 91.65, 17.87),
    "LLaMA-2-13B, SPUL": (98.87, 5.97, 95.50, 7.38),
}

# ---- data ----


def names_pattern(names: list[str]) -> re.Pattern[str]:
    """Matches any of the names as whole words of a lower-case text."""
    longest_first = sorted(names, key=len, reverse=True)
    return re.compile(r"(?<!\w)(?:" + "|".join(map(re.escape, longest_first)) + r")(?!\w)")


def read_tsv(folder: Path) -> list[dict[str, str]]:
    """The different sentences of GLUE's train.tsv and dev.tsv; the first label where they disagree."""
    rows: dict[str, dict[str, str]] = {}
    for name in ("train.tsv", "dev.tsv"):
        lines = (folder / name).read_text(encoding="utf-8").splitlines()
        if lines[0].split("\t") != ["sentence", "label"]:
            raise ValueError(f"{folder / name} begins with {lines[0]!r}; expected the columns sentence and label.")
        for line in lines[1:]:
            text, label = line.split("\t")
            rows.setdefault(
                text.strip(), {"text": text.strip(), "label": " positive" if label == "1" else " negative"}
            )
    return list(rows.values())


def check_entities(entities: list[str], texts: list[str], option: str) -> None:
    """Raise if a list of names matches nothing, and say which of them do not."""
    unmatched = [name for name in entities if not any(map(names_pattern([name]).search, texts))]
    if len(unmatched) == len(entities):
        raise ValueError(
            f"{option}: none of {', '.join(map(repr, entities))} is in any of the {len(texts):,} reviews. Names are "
            "compared as whole, lower-case words; see data set and spelling."
        )
    if unmatched:
        print(f"{option}: not in the data, and left out: {', '.join(unmatched)}")


def load_splits(args: argparse.Namespace) -> dict[str, list[dict[str, str]]]:
    """The four splits, as rows of `text` and `label`."""
    if args.data_dir is None:
        splits, seen = {}, set()
        # Forget rows first: a sentence that is in both sets is forgotten.
        for name in ("train_forget", "test_forget", "train_retain", "test_retain"):
            rows = []
            for row in load_dataset(HUB_DATASET, split=name):
                text = row["text"].strip()
                if text not in seen:
                    seen.add(text)
                    rows.append({"text": text, "label": " " + row["label_text"].strip().lower()})
            splits[name] = rows
        return splits
    rows = read_tsv(args.data_dir)
    check_entities(args.entities, [row["text"].lower() for row in rows], "--entities")
    pattern = names_pattern(args.entities)
    splits = {}
    for group in ("forget", "retain"):
        some = [row for row in rows if bool(pattern.search(row["text"].lower())) == (group == "forget")]
        random.Random(args.seed).shuffle(some)
        cut = round(0.7 * len(some))
        splits[f"train_{group}"], splits[f"test_{group}"] = some[:cut], some[cut:]
    return splits


def limit_retain(splits: dict[str, list[dict[str, str]]], args: argparse.Namespace) -> None:
    """Shorten the retain set; with `--second-question`, its reviews that name `--retain-entities` stay."""
    if args.limit_retain is not None:
        rows = splits["train_retain"]
        if args.second_question:
            pattern = names_pattern(args.retain_entities)
            rows = sorted(rows, key=lambda row: pattern.search(row["text"].lower()) is None)  # stable: shuffled still
        splits["train_retain"] = rows[: args.limit_retain]


def to_dataset(rows: list[dict[str, str]]) -> Dataset:
    """Rows in prompt-completion form, with the text beside it: it is what is cut where a prompt is too long."""
    return Dataset.from_list(
        [{"text": r["text"], "prompt": PROMPT.format(**r), "completion": r["label"]} for r in rows]
    )


def second_questions(rows: list[dict[str, str]], args: argparse.Namespace) -> Dataset:
    """*Which person is named?* for a third as many rows as there are (a quarter of what is then memorised).

    Every review that names somebody, of the forget set or of the retain set, filled up with reviews that name nobody
    on either list.
    """
    check_entities(args.retain_entities, [row["text"].lower() for row in rows], "--retain-entities")
    pattern = names_pattern([*args.entities, *args.retain_entities])
    found = [(row["text"], pattern.search(row["text"].lower())) for row in rows]
    named = [(text, " " + match.group()) for text, match in found if match]
    nobody = [(text, NOBODY) for text, match in found if not match]
    rng, wanted = random.Random(args.seed), len(rows) // 3
    named = rng.sample(named, min(len(named), wanted))
    picked = named + rng.sample(nobody, min(len(nobody), wanted - len(named)))
    forgotten = set(args.entities)
    num_forget = sum(answer.strip() in forgotten for _, answer in named)
    print(
        f"second question: {len(picked):,} rows: {num_forget:,} name a person to be forgotten, "
        f"{len(named) - num_forget:,} another person, {len(picked) - len(named):,} nobody"
    )
    return Dataset.from_list(
        [{"text": t, "prompt": SECOND_PROMPT.format(text=t), "completion": answer} for t, answer in picked]
    )


# ---- training ----


def training_arguments(args: argparse.Namespace, **kwargs: Any) -> TrainingArguments:
    """What the two trainings have in common; nothing is written but by this script."""
    return TrainingArguments(
        str(args.output_dir),
        seed=args.seed,
        bf16=args.bf16,
        use_cpu=not torch.cuda.is_available(),
        save_strategy="no",
        report_to="none",
        lr_scheduler_type="cosine",
        warmup_steps=0.1,  # below 1: a share of all steps
        remove_unused_columns=False,
        logging_steps=50,
        **kwargs,
    )


class CompletionTrainer(Trainer):
    """Trains on the completions, and computes logits nowhere else."""

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        positions, targets = response_positions(inputs.pop("labels"))
        losses = token_nll(logits_at(model, positions, **inputs), targets)
        return losses.sum() / (targets.ne(-100).sum() if num_items_in_batch is None else num_items_in_batch)


def memorise(
    model: PreTrainedModel, rows: Dataset, collator: ForgetRetainCollator, args: argparse.Namespace
) -> tuple[PreTrainedModel, dict[str, float]]:
    """Fine-tune the whole model, or LoRA merged into it afterwards, on the completions of all rows."""
    learner = model
    if args.memorise == "lora":
        config = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
        learner = get_peft_model(model, config)
    trainer = CompletionTrainer(
        learner,
        training_arguments(
            args,
            learning_rate=args.memorise_lr,
            num_train_epochs=args.memorise_epochs,
            per_device_train_batch_size=args.memorise_batch_size,
            train_sampling_strategy="group_by_length",  # reads the column `length`
        ),
        train_dataset=rows.add_column("length", [len(prompt) for prompt in rows["prompt"]]),
        data_collator=collator.true_batch,
    )
    result = trainer.train()
    model = learner.merge_and_unload() if args.memorise == "lora" else model
    return model, {"steps": result.global_step, "seconds": round(result.metrics["train_runtime"], 1)}


def prompt_config(prompt_type: str, num_virtual_tokens: int) -> PeftConfig:
    """PEFT's config of a prompt type; P-tuning with the paper's encoder of width 128."""
    if prompt_type == "p_tuning":
        return PromptEncoderConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=num_virtual_tokens, encoder_hidden_size=128
        )
    if prompt_type == "prefix_tuning":
        return PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=num_virtual_tokens)
    return PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=num_virtual_tokens, prompt_tuning_init="SAMPLE_VOCAB"
    )


def unlearn(
    model: PreTrainedModel, rows: Dataset, collator: ForgetRetainCollator, prompt_type: str, args: argparse.Namespace
) -> tuple[SoftPromptUnlearner, dict[str, Any]]:
    """Train one prompt on the frozen model."""
    set_seed(args.seed)
    unlearner = SoftPromptUnlearner(
        model,
        prompt_config(prompt_type, args.num_virtual_tokens),
        loss=UnlearningLoss(alpha=args.alpha, beta=args.beta),
    )
    num_parameters = sum(p.numel() for p in unlearner.parameters() if p.requires_grad)
    trainer = UnlearningTrainer(
        unlearner,
        training_arguments(
            args,
            learning_rate=args.prompt_lr[prompt_type],
            num_train_epochs=args.epochs,
            max_steps=args.steps or -1,
            per_device_train_batch_size=args.batch_size,
            weight_decay=1e-3,
            max_grad_norm=args.max_grad_norm,
        ),
        train_dataset=rows,
        data_collator=collator,
        forget_fraction=args.forget_fraction,
    )
    result = trainer.train()
    facts = {
        "learning_rate": args.prompt_lr[prompt_type],
        "parameters": num_parameters,
        "steps": result.global_step,
        "seconds": round(result.metrics["train_runtime"], 1),
    }
    return unlearner, facts


# ---- results ----


def evaluate(
    name: str, model: torch.nn.Module, splits: dict[str, Dataset], collator: ForgetRetainCollator, batch_size: int
) -> dict[str, dict[str, float]]:
    """Accuracy, F1 and share of generic answers on every split, printed as they come."""
    scores = {}
    for split, rows in splits.items():
        found = score_completions(model, rows, collator, batch_size, progress=f"{name}, {split}")
        scores[split] = {key: found[key] for key in ("accuracy", "f1", "generic")}
        print(f"{name:28} {split:13} " + "  ".join(f"{key} {100 * v:6.2f}" for key, v in scores[split].items()))
    return scores


def merged(new: dict[str, Any], path: Path) -> dict[str, Any]:
    """New results, with those of other prompts that an earlier run on the same base and data left in the folder."""
    if not path.exists():
        return new
    old = json.loads(path.read_text(encoding="utf-8"))
    if any(old[key] != new[key] for key in ("seed", "rows", "rows_scored", "memorise")):
        return new
    for key in ("training", "results"):
        new[key] = {**old[key], **new[key]}
    # The base, the prompts, then what is left when they are taken away.
    order = sorted(new["results"], key=lambda name: (name != "base", "detached" in name))
    return {**new, "results": {name: new["results"][name] for name in order}}


def markdown(metrics: dict[str, Any]) -> str:
    """The tables: accuracy beside the published rows, then F1 and the share of generic answers."""
    head = "| " + " | ".join(["", *(split.replace("_", " ") for split in SPLITS)]) + " |\n|---" + "|---:" * 4 + "|"
    sizes = ", ".join(f"{split.replace('_', ' ')} {n:,}" for split, n in metrics["rows"].items())
    scored = ", ".join(f"{split.replace('_', ' ')} {n:,}" for split, n in metrics["rows_scored"].items())
    caption = f"Accuracy in %; rows: {sizes}; scored: {scored}; seed {metrics['seed']}."
    if metrics["second_question"]:
        caption += (
            " The base also learned a second question (*which person is named?*, *unknown* if none), in a quarter of "
            "the rows it memorised, over people of the forget set and of the retain set."
        )
    parts = [caption]
    for measure in ("accuracy", "f1", "generic"):
        lines = [head]
        for name, row in metrics["results"].items():
            lines.append(f"| {name} | " + " | ".join(f"{100 * row[split][measure]:.2f}" for split in SPLITS) + " |")
        if measure == "accuracy":
            for name, values in PUBLISHED.items():
                lines.append(f"| *published: {name}* | " + " | ".join(f"{value:.2f}" for value in values) + " |")
        title = {"accuracy": "", "f1": "Weighted F1 in %\n\n", "generic": "Share of generic answers in %\n\n"}[measure]
        parts.append(title + "\n".join(lines))
    return "\n\n".join(parts) + "\n"


def draw(results: dict[str, dict[str, dict[str, float]]], path: Path) -> None:
    """Bars of accuracy: the base and every prompt on the four splits."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shown = {name: row for name, row in results.items() if "detached" not in name}
    figure, axes = plt.subplots(figsize=(7, 3), layout="constrained")
    width = 0.8 / len(shown)
    for i, (name, row) in enumerate(shown.items()):
        places = [place + (i - (len(shown) - 1) / 2) * width for place in range(len(SPLITS))]
        colour = "0.6" if name == "base" else f"C{i - 1}"
        bars = axes.bar(
            places, [100 * row[split]["accuracy"] for split in SPLITS], 0.92 * width, label=name, color=colour
        )
        axes.bar_label(bars, fmt="%.0f", fontsize=7)
    axes.set_xticks(range(len(SPLITS)), [split.replace("_", " ") for split in SPLITS])
    axes.set_ylabel("accuracy, %")
    axes.set_ylim(0, 108)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, ncols=len(shown), loc="lower center", bbox_to_anchor=(0.5, 1.0))
    figure.savefig(path, dpi=130)
    plt.close(figure)


# ---- the whole ----


def split_names(text: str) -> list[str]:
    """Names out of a list with commas."""
    return [name.strip().lower() for name in text.split(",") if name.strip()]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="facebook/opt-1.3b", help="causal LM: Hub name or local folder")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="type the weights are loaded in")
    add("--data-dir", type=Path, help=f"folder with train.tsv and dev.tsv; the Hub's {HUB_DATASET} unless given")
    add(
        "--entities",
        type=split_names,
        default=FORGET_ENTITIES,
        help="people whose reviews are forgotten; with --data-dir",
    )
    add("--limit-retain", type=int, help="at most so many retain rows for memorising and training")
    add(
        "--limit-eval",
        type=int,
        help="score at most so many rows of each retain split; forget splits are scored whole",
    )
    add("--memorise", choices=("full", "lora", "none"), default="full", help="what learns the reviews before")
    add("--memorise-epochs", type=float, default=3)
    add("--memorise-lr", type=float, default=1e-4)
    add("--memorise-batch-size", type=int, default=32)
    add("--base", type=Path, help="a model memorised before, OUTPUT_DIR/base, instead of memorising")
    add("--second-question", action="store_true", help="memorise who is named, too (for small models)")
    add(
        "--retain-entities",
        type=split_names,
        default=RETAIN_ENTITIES,
        help="people of retain reviews, for --second-question",
    )
    add("--prompt-types", nargs="+", choices=sorted(PROMPT_LRS), default=list(PROMPT_LRS), metavar="TYPE")
    add("--num-virtual-tokens", type=int, default=30)
    add("--prompt-lr", nargs="+", default=[], metavar="TYPE=LR", help=f"learning rates; defaults {PROMPT_LRS}")
    add("--epochs", type=float, default=10, help="passes over the data per prompt, unless --steps is given")
    add("--steps", type=int, help="steps per prompt")
    add("--batch-size", type=int, default=32)
    add("--eval-batch-size", type=int, default=64)
    add("--forget-fraction", type=float, help="share of forget rows in every batch; as the data are unless given")
    add("--alpha", type=float, default=1.0, help="weight of the retain term")
    add("--beta", type=float, default=0.5, help="weight of the KL term")
    add("--max-grad-norm", type=float, default=0.3)
    add("--max-length", type=int, default=512, help="tokens of a row, without the prompt's")
    add("--bf16", action=argparse.BooleanOptionalAction, default=True, help="train under bfloat16 autocast")
    add("--seed", type=int, default=0)
    add("--output-dir", type=Path, default=Path("out/sst2"))
    args = parser.parse_args()
    if both := sorted(set(args.entities) & set(args.retain_entities)):
        parser.error(f"{', '.join(both)} stand in both --entities and --retain-entities.")
    rates = dict(PROMPT_LRS)
    for text in args.prompt_lr:
        name, _, rate = text.partition("=")
        if name not in rates or not rate:
            parser.error(f"--prompt-lr {text!r}: expected TYPE=LR with TYPE one of {', '.join(rates)}.")
        rates[name] = float(rate)
    args.prompt_lr = rates
    return args


def load_base(
    splits: dict[str, list[dict[str, str]]],
    tokenizer: PreTrainedTokenizerBase,
    collator: ForgetRetainCollator,
    args: argparse.Namespace,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model that knows all reviews: memorised before, memorised now, or as it is."""
    made_with = {
        name: str(getattr(args, name))
        for name in ("model", "data_dir", "entities", "limit_retain", "second_question", "retain_entities", "seed")
    }
    dtype = getattr(torch, args.dtype)
    if args.base is not None:
        model = AutoModelForCausalLM.from_pretrained(args.base, dtype=dtype)
        record = json.loads((args.base / "memorise.json").read_text(encoding="utf-8"))
        known = record["made_with"]
        if other := [f"{name}: {known.get(name)!r}" for name, value in made_with.items() if known.get(name) != value]:
            raise ValueError(
                f"--base {args.base} was memorised on other data ({'; '.join(other)}): rows "
                "scored as unseen may be known to it. Give the same options, or leave --base out."
            )
        return model, record
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype)
    if args.memorise == "none":
        return model, {}
    rows = splits["train_forget"] + splits["train_retain"]
    examples = list(to_dataset(rows))
    if args.second_question:
        examples += list(second_questions(rows, args))
    print(f"memorising {len(examples):,} rows ({args.memorise})")
    model, facts = memorise(model, Dataset.from_list(examples), collator, args)
    record = {"made_with": made_with, "rows": len(examples), "epochs": args.memorise_epochs, **facts}
    model.save_pretrained(args.output_dir / "base")
    tokenizer.save_pretrained(args.output_dir / "base")
    (args.output_dir / "base" / "memorise.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    # Read back, since a Trainer leaves its autocast around the model: the same then as with --base.
    return AutoModelForCausalLM.from_pretrained(args.output_dir / "base", dtype=dtype), record


def main() -> None:
    args = parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.base or args.model)
    collator = ForgetRetainCollator(tokenizer, GENERIC, max_length=args.max_length, seed=args.seed, text_field="text")

    splits = load_splits(args)
    limit_retain(splits, args)
    print("rows: " + ", ".join(f"{name} {len(splits[name]):,}" for name in SPLITS))
    data = {name: to_dataset(splits[name]) for name in SPLITS}
    scored = {
        name: rows.shuffle(args.seed).select(range(min(len(rows), args.limit_eval)))
        if args.limit_eval is not None and name.endswith("retain")
        else rows
        for name, rows in data.items()
    }

    model, memorised = load_base(splits, tokenizer, collator, args)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    base_scores = evaluate("base", model, scored, collator, args.eval_batch_size)
    new: dict[str, Any] = {
        "seed": args.seed,
        "second_question": args.second_question,
        "rows": {name: len(rows) for name, rows in data.items()},
        "rows_scored": {name: len(rows) for name, rows in scored.items()},
        "memorise": memorised,
        "training": {},
        "results": {"base": base_scores},
    }
    rows = forget_retain_dataset(forget=data["train_forget"], retain=data["train_retain"])
    for prompt_type in args.prompt_types:
        unlearner, facts = unlearn(model, rows, collator, prompt_type, args)
        print(f"{prompt_type}: " + ", ".join(f"{key} {value:,}" for key, value in facts.items()))
        scores = evaluate(prompt_type, unlearner, scored, collator, args.eval_batch_size)
        new["training"][prompt_type], new["results"][prompt_type] = facts, scores
        unlearner.spul_config.metrics.update(scores)
        unlearner.save_pretrained(str(args.output_dir / "adapters" / prompt_type))
    with unlearner.disable_adapter():
        name = f"detached ({prompt_type})"
        new["results"][name] = evaluate(name, unlearner, scored, collator, args.eval_batch_size)

    metrics = merged(new, args.output_dir / "metrics.json")
    (args.output_dir / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    table = markdown(metrics)
    (args.output_dir / "results.md").write_text(table, encoding="utf-8")
    draw(metrics["results"], args.output_dir / "figure.png")
    print("\n" + table + f"\nwritten to {args.output_dir}")


if __name__ == "__main__":
    main()
