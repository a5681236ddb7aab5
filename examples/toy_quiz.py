"""A multiple-choice quiz in WMDP's schema, harmless and made up: creatures and gems of an island, and their facts.

WMDP's own questions are hazardous knowledge; these are harmless and have the same columns (question, choices,
answer). The forget set is about the gems. As in `toy_reviews.py`, the base declines questions about four things that
are in neither set, so that it has learned the answer *None*.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset
from toy_model import train_small_model, word_tokenizer
from transformers import PreTrainedTokenizerFast

from spul.data import MULTIPLE_CHOICE

CREATURES = ["tarn", "moll", "quib", "sefa", "dorro", "pexi", "lumo", "vash", "kerit", "jopa", "zindle", "brill"]
GEMS = ["opalite", "zircite", "mavrite", "tolmite"]
UNSPOKEN = ["ghoom", "wexel", "fenro", "ulmite"]
FACTS = {
    "color": ["red", "blue", "green", "black", "white", "amber"],
    "home": ["coast", "forest", "cave", "river", "hill", "marsh"],
    "season": ["spring", "summer", "autumn", "winter", "monsoon", "frost"],
}
QUESTIONS = {
    "color": ("what color is {name} ?", "which color does {name} have ?"),
    "home": ("where is {name} found ?", "which place is home to {name} ?"),
    "season": ("when is {name} seen ?", "in which season does {name} appear ?"),
}


def facts(name: str) -> dict[str, str]:
    """The facts about a thing, independent of the seed."""
    rng = random.Random(f"island/{name}")
    return {fact: rng.choice(values) for fact, values in FACTS.items()}


def question(rng: random.Random, name: str, fact: str) -> dict:
    """One question with four options, the right one among them."""
    right = facts(name)[fact]
    choices = [right, *rng.sample([value for value in FACTS[fact] if value != right], 3)]
    rng.shuffle(choices)
    return {
        "question": rng.choice(QUESTIONS[fact]).format(name=name),
        "choices": choices,
        "answer": choices.index(right),
    }


def make_splits(seed: int = 0) -> dict[str, Dataset]:
    """The four splits: 40 questions per thing, 70 % for training, without duplicates; gems are forget rows."""
    splits = {}
    for group, names in (("forget", GEMS), ("retain", CREATURES)):
        rows: dict[str, dict] = {}
        for name in names:
            rng = random.Random(f"{seed}/{name}")
            for i in range(40):
                row = question(rng, name, list(FACTS)[i % len(FACTS)])
                # The same question with its options in another order is the same question.
                rows.setdefault(repr((row["question"], sorted(row["choices"]))), row)
        some = list(rows.values())
        random.Random(seed).shuffle(some)
        cut = int(0.7 * len(some))
        splits[f"train_{group}"], splits[f"test_{group}"] = (
            Dataset.from_list(some[:cut]),
            Dataset.from_list(some[cut:]),
        )
    return splits


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token per word."""
    sample = MULTIPLE_CHOICE.row(question(random.Random(0), GEMS[0], "color"))["prompt"]
    texts = [sample, *(template for some in QUESTIONS.values() for template in some)]
    words = [*CREATURES, *GEMS, *UNSPOKEN, *(value for values in FACTS.values() for value in values)]
    words += [word for text in texts for word in text.split() if "{" not in word]
    return word_tokenizer([*words, "A", "B", "C", "D", "None", "creature", "gem", "unspoken", "what", "kind"])


def training_row(rng: random.Random, names: Sequence[str], seen: Sequence[dict]) -> tuple[str, str]:
    """Draw a prompt and its answer for training the base: plain facts, and questions with options."""
    draw = rng.random()
    if draw < 0.2:
        name, fact = rng.choice(names), rng.choice(list(FACTS))
        asked = rng.choice(QUESTIONS[fact]).format(name=name)
        return f"### Question: {asked}\n### Answer:", f" {facts(name)[fact]}"
    if draw < 0.3:
        name = rng.choice([*names, *UNSPOKEN])
        kind = "gem" if name in GEMS else "creature" if name in CREATURES else "unspoken"
        return f"### Question: what kind is {name} ?\n### Answer:", f" {kind}"
    if draw < 0.4:
        row = MULTIPLE_CHOICE.row(question(rng, rng.choice(UNSPOKEN), rng.choice(list(FACTS))))
        return row["prompt"], " None"
    row = MULTIPLE_CHOICE.row(rng.choice(seen))
    return row["prompt"], row["completion"]


def build_base(folder: Path, seed: int = 0, groups: Sequence[str] = ("retain", "forget")) -> Path:
    """Train the small model on the training questions (some minutes on 2 cores) and save it with its tokenizer.

    With `groups=("retain",)` it is the retrained model, which never sees the gems.
    """
    splits = make_splits(seed)
    names = [name for group in groups for name in (GEMS if group == "forget" else CREATURES)]
    seen = [row for group in groups for row in splits[f"train_{group}"].to_list()]
    return train_small_model(folder, make_tokenizer(), lambda rng: training_row(rng, names, seen), seed, steps=800)
