"""What an evaluation takes beside models and the four splits: the options of it, and the rows that they are about."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset
from paper.experiment import Experiment
from tqdm.auto import tqdm

from spul.data import PromptFormat
from spul.data.clusters import TextClustering
from spul.data.known_reviews import IMDB_FORGET_NAMES, SST2_FORGET_NAMES
from spul.data.sources import read_file, read_hub
from spul.evaluation import MEASURES, AttackSettings, cluster_neighbors, name_neighbors, topic_neighbors

# The questions of the made-up and the real reviews in other words.
WORDINGS = {
    "text": {
        "### Question: What is the sentiment of the given text?": "### Question: Did the writer like it?",
        "what is the sentiment": "is it good or bad",
    }
}
KNOWN_NAMES = {"sst2": SST2_FORGET_NAMES, "imdb": IMDB_FORGET_NAMES}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that all evaluations have."""
    add = parser.add_argument
    add(
        "--measures",
        nargs="+",
        type=lambda name: name.replace("-", " "),
        choices=MEASURES,
        default=list(MEASURES),
        metavar="MEASURE",
        help=", ".join(name.replace(" ", "-") for name in MEASURES),
    )
    add("--attack-rows", type=int, default=200, help="at most so many rows of a set are attacked")
    add("--turns", nargs="+", type=int, default=[1, 4], help="ask after so many other questions with their answers")
    add("--tries", nargs="+", type=int, default=[1, 10, 100], help="numbers of sampled answers")
    add("--free-form", action="store_true", help="answers are texts and no classes, though few")
    add("--max-new-tokens", type=int, default=200, help="of a free-form answer")
    add("--wording", type=Path, help="JSON: what to put for which fixed part of the prompts; reviews have one anyway")
    add("--gradient-norm", action="store_true", help="infer membership from gradients, too, a backward pass a row")
    add(
        "--names",
        nargs="+",
        help="of forgotten people, in full, for neighbors of the same surname; sst2's and imdb's",
    )
    add(
        "--clusters",
        type=int,
        help="into how many to cluster the rows: those in the forget rows' clusters are neighbors, too",
    )
    add("--unrelated-texts", type=Path, help="a file of running text, one on each line")
    add("--unseen", type=Path, help="rows like the forget rows that no model saw, as JSON lines, CSV, TSV or Parquet")


def identity(args: argparse.Namespace) -> list[Any]:
    """What tells the options of one evaluation from those of another."""
    files = (args.wording, args.unrelated_texts, args.unseen)
    contents = [None if path is None else path.read_bytes().hex() for path in files]
    return [
        sorted(args.measures),
        args.attack_rows,
        args.turns,
        args.tries,
        args.max_new_tokens,
        args.free_form,
        args.gradient_norm,
        args.names,
        args.clusters,
        contents,
    ]


def attack_settings(args: argparse.Namespace, task: PromptFormat, **learning_rates: float) -> AttackSettings:
    """How the attacks are done."""
    return AttackSettings(
        turns=tuple(args.turns),
        tries=tuple(args.tries),
        num_rows=args.attack_rows,
        wording=WORDINGS.get(task.text_field) if args.wording is None else read_wording(args.wording),
        gradient_norm=args.gradient_norm,
        **learning_rates,
    )


def further_rows(args: argparse.Namespace, experiment: Experiment) -> dict[str, Any]:
    """Neighbors, unrelated texts, questions and unseen rows, as `spul.evaluate` takes them."""
    path = args.unrelated_texts
    return {
        "neighbors": neighbors(args, experiment) if "neighbors" in args.measures else {},
        "unrelated_texts": [] if path is None else path.read_text(encoding="utf-8").splitlines(),
        "questions": perturbed_questions(args) if "questions" in args.measures else {},
        "unseen": unseen_rows(args, experiment) if "membership" in args.measures else None,
    }


def neighbors(args: argparse.Namespace, experiment: Experiment) -> dict[str, Dataset]:
    """Test retain rows near to the forget rows, at most as many of a kind as are attacked.

    *Same topic* are the quarter whose words are most like those of forget rows, or as many as are attacked. A kind
    that no option asked for is left out where there is none.
    """
    forget, retain = (experiment.rows[split] for split in ("train_forget", "test_retain"))
    field, most, seed = experiment.data.format.text_field, args.attack_rows, experiment.setup.seed
    num = max(1, min(most, len(retain) // 4))
    kinds = {"same topic": lambda: topic_neighbors(forget, retain, num, field)}
    if names := args.names or KNOWN_NAMES.get(experiment.setup.dataset):
        kinds["same surname"] = lambda: at_most(name_neighbors(retain, names, text_field=field), most, seed)
    if args.clusters is not None:
        clustering = TextClustering.fit([*forget[field], *retain[field]], args.clusters, seed=seed)
        kinds["same cluster"] = lambda: at_most(cluster_neighbors(forget, retain, clustering, field), most, seed)
    asked = {"same surname": args.names, "same cluster": args.clusters}
    found = {}
    for kind, find in kinds.items():
        try:
            found[kind] = find()
        except ValueError as error:
            if asked.get(kind):
                raise
            tqdm.write(f"no neighbors, {kind}: {error}")
    return found


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
        found[name] = at_most(rows, args.attack_rows, 0)
    return found


def unseen_rows(args: argparse.Namespace, experiment: Experiment) -> Dataset | None:
    """Rows like the forget rows that no model was trained on, where `test_forget` has none such.

    They are those of a file, or, of TOFU, whose test rows ask for facts that are trained on, what `--limit` left out
    of the retain rows: as many as there are forget rows. A model that came as it is may have learned those, too.
    """
    data, setup = experiment.data, experiment.setup
    if args.unseen is not None:
        rows = read_file(args.unseen)
        return rows if {"prompt", "completion"} <= set(rows.column_names) else data.format.apply(rows)
    if setup.dataset != "tofu" or setup.memorize == "none":
        return None
    learned = {answer for split in ("train_forget", "train_retain") for answer in data.splits[split]["answer"]}
    everything = experiment.whole.splits["train_retain"]
    left = everything.select([i for i, answer in enumerate(everything["answer"]) if answer not in learned])
    if not len(left):
        return None
    return data.format.apply(at_most(left, len(data.splits["train_forget"]), setup.seed))


def read_wording(path: Path) -> Mapping[str, str]:
    """What to put in place of which part of the prompts."""
    wording = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(wording, dict) or not wording or not all(isinstance(new, str) for new in wording.values()):
        raise ValueError(f'{path} has {wording!r}; expected {{"a part of the prompts": "what to put there"}}.')
    return wording


def at_most(rows: Dataset, most: int, seed: int) -> Dataset:
    """So many rows, drawn at random."""
    return rows.shuffle(seed=seed).select(range(min(most, len(rows))))
