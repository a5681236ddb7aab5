"""Options of an evaluation, and its rows beyond the four splits: neighbors, texts, questions and unseen rows."""

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

# Paraphrases of the questions of the made-up and the real reviews.
WORDINGS = {
    "text": {
        "### Question: What is the sentiment of the given text?": "### Question: Did the writer like it?",
        "what is the sentiment": "is it good or bad",
    }
}
KNOWN_NAMES = {"sst2": SST2_FORGET_NAMES, "imdb": IMDB_FORGET_NAMES}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of all evaluations to a parser."""
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
    add("--attack-rows", type=int, default=200, help="maximum number of attacked rows of a set")
    add("--turns", nargs="+", type=int, default=[1, 4], help="numbers of question-answer turns before the question")
    add("--document-words", nargs="+", type=int, default=[300], help="words of the documents around the question")
    add("--tries", nargs="+", type=int, default=[1, 10, 100], help="numbers of sampled answers")
    add("--free-form", action="store_true", help="answers are free text, even if few are different")
    add("--max-new-tokens", type=int, default=200, help="of a free-form answer")
    add("--wording", type=Path, help="JSON of {part of the prompts: replacement}; reviews have a default")
    add(
        "--gradient-norm", action="store_true", help="infer membership from gradients as well; a backward pass per row"
    )
    add(
        "--names",
        nargs="+",
        help="full names of forgotten people, for neighbors of the same surname and attacks that disguise names; "
        "known for sst2 and imdb",
    )
    add(
        "--clusters",
        type=int,
        help="number of clusters of the rows; rows in a cluster of forget rows are neighbors",
    )
    add("--unrelated-texts", type=Path, help="a text file, one text per line")
    add(
        "--unseen",
        type=Path,
        help="rows that no model was trained on, as JSON lines, CSV, TSV or Parquet",
    )


def identity(args: argparse.Namespace) -> list[Any]:
    """The options by which evaluations differ, with the contents of files, as plain data."""
    files = (args.wording, args.unrelated_texts, args.unseen)
    contents = [None if path is None else path.read_bytes().hex() for path in files]
    return [
        sorted(args.measures),
        args.attack_rows,
        args.turns,
        args.document_words,
        args.tries,
        args.max_new_tokens,
        args.free_form,
        args.gradient_norm,
        args.names,
        args.clusters,
        contents,
    ]


def attack_settings(args: argparse.Namespace, task: PromptFormat, **learning_rates: float) -> AttackSettings:
    """The settings of the attacks."""
    return AttackSettings(
        turns=tuple(args.turns),
        names=tuple(args.names or KNOWN_NAMES.get(args.dataset, ())),
        document_words=tuple(args.document_words),
        tries=tuple(args.tries),
        num_rows=args.attack_rows,
        wording=WORDINGS.get(task.text_field) if args.wording is None else read_wording(args.wording),
        gradient_norm=args.gradient_norm,
        **learning_rates,
    )


def further_rows(args: argparse.Namespace, experiment: Experiment) -> dict[str, Any]:
    """Neighbors, unrelated texts, questions and unseen rows, as keyword arguments of `spul.evaluate`."""
    path = args.unrelated_texts
    return {
        "neighbors": neighbors(args, experiment) if "neighbors" in args.measures else {},
        "unrelated_texts": [] if path is None else path.read_text(encoding="utf-8").splitlines(),
        "questions": perturbed_questions(args) if "questions" in args.measures else {},
        "unseen": unseen_rows(args, experiment) if "membership" in args.measures else None,
    }


def neighbors(args: argparse.Namespace, experiment: Experiment) -> dict[str, Dataset]:
    """Test retain rows close to the forget rows, at most `--attack-rows` of a kind.

    *Same topic* is the quarter of the rows whose words are most similar to those of forget rows. A kind without
    rows is skipped, unless an option requires it.
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
    """TOFU's questions with wrong answers, at most `--attack-rows` of each set."""
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
    """Rows like the forget rows that no model was trained on; None if `test_forget` serves as such.

    They are read from a file. For TOFU, whose test rows are about facts of the training rows, they are drawn from
    the retain rows beyond `--limit`, as many as there are forget rows, unless the model was not trained here: then
    it may have learned them.
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
    """Read replacements of parts of the prompts from a JSON file."""
    wording = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(wording, dict) or not wording or not all(isinstance(new, str) for new in wording.values()):
        raise ValueError(f'{path} has {wording!r}; expected {{"a part of the prompts": "what to put there"}}.')
    return wording


def at_most(rows: Dataset, most: int, seed: int) -> Dataset:
    """At most `most` rows, drawn at random."""
    return rows.shuffle(seed=seed).select(range(min(most, len(rows))))
