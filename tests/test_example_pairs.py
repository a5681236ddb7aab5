"""Two requests that overlap or contradict each other: who forgets and retains what, and what is stored."""

from __future__ import annotations

import json

import pytest
from pairs import FIRST, LAYERS, PAIRS, pairs_table, request, run_pairs
from small_requests import small_requests


@pytest.fixture
def requests(tmp_path):
    return small_requests(tmp_path, ("jane", "doe", "good"))


def test_a_request_has_the_rows_of_its_people_and_retains_those_it_is_told_to(requests):
    people = [set(rows["prompt"]) for rows in requests.train]
    retained = set(requests.retain["prompt"])
    for pair, (forget, retain) in PAIRS.items():
        one = request(requests, forget, retain)
        assert set(one.train[0]["prompt"]) == set().union(*(people[i] for i in forget))
        assert set(one.retained(0)["prompt"]) == retained.union(*(people[i] for i in retain)), pair
    assert set(PAIRS["overlapping"][0]) & set(FIRST)
    assert not set(PAIRS["disjoint"][0]) & set(FIRST)
    assert PAIRS["contradicting"] == (PAIRS["disjoint"][0], FIRST)
    assert len({request(requests, *pair).folder for pair in PAIRS.values()}) == 3


def test_both_layers_of_every_pair_are_scored_alone_and_fused_and_nothing_is_done_twice(requests, tmp_path):
    path = tmp_path / "pairs.jsonl"
    lines = run_pairs(requests, path)
    served = [("", "first alone"), *((pair, one) for pair in PAIRS for one in ("second alone", "fused"))]
    assert [(line["layers"], line["pair"], line["served"]) for line in lines] == [
        (kind, *one) for kind in LAYERS for one in served
    ]
    assert all(len(line["test_forget"]) == 3 and 0 <= line["test_retain"] <= 1 for line in lines)
    assert [json.loads(line) for line in path.read_text().splitlines()] == lines
    folders = {request(requests, *one).folder for one in ((FIRST, ()), *PAIRS.values())}
    assert set(tmp_path.glob("pair-*")) == folders  # four requests of each kind of layers, and the first trained once
    requests.base = None  # would be called
    assert run_pairs(requests, path) == lines

    table = pairs_table(lines + [{**line, "seed": 1, "test_retain": 1.0} for line in lines])
    assert len(table.splitlines()) == 2 + len(lines)
    cells = table.splitlines()[2].strip("| ").split(" | ")
    first = f"{100 * lines[0]['test_forget'][0]:.0f}"
    assert cells[3] == f"{first} / {first}"
    assert cells[-1] == f"{50 * (lines[0]['test_retain'] + 1):.1f}"
