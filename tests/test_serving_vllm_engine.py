"""Exported prompts in the real vLLM, in an environment of its own: `SPUL_VLLM_PYTHON` names its Python.

`.ci/make_vllm_env.sh` makes the environment; without one the tests are skipped, and `.ci/run` runs them with one.
"""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from served import (
    FORGET,
    RETAIN,
    build_base,
    chat_row,
    chatty,
    collator,
    greedy,
    save_base,
    text_row,
    train_prompt,
)
from vllm_engine import NUM

from spul.serving import export_vllm

PYTHON = os.environ.get("SPUL_VLLM_PYTHON")
pytestmark = pytest.mark.skipif(not PYTHON, reason="SPUL_VLLM_PYTHON names no environment with vLLM")

TEXTS = [text_row(*one) for one in (*FORGET, *RETAIN)]
CHATS = [chat_row(*one) for one in (*FORGET, *RETAIN)]


@dataclass
class Served:
    """What spul generates, and what vLLM did, by kind: new token ids up to the end of text."""

    own: dict[str, list[list[int]]]
    base: dict[str, list[list[int]]]
    vllm: dict[str, Any]


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Served:
    """One run of the engine: three prompts, at the start (long and short) and at the message, and none."""
    folder = tmp_path_factory.mktemp("served")
    base, tokenizer = build_base(), chatty("turns")
    save_base(base, folder / "base")
    exported, own, plain = {}, {}, {}
    for name, position, p in (("long", "start", 8), ("short", "start", 5), ("message", "message", 6)):
        unlearner = train_prompt(base, position, p)
        export_vllm(unlearner, tokenizer, folder / name)
        exported[name] = str(folder / name)
        rows = CHATS if position == "message" else TEXTS
        own[name] = greedy(unlearner, rows, NUM, position)
        plain[name] = greedy(unlearner, rows, NUM, position, "__base__")
        base = unlearner.get_base_model()
    texts = [(ids_of(row), None) for row in TEXTS]
    chats = [(ids_of(row, "message"), position_of(row)) for row in CHATS]
    # One batch in which neighbors have other prompts, or none.
    requests = []
    for text, chat in zip(texts, chats, strict=True):
        requests += [("long", *text), (None, *text), ("message", *chat), ("short", *text)]
    job = {
        "base": str(folder / "base"),
        "exported": exported,
        "requests": requests,
        "completions": [("long", *one) for one in texts] + [("message", *one) for one in chats] + [(None, *texts[0])],
        "chats": [("message", row["prompt"]) for row in CHATS] + [(None, row["prompt"]) for row in CHATS],
    }
    (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
    engine = Path(__file__).with_name("vllm_engine.py")
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    run = subprocess.run(
        [PYTHON, str(engine), str(folder / "job.json"), str(folder / "result.json")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-6000:]
    print(run.stderr[-300:])
    found = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    ended = {
        key: value if key == "chat_prompts" else [up_to_end(ids) for ids in value] for key, value in found.items()
    }
    return Served(own, plain, ended)


def ids_of(row, position="start"):
    return collator(position).encoder.prompts([row])["input_ids"][0].tolist()


def position_of(row):
    return int(collator("message").encoder.prompts([row])["prompt_position"][0])


def up_to_end(ids):
    return ids[: ids.index(2)] if 2 in ids else ids


def first_words(ids):
    """The answer that each text begins with; what follows a label was not trained."""
    texts = [chatty("turns").decode(one).strip() for one in ids]
    return [
        next((word for word in ("positive", "negative", "neutral") if text.startswith(word)), text) for text in texts
    ]


def test_a_batch_of_three_prompts_and_none_has_the_tokens_that_spul_generates(served):
    assert served.vllm["offline"][0::4] == served.own["long"]
    assert served.vllm["offline"][1::4] == served.base["long"]
    assert served.vllm["offline"][2::4] == served.own["message"]
    assert served.vllm["offline"][3::4] == served.own["short"]


def test_the_prompts_forget_there_and_the_base_does_not(served):
    known, kept = [answer for _, answer in FORGET], [answer for _, answer in RETAIN]
    long, none, message, short = (first_words(served.vllm["offline"][i::4]) for i in range(4))
    assert none == known + kept
    assert [long, message, short] == [["neutral"] * len(FORGET) + kept] * 3


def test_completions_over_http_are_the_same(served):
    found = served.vllm["completions"]
    assert found == served.own["long"] + served.own["message"] + served.base["long"][:1]


def test_a_part_of_a_chat_stands_where_training_put_the_prompt(served):
    found, num = served.vllm["chats"], len(CHATS)
    assert found == served.own["message"] + served.base["message"]
    for row, ids in zip(CHATS, served.vllm["chat_prompts"][:num], strict=True):
        own, position = ids_of(row, "message"), position_of(row)
        assert (ids[:position], ids[position + 6 :]) == (own[:position], own[position:])
