"""Seconds and memory of preparing many rows: joining sets, splitting by name, opening the trainer.

python examples/benchmarks/prepare_rows.py --rows 1000000 --rounds 3

`plain` is what the library once did: columns and rows read one value at a time, every name tried at each word that it
begins with, all texts in memory.
"""

from __future__ import annotations

import functools
import hashlib
import hmac
import json
import re
import statistics
import tempfile
from collections import Counter
from collections.abc import Callable
from typing import Any

import common
from datasets import Dataset, concatenate_datasets, disable_progress_bars
from paper.costs import PeakMemory
from transformers import TrainingArguments

from spul import ForgetRetainCollator, SoftPromptUnlearner, UnlearningTrainer, forget_retain_dataset
from spul.data import split_by_entity
from spul.data.recognizers import normalized_name
from spul.records.digests import DataSummary

TASKS = ("join", "split", "trainer")
TITLES = {
    "join": "forget_retain_dataset",
    "split": "split_by_entity, 1,000 names",
    "trainer": "UnlearningTrainer(...)",
}
FIRST_NAMES, LAST_NAMES, WORDS = 50, 20, 12
DIGEST_KEY = bytes(32)  # a public one: these rows are no secret
NAMES = [f"First{i} Last{j}" for i in range(FIRST_NAMES) for j in range(LAST_NAMES)]
# Of so many rows one names somebody to forget; every other row has a first name.
NAMED_EVERY = 20
GENERIC = [" t0", " t4"]


