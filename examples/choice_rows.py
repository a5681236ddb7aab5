"""Multiple choice with one topic to forget, as four splits: astronomy, of SciQ, ARC and OpenBookQA.

    python examples/choice_rows.py --data-dir ../shared/data --output-dir out/choices

`--data-dir` has the folders `sciq` (`question`, `correct_answer`, `distractor1` to `3`), `arc_easy`, `arc_challenge`
and `openbookqa` (`query`, `choices`, `gold`) with `.jsonl` files, of which all are read. A question is forgotten if it
or its right answer names the topic. One that only a wrong choice gives away is in no split, and of repeated questions
only the first is. `load_four_splits(folder, MULTIPLE_CHOICE)` reads what is written.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, concatenate_datasets

from spul.data import MULTIPLE_CHOICE, UnlearningData
from spul.data.known_questions import SCIQ_COLUMNS, sciq_row
from spul.data.known_reviews import load_four_splits
from spul.data.recognizers import NameFinder
from spul.data.sources import check_folder, read_file
from spul.data.splits import split_by_entity, train_test
from spul.records.files import write_text

SCIQ, OTHERS = "sciq", ("arc_easy", "arc_challenge", "openbookqa")
BEFORE, AFTER = "Question: ", "\nAnswer:"  # of a query
# Without "mercury", which is a metal as well, and "earth", which most of geology names.
ASTRONOMY = (
    *("astronomy", "astronomer", "astronomers", "astronomical", "universe", "big bang", "outer space"),
    *("planet", "planets", "planetary", "mars", "jupiter", "saturn", "venus", "neptune", "uranus", "pluto"),
    *("moon", "moons", "lunar", "sun", "suns", "star", "stars", "supernova", "nebula", "constellation"),
    *("constellations", "solar system", "orbit", "orbits", "orbiting", "orbital", "eclipse", "eclipses"),
    *("telescope", "telescopes", "spacecraft", "astronaut", "astronauts", "light year", "light years"),
    *("galaxy", "galaxies", "galactic", "milky way", "black hole", "black holes"),
    *("comet", "comets", "asteroid", "asteroids", "meteor", "meteors", "meteorite", "meteorites"),
)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--output-dir", type=Path, default=Path("out/choices"))
    parser.add_argument("--words", nargs="+", default=list(ASTRONOMY), help="those that name the topic")
    parser.add_argument("--test-fraction", type=float, default=0.3)
    parser.add_argument("--seed", type=int, default=0, help="of SciQ's order of choices, and of train and test")
    return parser.parse_args()


def query_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of ARC or OpenBookQA in the columns of `MULTIPLE_CHOICE`."""
    query = row["query"]
    if not (query.startswith(BEFORE) and query.endswith(AFTER)):
        raise ValueError(f"query={query!r}; expected {BEFORE + '...' + AFTER!r}.")
    question = query.removeprefix(BEFORE).removesuffix(AFTER)
    return {"question": question, "choices": row["choices"], "answer": row["gold"]}


def questions(data_dir: Path, seed: int) -> Dataset:
    """All questions with their choices, the first of each question."""
    found = []
    for name in (SCIQ, *OTHERS):
        columns = SCIQ_COLUMNS if name == SCIQ else ("query", "choices", "gold")
        files = sorted(check_folder(data_dir / name, f"{name} as .jsonl files").glob("*.jsonl"))
        if not files:
            raise FileNotFoundError(f"{data_dir / name} has no .jsonl file; expected rows of {list(columns)}.")
        rows = concatenate_datasets([read_file(path, columns) for path in files])
        found += [sciq_row(row, seed) if name == SCIQ else query_row(row) for row in rows]
    first = {" ".join(row["question"].casefold().split()): row for row in reversed(found)}
    print(f"{len(found):,} questions read, {len(found) - len(first):,} of them asked before and left out")
    return Dataset.from_list(list(reversed(first.values())))


def topic_splits(rows: Dataset, words: Sequence[str], test_fraction: float = 0.3, seed: int = 0) -> dict[str, Dataset]:
    """The four splits, with the rows that name a topic as forget rows.

    Args:
        rows: `question`, `choices` and `answer`, each question once.
        words: those that name the topic.
        test_fraction: share of the test part of each side.
        seed: of that division.
    """
    asked = [f"{row['question']}\n{row['choices'][row['answer']]}" for row in rows]
    split = split_by_entity(rows.add_column("text", asked), words)
    finder = NameFinder(words)
    silent = [i for i, row in enumerate(split.retain) if not any(map(finder.find, row["choices"]))]
    retain = split.retain.select(silent)
    print(split.report)
    print(f"{len(split.retain) - len(retain):,} rows name the topic in a wrong choice alone and are in no split")
    parts = train_test(dataclasses.replace(split, retain=retain), test_fraction, seed)
    return {name: part.remove_columns("text") for name, part in parts.items()}


def write_splits(splits: Mapping[str, Dataset], folder: Path) -> UnlearningData:
    """Write four splits, and read them again.

    Raises:
        ValueError: if a row is in two splits.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in splits.items():
        write_text(folder / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    data = load_four_splits(folder, MULTIPLE_CHOICE)  # which drops repeats
    if dropped := sum(map(len, splits.values())) - sum(map(len, data.splits.values())):
        raise ValueError(f"{dropped} row(s) of {folder} repeat another or are in two splits; expected each in one.")
    return data


def main() -> None:
    args = parse_args()
    splits = topic_splits(questions(args.data_dir, args.seed), args.words, args.test_fraction, args.seed)
    print("\n".join(write_splits(splits, args.output_dir).notes))


if __name__ == "__main__":
    main()
