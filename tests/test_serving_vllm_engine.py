"""Exported prompts in the real vLLM, and `spul serve` in front of it.

vLLM has an environment of its own, whose Python `SPUL_VLLM_PYTHON` names; `.ci/make_vllm_env.sh` makes it. Without one
the tests are skipped, and `.ci/run` runs them with one.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
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
from servers import client, running_app
from transformers import HfArgumentParser
from vllm_engine import NUM

from spul.commands import serve
from spul.gates import NameGate
from spul.rivals.refusal import write_refusal
from spul.serving import export_vllm

PYTHON = os.environ.get("SPUL_VLLM_PYTHON")
pytestmark = pytest.mark.skipif(not PYTHON, reason="SPUL_VLLM_PYTHON names no environment with vLLM")

TEXTS = [text_row(*one) for one in (*FORGET, *RETAIN)]
CHATS = [chat_row(*one) for one in (*FORGET, *RETAIN)]


@dataclass
class Served:
    """Answers of spul and of vLLM, by kind: new token ids up to the end of text. vLLM goes on at `url`."""

    folder: Path
    url: str
    own: dict[str, list[list[int]]]
    base: dict[str, list[list[int]]]
    vllm: dict[str, Any]


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Iterator[Served]:
    """One run of the engine: three prompts, at the start (long and short) and at the message, and none."""
    folder = tmp_path_factory.mktemp("served")
    base, tokenizer = build_base(), chatty("turns")
    save_base(base, folder / "base")
    exported, own, plain = {}, {}, {}
    for name, position, p in (("long", "start", 8), ("short", "start", 5), ("message", "message", 6)):
        unlearner = train_prompt(base, position, p)
        export_vllm(unlearner, tokenizer, folder / name)
        exported[name] = str(folder / name)
        unlearner.save_pretrained(str(folder / "prompts" / name))
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
    command = [PYTHON, str(engine), str(folder / "job.json"), str(folder / "result.json")]
    log = folder / "log"
    with log.open("w") as said:
        run = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=said, stderr=said)
    try:
        end = time.monotonic() + 500
        while not (folder / "result.json").exists():
            is_running = run.poll() is None and time.monotonic() < end
            assert is_running, log.read_text()[-6000:]
            time.sleep(0.5)
        found = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        url = found.pop("url")
        ended = {
            key: value if key == "chat_prompts" else [up_to_end(ids) for ids in value] for key, value in found.items()
        }
        yield Served(folder, url, own, plain, ended)
    finally:
        run.stdin.close()  # it ends
        try:
            run.wait(60)
        except subprocess.TimeoutExpired:
            run.kill()


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


def proxied(served, gates, ask, rows, refusals=()):
    """The words and number of tokens with which `spul serve` in front of vLLM answers, all requests at once."""
    prompts = [f"{folder.name}={folder}" for folder in refusals]
    for name, names in gates.items():
        NameGate(names).save(served.folder / "prompts" / name / "gate")
        prompts.append(f"{name}={served.folder / 'prompts' / name}")
    arguments = ["--model", str(served.folder / "base"), "--engine", "vllm", "--vllm_url", served.url, "--prompts"]
    (options,) = HfArgumentParser(serve.COMMANDS[""].options).parse_args_into_dataclasses(arguments + prompts)
    app, _ = serve.build(options)
    settings = {"model": "base", "temperature": 0, "max_tokens": NUM}
    with running_app(app) as (url, _), ThreadPoolExecutor(len(rows)) as pool:
        answers = list(pool.map(lambda row: ask(client(url), row, settings), rows))
    return [(text.split(), answer.usage.prompt_tokens) for text, answer in answers]


def words(ids):
    return chatty("turns").decode(ids, skip_special_tokens=True).split()


def complete(client, row, settings):
    answer = client.completions.create(prompt=row["prompt"], **settings)
    return answer.choices[0].text, answer


def chat(client, row, settings):
    answer = client.chat.completions.create(messages=row["prompt"], **settings)
    return answer.choices[0].message.content, answer


def test_spul_serve_in_front_of_it_gives_each_request_the_prompt_of_its_gate(served):
    gates = {"long": ["jane doe", "bob plot"], "short": ["jane text"]}
    found = proxied(served, gates, complete, TEXTS)
    kinds = [served.own["long"], served.own["short"], served.base["long"], served.own["long"], served.base["long"]]
    expected = [(words(kind[i]), len(ids_of(TEXTS[i]))) for i, kind in enumerate(kinds)]
    assert found == expected
    assert all(answer[0].startswith("neutral") for answer, _ in found[:2])
    found = proxied(served, {"message": ["jane doe", "bob plot"]}, chat, CHATS)
    is_flagged = [True, False, False, True, False]
    kinds = [served.own["message"] if flag else served.base["message"] for flag in is_flagged]
    assert found == [(words(kind[i]), len(ids_of(CHATS[i], "message"))) for i, kind in enumerate(kinds)]


@pytest.mark.parametrize(("ask", "rows", "position"), [(complete, TEXTS, "start"), (chat, CHATS, "message")])
def test_a_fixed_refusal_before_it_answers_what_its_gate_flags_and_nothing_else(served, tmp_path, ask, rows, position):
    name = {"start": "long", "message": "message"}[position]
    folder = tmp_path / "no-plot"
    folder.mkdir()
    write_refusal(folder, NameGate(["bob plot"]), " neutral film")
    flags = [True, False, False, None, False]  # by the prompt's gate; of the fourth it is the refusal's
    answers = [(served.own[name] if flag else served.base[name])[i] for i, flag in enumerate(flags)]
    expected = [(words(ids), len(ids_of(row, position))) for ids, row in zip(answers, rows, strict=True)]
    assert expected[3][0][0] == "positive", "what vLLM answers there"
    expected[3] = (["neutral", "film"], expected[3][1])
    assert proxied(served, {name: ["jane doe"]}, ask, rows, [folder]) == expected
    alone = [served.base[name][i] for i in range(len(rows))]
    expected[:3] = [(words(ids), len(ids_of(row, position))) for ids, row in zip(alone[:3], rows[:3], strict=True)]
    assert proxied(served, {}, ask, rows, [folder]) == expected  # of refusals alone, too
