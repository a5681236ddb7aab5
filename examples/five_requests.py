"""Five requests in turn on the quick start's small model: fused layers and combined prompts.

    python examples/five_requests.py                        # about 20 minutes on 2 CPU cores
    python examples/five_requests.py --seeds 0 --methods "prompts distilled" "EUL, fused"
    python examples/five_requests.py --pairs                # overlapping and contradicting requests, 5 minutes a seed

Each of five people asks to be forgotten, one after the other. It writes `requests.jsonl`, one line for each method
after each request, and `requests.md`, a table; an interrupted run resumes. `--pairs` writes `pairs.jsonl` and
`pairs.md` instead.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import mean
from typing import Any

from datasets import Dataset
from pairs import pairs_table, run_pairs
from sequence import Requests, run
from toy_reviews import FORGOTTEN, GENERIC, build_base, make_splits
from transformers import AutoModelForCausalLM, AutoTokenizer

from spul.layers import UnlearningLayersConfig
from spul.records.digests import digest
from spul.training.methods import unlearning_method

NUM_REQUESTS = 5
NOT_SETTINGS = ("seeds", "methods", "output_dir", "pairs")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the model, its data and training")
    parser.add_argument("--methods", nargs="+", help="names as in the table; all unless given")
    parser.add_argument("--pairs", action="store_true", help="two requests that overlap or contradict each other")
    parser.add_argument("--steps", type=int, default=600, help="of a prompt, for one request")
    parser.add_argument("--layers-steps", type=int, default=300, help="of layers, for one request")
    parser.add_argument("--distill-steps", type=int, default=200, help="of distilling")
    parser.add_argument("--num-virtual-tokens", type=int, default=15, help="of a prompt")
    parser.add_argument("--layers-rate", type=float, default=1e-2)
    parser.add_argument(
        "--gamma", type=float, default=0.02, help="weight of EUL's ascent on the text; 0.2 as published"
    )
    parser.add_argument("--reduction", type=int, default=4, help="width of the model divided by the layers'")
    parser.add_argument("--wide-steps", type=int, default=250, help="of layers with a fixed down part")
    parser.add_argument("--wide-rate", type=float, default=3e-3, help="their learning rate; low rates fuse better")
    parser.add_argument(
        "--wide-reduction", type=float, default=0.25, help="width of the model divided by these layers'"
    )
    parser.add_argument("--output-dir", type=Path, default=Path("out/requests"))
    return parser.parse_args()


def make_requests(args: argparse.Namespace, seed: int) -> Requests:
    """One request per person; the sixth of the quick start's forgotten people is left in the model."""
    settings = digest({name: value for name, value in vars(args).items() if name not in NOT_SETTINGS})[:12]
    folder = args.output_dir / str(seed)
    splits = make_splits(seed)
    if not (folder / "base" / "model.safetensors").exists():
        build_base(folder / "base", seed)

    def of(split: str, i: int) -> Dataset:
        rows = splits[split]
        return rows.select([j for j, name in enumerate(rows["name"]) if name == FORGOTTEN[i]])

    def retrain(retained: Dataset) -> Any:
        return AutoModelForCausalLM.from_pretrained(build_base(folder / "retrained", seed, rows=retained.to_list()))

    return Requests(
        base=lambda: AutoModelForCausalLM.from_pretrained(folder / "base"),
        tokenizer=AutoTokenizer.from_pretrained(folder / "base"),
        generic=list(GENERIC),
        train=[of("train_forget", i) for i in range(NUM_REQUESTS)],
        test=[of("test_forget", i) for i in range(NUM_REQUESTS)],
        retain=splits["train_retain"],
        test_retain=splits["test_retain"],
        retrain=retrain,
        folder=folder / settings,
        settings=settings,
        seed=seed,
        steps={
            "prompt": args.steps,
            "layers": args.layers_steps,
            "wide": args.wide_steps,
            "distill": args.distill_steps,
        },
        rates={"prompt": 0.1, "layers": args.layers_rate, "wide": args.wide_rate, "distill": 0.1},
        layers=unlearning_method("EUL", gamma=args.gamma),
        generic_layers=unlearning_method("SPUL", trainable="layers", alpha=0.5),
        prompt=unlearning_method("SPUL", alpha=0.5),
        num_virtual_tokens=args.num_virtual_tokens,
        layers_config=UnlearningLayersConfig(reduction=args.reduction),
        wide_config=UnlearningLayersConfig(reduction=args.wide_reduction, train_down=False),
    )


def table(lines: list[dict[str, Any]]) -> str:
    """A Markdown table after the last request: mean and worst test-forget accuracy, retain accuracy, seconds."""
    heads = ("method", "forget, mean", "forget, worst request", "retain", "seconds a request")
    rows = ["| " + " | ".join(heads) + " |", "| --- |" + " ---: |" * (len(heads) - 1)]
    for name in dict.fromkeys(line["method"] for line in lines):
        mine = [line for line in lines if line["method"] == name]
        if name.startswith("each request's own"):  # request i's own, on request i's rows
            forget = [line["test_forget"][line["requests"] - 1] for line in mine]
            last = mine
        else:
            last = [line for line in mine if line["requests"] == NUM_REQUESTS]
            forget = [share for line in last for share in line["test_forget"]]
        cells = [f"{100 * mean(forget):.1f}", f"{100 * max(forget):.1f}"]
        cells += [f"{100 * mean(line['test_retain'] for line in last):.1f}", f"{mean(r['seconds'] for r in mine):.0f}"]
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def main() -> None:
    args = parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        requests = make_requests(args, seed)
        if args.pairs:
            lines = run_pairs(requests, args.output_dir / "pairs.jsonl")
        else:
            lines = run(requests, args.output_dir / "requests.jsonl", order=0, names=args.methods)
    text = (pairs_table if args.pairs else table)([line for line in lines if line["settings"] == requests.settings])
    (args.output_dir / f"{'pairs' if args.pairs else 'requests'}.md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
