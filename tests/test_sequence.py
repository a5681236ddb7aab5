"""The examples' requests in turn: every method serves after every request, and what is done is not redone."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from helpers import build, rows
from small_requests import small_requests

from spul import SoftPromptUnlearner

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def make_requests(tmp_path, monkeypatch):
    """Two requests on a tiny model, three steps each."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    sys.modules.pop("sequence", None)
    return small_requests(tmp_path)


def test_every_method_serves_after_every_request_and_nothing_is_done_twice(make_requests, tmp_path):
    from sequence import run

    requests, path = make_requests, tmp_path / "requests.jsonl"
    lines = run(requests, path, order=0, extra=lambda model, i: {"seen": i})
    assert [(line["method"], line["requests"]) for line in lines] == [
        (method, after) for method in requests.methods() for after in (1, 2)
    ]
    assert [json.loads(line) for line in path.read_text().splitlines()] == lines
    assert all(line["seen"] == line["requests"] - 1 for line in lines)
    assert all(len(line["test_forget"]) == 2 and line["seconds"] > 0 for line in lines)
    # What nobody has asked to forget yet is kept.
    assert [len(prompts) for prompts in requests.retrained_on] == [10, 6]

    requests.methods = lambda: {"retrained": requests.retrained}
    assert run(requests, path, order=0) == lines
    assert len(requests.retrained_on) == 2
    run(requests, path, order=1)
    assert len(requests.retrained_on) == 4, "another order is another run"


def test_prompts_distilled_one_by_one_go_on_from_the_one_that_is_served(make_requests, monkeypatch, tmp_path):
    import sequence

    requests = make_requests
    requests.train, requests.test = [rows(name, 4) for name in ("jane", "doe", "good")], []
    virtual_tokens, made = sequence.combine.__globals__["virtual_tokens"], []
    really = sequence.combine

    def combine(base, parts, **kwargs):
        names = [Path(part).name for part in parts]
        start = [virtual_tokens(SoftPromptUnlearner.from_pretrained(build("llama"), part)).clone() for part in parts]
        made.append((names, start))
        return really(base, parts, **kwargs)

    monkeypatch.setattr(sequence, "combine", combine)
    served = [virtual_tokens(model).clone() for model, _ in requests.combined("distill one by one")]
    assert [names for names, _ in made] == [["distilled", "prompt-1"], ["distilled", "prompt-2"]]
    for before, (_, (start, _)) in zip(served, made, strict=False):
        torch.testing.assert_close(start, before)


def test_seconds_count_the_training_of_a_requests_own_part_once_it_is_there_too(make_requests):
    requests = make_requests
    folder, seconds = requests.prompt_of(0)
    assert requests.prompt_of(0) == (folder, seconds)
    (_, first), _ = requests.alone("prompt")
    assert first == seconds
    (_, combined), _ = requests.combined("distill")
    assert combined > seconds
