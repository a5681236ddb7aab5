"""Options of the example scripts on experiments: data, model, memorizing, methods and lengths; and their checks."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from paper.runs import PROMPT_TYPES, SMALL, TASKS, Setup
from spul.training.methods import METHODS

# P-tuning and layers: as published. The others: found on small models.
LEARNING_RATES = {"p_tuning": 1e-4, "prompt_tuning": 0.05, "prefix_tuning": 0.03}
LEARNING_RATES |= {"full": 1e-5, "lora": 1e-4, "layers": 5e-5}
# Compared unless others are named. AltPO needs alternate answers, RMU the number of a layer: they have no option here.
COMPARED = ("SPUL", "GA", "RL", "GA+KL", "GA+GD", "NPO", "NPO+KL", "NPO+GD", "SimNPO", "SimNPO+KL", "SimNPO+GD", "EUL")
AVAILABLE = tuple(name for name in METHODS if name not in ("AltPO", "RMU"))
EPOCHS = {"all": 1.0, "SPUL": 10.0}
"""Passes over the rows as published: one for the baselines, ten for SPUL."""
MEMORIZE_EPOCHS = {"sst2": 10.0, "yelp": 2.0, "wmdp": 5.0}
"""Passes over the rows of the memorizing stage as published."""
PUBLISHED_NAMES = {"Unlearning_SST2": "sst2", "Unlearning_Yelp_Polarity": "yelp"}


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
        default="qlora",
        help="trainable of the memorizing stage; qlora as published, of rank 16",
    )
    add(
        "--memorize-epochs", type=float, help=f"as published for {MEMORIZE_EPOCHS}; {Setup.memorize_epochs} for others"
    )
    add("--memorize-lr", type=float, default=1e-4)
    add("--memorize-batch-size", type=int, default=32)
    add("--label-smoothing", type=float, default=0.0, help="of memorizing; a less certain model is easier to steer")
    add("--second-question", action="store_true", help="memorize who is named as well (SST-2, for small models)")
    add("--load-in-4bit", action="store_true", help="score and unlearn over weights in 4-bit NF4")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="type of the weights otherwise")
    add("--max-length", type=int, default=1024, help="tokens of a row, virtual tokens excluded")
    add("--blank-lines", action="store_true", help="between the fields of a prompt, as in the authors' program")
    add("--draw-once", action="store_true", help="draw a row's generic response once for all epochs, as they do")
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
    add("--beta", type=float, help="weight of SPUL's KL term; as published for each table, 0.5 for main, unless given")
    add("--lr", nargs="+", default=[], metavar="NAME=LR", help=f"by trainable or method; defaults {LEARNING_RATES}")
    add(
        "--epochs",
        nargs="+",
        default=[],
        metavar="N or METHOD=N",
        help=f"passes over the rows, unless --steps is given; as published {EPOCHS}, unless given",
    )
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
    for name in ("batch_size", "eval_batch_size", "num_virtual_tokens", "memorize_epochs", "limit", "limit_score"):
        if (value := getattr(args, name)) is not None and value <= 0:
            parser.error(f"--{name.replace('_', '-')} {value}: expected a number above 0.")
    if args.forget_fraction is not None and not 0 < args.forget_fraction < 1:
        parser.error(f"--forget-fraction {args.forget_fraction}: expected a share above 0 and below 1.")
    try:
        args.lr = {**LEARNING_RATES, **by_name(args.lr, (*LEARNING_RATES, *METHODS))}
        epochs = by_name(args.epochs, ("all", *METHODS), "all")
        args.epochs = epochs if "all" in epochs else EPOCHS | epochs
        args.steps = {name: int(steps) for name, steps in by_name(args.steps, ("all", *METHODS), "all").items()}
    except ValueError as error:
        parser.error(str(error))
    if args.memorize_epochs is None:
        args.memorize_epochs = MEMORIZE_EPOCHS.get(published_name(args.dataset), Setup.memorize_epochs)
    return args


def published_name(dataset: str) -> str:
    """The name of a data set in the published tables, if it is one of theirs; otherwise as it is."""
    return PUBLISHED_NAMES.get(Path(dataset).name, dataset)


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
