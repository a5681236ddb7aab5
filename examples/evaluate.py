"""Evaluate a saved adapter: forgetting, utility, membership inference and attacks that recover the knowledge.

    python examples/evaluate.py --model BASE --adapter forget-jane-doe --dataset SPLITS --retrained RETRAINED
    python examples/evaluate.py --model out/quickstart/base --adapter out/quickstart/adapter --dataset reviews

The adapter is a folder or Hub name of a prompt or of unlearning layers; without one, `--model` is an unlearned full
model, and `--base` the model before unlearning. The data set is one of the known ones, or a folder or Hub name of
four splits. `--retrained`, a model that never saw the forget rows, is the control of most metrics.

`--seed`, `--limit`, `--forget-set` and `--second-question` must equal those of training. Neighbors of the forget rows
are found by topic, by surname if the names of the forgotten people are known (`--names`), and by `--clusters`; TOFU
has its perturbed questions. The other measures require `--unrelated-texts`, `--unseen` and `--reference`.

It writes `evaluation.json`, `measurements.jsonl` (per row), `report.md`, `report.html` and figures, and puts a summary
into the adapter's model card where utility was measured. An interrupted evaluation resumes where it stopped;
`accelerate launch` distributes it over several processes.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from evaluation_rows import add_options, attack_settings, further_rows
from paper.experiment import Experiment
from paper.runs import SMALL, TASKS, TOYS, Setup
from transformers import AutoModelForCausalLM, AutoTokenizer

import spul
from spul import ForgetRetainCollator, SoftPromptUnlearner, UnlearningLayers
from spul.evaluation.report import add_to_card, write_report
from spul.layers.checkpoint import CONFIG_NAME
from spul.records.files import find_file


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, help="folder or Hub name of the base; or of an unlearned full model")
    add("--adapter", help="folder or Hub name of a prompt or of unlearning layers")
    add("--base", help="the model before unlearning, if there is no adapter")
    add("--retrained", help="a model that never saw the forget rows")
    add("--reference", help="another model that never saw them, such as the pretrained model")
    add("--dataset", required=True, help="sst2, yelp, wmdp, tofu, imdb; reviews, quiz; Hub name or folder of splits")
    add("--task", choices=TASKS, default="sentiment", help="prompt format of a data set in four splits")
    add("--data-dir", help="local folder of a known data set; the Hub unless given")
    add("--retain-dir", help="local folder of SciQ, for wmdp")
    add("--forget-set", choices=("forget01", "forget05", "forget10"), help="for tofu; forget10 unless given")
    add("--seed", type=int, default=0, help="of the data, as in training, and of all draws")
    add("--limit", type=int, help="of retain rows, as in training; rows of tofu beyond it count as unseen")
    add("--second-question", action="store_true", help="as in training")
    add("--limit-score", type=int, help="maximum number of rows of each retain split")
    add("--relearn-lr", type=float, default=1e-2, help="of relearning an adapter; best its training rate")
    add("--relearn-model-lr", type=float, default=1e-4, help="of relearning a full model")
    add("--batch-size", type=int, default=32)
    add(
        "--max-length",
        type=int,
        help="tokens of a row, virtual tokens excluded; as many as fit, at most 1024",
    )
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    add("--output-dir", type=Path, default=Path("out/evaluation"))
    add_options(parser)
    return parser.parse_args()


def load_adapter(base: Any, adapter: str) -> Any:
    """Load a prompt or unlearning layers onto their base."""
    if find_file(adapter, CONFIG_NAME) is not None:
        return UnlearningLayers.from_pretrained(base, adapter)
    return SoftPromptUnlearner.from_pretrained(base, adapter)


def main() -> None:
    args = parse_args()
    device = PartialState().device

    def load(name: str | None) -> Any:
        if name is None:
            return None
        return AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, args.dtype)).eval().to(device)

    names = (
        "dataset",
        "task",
        "data_dir",
        "retain_dir",
        "forget_set",
        "seed",
        "limit",
        "second_question",
        "limit_score",
    )
    setup = Setup(model=SMALL if args.dataset in TOYS else args.model, **{name: getattr(args, name) for name in names})
    experiment = Experiment(setup, args.output_dir)
    task = experiment.data.format
    model = load(args.model)
    if args.adapter is not None:
        model = load_adapter(model, args.adapter)
    num_virtual_tokens = getattr(getattr(model, "active_peft_config", None), "num_virtual_tokens", None) or 0
    positions = getattr(model.config, "max_position_embeddings", None) or 1024
    record = getattr(model, "spul_config", None)
    collator = ForgetRetainCollator(
        AutoTokenizer.from_pretrained(args.model),
        list(task.generic_completions),
        max_length=args.max_length or min(1024, positions - num_virtual_tokens),
        text_field=task.text_field,
        prompt_position="start" if record is None else record.prompt_position,
    )
    found = spul.evaluate(
        model,
        experiment.scored,
        collator,
        base=load(args.base),
        retrained=load(args.retrained),
        reference=load(args.reference),
        **further_rows(args, experiment),
        measures=args.measures,
        attacks=attack_settings(args, task, relearn_lr=args.relearn_lr, relearn_model_lr=args.relearn_model_lr),
        output_dir=args.output_dir,
        batch_size=args.batch_size,
        max_new_tokens=args.max_new_tokens,
        free_form=args.free_form,
        seed=args.seed,
    )
    if PartialState().is_main_process:
        written = write_report(found, args.output_dir)
        if args.adapter is not None and Path(args.adapter).is_dir() and "utility" in args.measures:
            add_to_card(found, args.adapter)
        print("written: " + ", ".join(map(str, written)))


if __name__ == "__main__":
    main()