def make_texts(num: int) -> list[str]:
    """Reviews of a dozen words; half of them have a first name of `NAMES`, some the whole name."""
    texts = []
    for i in range(num):
        words = [f"t{(7 * i + 13 * j) % 150 + 5}" for j in range(WORDS)]
        if i % NAMED_EVERY == 0:
            words[5:5] = NAMES[i // NAMED_EVERY % len(NAMES)].lower().split()
        elif i % 2 == 0:
            words[5:5] = [f"first{i // 2 % FIRST_NAMES}", f"last{LAST_NAMES + i}"]
        texts.append(f"{i} {' '.join(words)}")
    return texts


def plain_join(forget: Dataset, retain: Dataset) -> Dataset:
    prompts: list[list[str]] = []
    for rows in (forget, retain):
        prompts.append([])
        for prompt, completion in zip(rows["prompt"], rows["completion"], strict=True):
            if not isinstance(prompt, str) or not isinstance(completion, str) or not completion.strip():
                raise ValueError("a row has no prompt or no completion")
            prompts[-1].append(prompt)
    retained = {text: i for i, text in reversed(list(enumerate(prompts[1])))}
    if any(text in retained for text in prompts[0]):
        raise ValueError("a prompt is in both sets")
    joined = concatenate_datasets(
        [
            rows.add_column("is_forget", [is_forget] * len(rows))
            for rows, is_forget in ((forget, True), (retain, False))
        ]
    )
    return joined.add_column("row_id", list(range(len(joined))))


def plain_split(rows: Dataset, names: list[str]) -> tuple[Dataset, Dataset]:
    token, by_first_token = re.compile(r"\w+|[^\w\s]"), dict[str, list[str]]()
    for name in map(normalized_name, names):
        by_first_token.setdefault(token.findall(name)[0], []).append(name)

    def in_word(character: str) -> bool:
        return character.isalnum() or character == "_"

    def find(text: str) -> set[str]:
        text = normalized_name(text)
        return {
            name
            for found in token.finditer(text)
            for name in by_first_token.get(found.group(), ())
            if text.startswith(name, found.start())
            and not in_word(text[: found.start()][-1:])
            and not in_word(text[found.start() + len(name) :][:1])
        }

    texts = [[text] for text in list(rows["text"])]
    matches: list[set[str]] = [set().union(*(find(part) for part in parts)) for parts in texts]
    counts = Counter(name for found in matches for name in found)
    if not counts:
        raise ValueError("no name is found")
    forget = rows.select([i for i, found in enumerate(matches) if found])
    return forget, rows.select([i for i, found in enumerate(matches) if not found])


def plain_descriptions(rows: Dataset, generic_completions: list[str]) -> tuple[DataSummary, DataSummary]:
    flags = [bool(flag) for flag in rows["is_forget"]]
    generic = {text.strip().casefold() for text in generic_completions}
    if any(completion.strip().casefold() in generic for completion in rows["completion"]):
        raise ValueError("a completion is generic")

    def summary(group: bool) -> DataSummary:
        digests = []
        for row in (rows[i] for i, flag in enumerate(flags) if flag == group):
            content = json.dumps([row["prompt"], row["completion"]], sort_keys=True, ensure_ascii=False)
            digests.append(hashlib.sha256(content.encode()).digest())
        return DataSummary(len(digests), hmac.new(DIGEST_KEY, b"".join(sorted(digests)), hashlib.sha256).hexdigest())

    return summary(True), summary(False)


def make_tasks(args: Any, num: int, folder: str) -> dict[str, dict[str, Callable[[], Any]]]:
    """Each task as a function of spul's and a plain one, with the same result."""
    texts = make_texts(num)
    completions = [f" t{i % 2 + 10}" for i in range(num)]
    rows = Dataset.from_dict({"prompt": texts, "completion": completions, "text": texts})
    del texts, completions
    forget, retain = rows.select(range(num // 10)), rows.select(range(num // 10, num))
    joined = forget_retain_dataset(forget, retain)
    base = common.build_model(args.model, args.device, common.dtype_of(args))
    collator = ForgetRetainCollator(common.make_tokenizer(base.config.vocab_size), GENERIC, max_length=32)
    settings = TrainingArguments(folder, use_cpu=args.device == "cpu", report_to=[], disable_tqdm=True)
    unlearner = SoftPromptUnlearner(base, common.prompt_config("prompt-tuning", 5))

    def open_trainer(training_rows: Dataset) -> tuple[DataSummary | None, DataSummary | None]:
        UnlearningTrainer(unlearner, settings, collator, training_rows, digest_key=DIGEST_KEY)
        return unlearner.spul_config.forget, unlearner.spul_config.retain

    def plain_trainer() -> tuple[DataSummary, DataSummary]:
        found = plain_descriptions(joined, GENERIC)
        open_trainer(joined.select([0, num - 1]))  # the rest of the constructor
        return found

    def split() -> tuple[Dataset, Dataset]:
        found = split_by_entity(rows, NAMES)
        return found.forget, found.retain

    return {
        "join": {
            "spul": functools.partial(forget_retain_dataset, forget, retain),
            "plain": functools.partial(plain_join, forget, retain),
        },
        "split": {"spul": split, "plain": functools.partial(plain_split, rows, NAMES)},
        "trainer": {"spul": functools.partial(open_trainer, joined), "plain": plain_trainer},
    }


def main() -> None:
    parser = common.arguments(__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--memory-only", choices=("spul", "plain"), help="print the peak memory of one task as JSON")
    parser.set_defaults(model="tiny", device="cpu", rounds=3)
    args = parser.parse_args()
    disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        if args.memory_only:
            call = make_tasks(args, args.rows, folder)[args.tasks[0]][args.memory_only]
            with PeakMemory("cpu") as peak:
                call()
            print(json.dumps(peak.bytes))
            return
        for few in make_tasks(args, 2_000, folder).values():  # imports, first calls
            for call in few.values():
                call()
        tasks = make_tasks(args, args.rows, folder)
        seconds = {task: common.alternate(tasks[task], args.rounds, args.device, warmup=0) for task in args.tasks}
    del tasks
    records = []
    for task, times in seconds.items():
        for step, each in times.items():
            options = ["--memory-only", step, "--tasks", task, "--rows", str(args.rows), "--model", args.model]
            options += ["--device", args.device, *(["--dtype", args.dtype] if args.dtype else [])]
            peak_bytes = common.in_fresh_process(__file__, options)
            record = {"task": task, "step": step, "seconds": statistics.median(each), "all_seconds": each}
            records.append({**record, "peak_bytes": peak_bytes})
    where = {**common.surroundings(args), "rows": args.rows}
    shown = [[TITLES[r["task"]], r["step"], r["seconds"], r["peak_bytes"] / 1e6] for r in records]
    common.report("Preparing rows", where, ["task", "step", "seconds", "peak memory, MB"], shown)
    ratios = {task: common.ratio(times["plain"], times["spul"]) for task, times in seconds.items()}
    for task, value in ratios.items():
        print(f"\n{TITLES[task]}: plain / spul {value:.1f}")
    common.write_json(args.json, {"where": where, "records": records, "ratios": ratios})


if __name__ == "__main__":
    main()
