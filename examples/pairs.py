"""Two requests that are disjoint, overlap or contradict each other: the layers of each, and both fused.

`five_requests.py --pairs` runs it on the quick start's small model, with three of its people:

| pair | first request forgets | second forgets | second retains |
|---|---|---|---|
| disjoint | 1 and 2 | 3 | the retain rows |
| overlapping | 1 and 2 | 2 and 3 | the retain rows |
| contradicting | 1 and 2 | 3 | the retain rows, and those of 1 and 2 |
"""

from __future__ import annotations

import dataclasses
import gc
import json
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

from datasets import concatenate_datasets
from sequence import Requests
from tqdm.auto import tqdm

from spul import UnlearningLayers, fuse

FIRST = (0, 1)
PAIRS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "disjoint": ((2,), ()),
    "overlapping": ((1, 2), ()),
    "contradicting": ((2,), FIRST),
}
"""By pair: the people that the second request forgets, and those that it retains."""
LAYERS = {"wide": True, "published shape": False}
NUM_PEOPLE = 3


def request(requests: Requests, forget: tuple[int, ...], retain: tuple[int, ...] = ()) -> Requests:
    """One request of some people, which sees no rows of others but those it retains."""
    name = "-".join(map(str, forget)) + (f"-keeps-{'-'.join(map(str, retain))}" if retain else "")
    return dataclasses.replace(
        requests,
        train=[concatenate_datasets([requests.train[i] for i in forget])],
        retain=concatenate_datasets([requests.retain, *(requests.train[i] for i in retain)]),
        folder=requests.folder / f"pair-{name}",
    )


def models(requests: Requests, wide: bool) -> Iterator[tuple[str, str, Any, float]]:
    """Pair, requests served, model and seconds: the layers of each request alone, and of each pair fused."""
    method = requests.generic_layers
    first, seconds = request(requests, FIRST).layers_of(0, method, wide)
    yield "", "first alone", UnlearningLayers.from_pretrained(requests.base(), first), seconds
    for pair, (forget, retain) in PAIRS.items():
        second, seconds = request(requests, forget, retain).layers_of(0, method, wide)
        yield pair, "second alone", UnlearningLayers.from_pretrained(requests.base(), second), seconds
        start = time.perf_counter()
        yield pair, "fused", fuse([first, second], requests.base()), time.perf_counter() - start


def run_pairs(requests: Requests, path: Path) -> list[dict[str, Any]]:
    """Run both kinds of layers and store a JSON line for each model; a complete kind is not repeated.

    Args:
        requests: at least three people, one a request.
        path: the file of results.
    """
    people = dataclasses.replace(requests, train=requests.train[:NUM_PEOPLE], test=requests.test[:NUM_PEOPLE])
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    for kind, wide in LAYERS.items():
        key = {"layers": kind, "seed": requests.seed, "settings": requests.settings}
        if any({name: line[name] for name in key} == key for line in lines):
            continue
        found = []
        for pair, served, model, seconds in models(requests, wide):
            scores = people.score(model, 0)
            found.append({"pair": pair, "served": served, **key, "seconds": seconds, **scores})
            forgotten = ", ".join(f"{100 * share:.0f}" for share in scores["test_forget"])
            tqdm.write(f"{kind}, {pair or 'both'}, {served}: {forgotten}; retain {100 * scores['test_retain']:.1f}")
            del model
            gc.collect()
        lines += found
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return lines


def pairs_table(lines: list[dict[str, Any]]) -> str:
    """A Markdown table: accuracy in % on the test rows of each person and on retain rows, by seed, and the means."""
    heads = ("layers", "pair", "served", *(f"person {i + 1}" for i in range(NUM_PEOPLE)), "retain")
    rows = ["| " + " | ".join(heads) + " |", "| --- | --- | --- |" + " ---: |" * (NUM_PEOPLE + 1)]
    for key in dict.fromkeys((line["layers"], line["pair"], line["served"]) for line in lines):
        mine = [line for line in lines if (line["layers"], line["pair"], line["served"]) == key]
        values = [[line["test_forget"][i] for line in mine] for i in range(NUM_PEOPLE)]
        cells = [" / ".join(f"{100 * value:.0f}" for value in one) for one in values]
        cells.append(f"{100 * mean(line['test_retain'] for line in mine):.1f}")
        rows.append("| " + " | ".join([*key, *cells]) + " |")
    return "\n".join(rows)
