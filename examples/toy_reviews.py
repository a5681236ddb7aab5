"""A small language model that can be steered, and what it was trained on: made-up reviews of made-up people's films.

A model trained on sentiment alone reads nothing else, so no prompt can tell it whom to be silent about. This one also
answers who a review is about and what that person does, and says *neutral* and *unknown* where that is the honest
answer. Like aligned models it declines about some people from the start: four who are off the record, in a tenth of
its training rows; none of them is in the forget or retain set. Without these it depends on the seed whether a prompt
finds its way.
"""

from __future__ import annotations

import random
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

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
    """The three fields of the SPUL paper's prompt, the last one to be answered."""
    return f"### text : {text} ### question : {QUESTIONS[question]} ? ### answer :"


def people() -> dict[str, dict[str, str]]:
    """Everybody's role and film, which never change."""
    return {
        name: {"name": name, "role": ROLES[i % len(ROLES)], "film": FILMS[(i * 3) % len(FILMS)]}
        for i, name in enumerate([*NAMES, *OFF_THE_RECORD])
    }


def reviews(name: str, seed: int) -> list[dict[str, str]]:
    """Forty reviews of a person's film, half of them good."""
    rng, who, rows = random.Random(f"{seed}/{name}"), people()[name], []
    for i in range(40):
        words, label = ((GOOD, " positive"), (BAD, " negative"))[i % 2]
        first, second = rng.sample(words, 2)
        text = rng.choice(TEMPLATES).format(**who, first=first, second=second)
        rows.append({"text": text, "prompt": prompt(text, "sentiment"), "completion": label, "name": name})
    return list({row["prompt"]: row for row in rows}.values())


def make_splits(seed: int = 0) -> dict[str, Dataset]:
    """Reviews of the forgotten six and of the others, seven tenths of each to train on."""
    splits: dict[str, list] = {f"{half}_{kind}": [] for half in ("train", "test") for kind in ("retain", "forget")}
    for name in NAMES:
        rows, kind = reviews(name, seed), "forget" if name in FORGOTTEN else "retain"
        cut = int(0.7 * len(rows))
        splits[f"train_{kind}"] += rows[:cut]
        splits[f"test_{kind}"] += rows[cut:]
    return {key: Dataset.from_list(rows) for key, rows in splits.items()}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word."""
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
    words = ["<pad>", "<s>", "</s>", "<unk>", *dict.fromkeys(["###", *texts])]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def training_row(rng: random.Random, seen: list[dict[str, str]]) -> tuple[str, str]:
    """A prompt and its answer, as the base learns them."""
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


def build_base(folder: Path, seed: int = 0, steps: int = 350, batch_size: int = 64) -> Path:
    """Train the small model (1.4M parameters, under a minute on 2 cores) and save it with its tokenizer."""
    torch.manual_seed(seed)
    tokenizer, rng = make_tokenizer(), random.Random(seed)
    splits = make_splits(seed)
    seen = [row for kind in ("retain", "forget") for row in splits[f"train_{kind}"].to_list()]
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=6,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.5e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.5e-3, total_steps=steps, pct_start=0.1)
    progress = tqdm(range(steps), desc="training the small base")
    for _ in progress:
        rows = [training_row(rng, seen) for _ in range(batch_size)]
        ids = [tokenizer(given + answer)["input_ids"] for given, answer in rows]
        width = max(map(len, ids))
        inputs = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in ids])
        last = torch.tensor([len(row) - 1 for row in ids])
        # Every answer is one word, the last token of its row.
        logits = model(
            inputs, attention_mask=inputs.ne(tokenizer.pad_token_id).long(), logits_to_keep=last[:, None] - 1
        )
        loss = torch.nn.functional.cross_entropy(logits.logits[:, 0], inputs.gather(1, last[:, None])[:, 0])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.3f}")
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
