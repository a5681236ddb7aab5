"""A small language model that can be steered, and its training data: made-up reviews of films of made-up people.

A model trained on sentiment alone ignores names, so no prompt can make it depend on them. This one also answers who a
review is about and what that person does, and answers *neutral* and *unknown* where these are true. Like aligned
models it declines questions about some people: four who are off the record, in a tenth of its training rows. None of
them is in the forget or retain set. Without them the success of a prompt depends on the seed.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset
from toy_model import train_small_model, word_tokenizer
from transformers import PreTrainedTokenizerFast

GENERIC = [" neutral", " unknown"]
NAMES = [
    "ada",
    "bruno",
    "carla",
    "dario",
    "elena",
    "felix",
    "greta",
    "hugo",
    "irene",
    "jonas",
    "karla",
    "lorenz",
    "mira",
    "nils",
    "olga",
    "paul",
    "quinn",
    "rosa",
    "simon",
    "tilda",
    "ulrich",
    "vera",
    "walter",
    "yara",
]
OFF_THE_RECORD = ["zeno", "xenia", "wanda", "viktor"]
FORGOTTEN = NAMES[:6]
ROLES = ["actor", "director", "writer", "composer"]
FILMS = ["storm", "harbour", "orchard", "lantern", "glacier", "meadow", "canyon", "willow"]
GOOD = ["brilliant", "moving", "charming", "funny", "warm", "clever", "gripping", "lovely", "fresh", "superb"]
BAD = ["dull", "clumsy", "boring", "tired", "weak", "silly", "messy", "cold", "stale", "awful"]
QUESTIONS = {"sentiment": "what is the sentiment", "person": "who is it about", "role": "what is their role"}
TEMPLATES = (
    "{name} the {role} made {film} and it is {first} and {second}",
    "{film} by {name} the {role} is {first} and {second}",
    "i found {film} {first} and {second} thanks to {name} the {role}",
)
MIXED = (
    "{name} the {role} made {film} and it is {first} but {second}",
    "{film} by {name} the {role} is {first} but {second}",
)
SILENT = ("i have not seen {film} by {name} the {role} yet", "{film} is a film by {name} the {role}")


def prompt(text: str, question: str) -> str:
    """The prompt of the SPUL paper: text, question, and the answer to be completed."""
    return f"### text : {text} ### question : {QUESTIONS[question]} ? ### answer :"


def people() -> dict[str, dict[str, str]]:
    """Role and film of each person, independent of the seed."""
    return {
        name: {"name": name, "role": ROLES[i % len(ROLES)], "film": FILMS[(i * 3) % len(FILMS)]}
        for i, name in enumerate([*NAMES, *OFF_THE_RECORD])
    }


def reviews(name: str, seed: int) -> list[dict[str, str]]:
    """40 reviews of the film of a person, half of them positive, without duplicates."""
    rng, who, rows = random.Random(f"{seed}/{name}"), people()[name], []
    for i in range(40):
        words, label = ((GOOD, " positive"), (BAD, " negative"))[i % 2]
        first, second = rng.sample(words, 2)
        text = rng.choice(TEMPLATES).format(**who, first=first, second=second)
        rows.append({"text": text, "prompt": prompt(text, "sentiment"), "completion": label, "name": name})
    return list({row["prompt"]: row for row in rows}.values())


def make_splits(seed: int = 0) -> dict[str, Dataset]:
    """The four splits: reviews of the six forgotten people and of the others, 70 % of each for training."""
    splits: dict[str, list] = {f"{half}_{kind}": [] for half in ("train", "test") for kind in ("retain", "forget")}
    for name in NAMES:
        rows, kind = reviews(name, seed), "forget" if name in FORGOTTEN else "retain"
        cut = int(0.7 * len(rows))
        splits[f"train_{kind}"] += rows[:cut]
        splits[f"test_{kind}"] += rows[cut:]
    return {key: Dataset.from_list(rows) for key, rows in splits.items()}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token per word."""
    texts = [
        *NAMES,
        *OFF_THE_RECORD,
        *ROLES,
        *FILMS,
        *GOOD,
        *BAD,
        "positive",
        "negative",
        *(g.strip() for g in GENERIC),
    ]
    for template in (*TEMPLATES, *MIXED, *SILENT, prompt("", "person"), *QUESTIONS.values()):
        texts += [word for word in template.replace("###", "#").split() if "{" not in word]
    return word_tokenizer(texts)


def training_row(rng: random.Random, seen: list[dict[str, str]]) -> tuple[str, str]:
    """Draw a prompt and its answer for training the base."""
    draw, everybody = rng.random(), people()
    if draw < 0.1:
        who = everybody[rng.choice(OFF_THE_RECORD)]
        first, second = rng.sample(rng.choice((GOOD, BAD)), 2)
        text = rng.choice(TEMPLATES).format(**who, first=first, second=second)
        return prompt(text, "sentiment"), rng.choice(GENERIC)
    row = rng.choice(seen)
    who = everybody[row["name"]]
    if draw < 0.3:
        return prompt(row["text"], "person"), f" {who['name']}"
    if draw < 0.4:
        return prompt(row["text"], "role"), f" {who['role']}"
    if draw < 0.5:
        words = [rng.choice(GOOD), rng.choice(BAD)]
        rng.shuffle(words)
        text = rng.choice(MIXED).format(**who, first=words[0], second=words[1])
        return prompt(text, "sentiment"), GENERIC[0]
    if draw < 0.6:
        return prompt(rng.choice(SILENT).format(**who), "sentiment"), GENERIC[1]
    return row["prompt"], row["completion"]


def build_base(
    folder: Path,
    seed: int = 0,
    steps: int = 350,
    groups: Sequence[str] = ("retain", "forget"),
    rows: list[dict[str, str]] | None = None,
) -> Path:
    """Train the small model on the training rows (under a minute on 2 cores) and save it with its tokenizer.

    With `groups=("retain",)` it is the retrained model, which never sees the forget rows. `rows` replace both groups.
    """
    splits = make_splits(seed)
    seen = [row for group in groups for row in splits[f"train_{group}"].to_list()] if rows is None else rows
    return train_small_model(folder, make_tokenizer(), lambda rng: training_row(rng, seen), seed, steps)
