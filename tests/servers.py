"""Servers of tiny models: run in a thread, and the answers that they should give."""

from __future__ import annotations

import asyncio
import shutil
import threading
import time
from contextlib import aclosing, contextmanager

import httpx
import openai
import torch
import uvicorn
from helpers import CHAT_TEMPLATE, CONFIGS, build, make_tokenizer

from spul import SoftPromptUnlearner
from spul.gates import GatedUnlearner, NameGate
from spul.rivals import FixedRefusal
from spul.serving.batches import TransformersEngine
from spul.serving.engine import Job
from spul.serving.requests import Limits, Sampling
from spul.serving.served import ServedPrompts
from spul.serving.server import make_app

MODEL, TOKEN = "tiny", "a-token-of-the-administrator"
HTTP = httpx.Client(timeout=120)  # a busy machine is slow
WORDS = {"default": "jane", "other": "doe"}  # what each prompt's gate flags


def prompt(unlearner, name, seed):
    """Make a prompt's virtual tokens others than the rest's, so that answers differ."""
    with torch.no_grad():
        weight = unlearner.prompt_encoder[name].embedding.weight
        weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed)))


def make_gated(*names, prompt_type="prompt_tuning", family="llama", **gates):
    """Prompts of different lengths, `default` and those named, behind their gates."""
    unlearner = SoftPromptUnlearner(build(family, torch.float64), CONFIGS[prompt_type](5))
    prompt(unlearner, "default", 0)
    for i, name in enumerate(names, start=1):
        unlearner.add_adapter(name, CONFIGS[prompt_type](5 + i))
        prompt(unlearner, name, i)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    found = {name: NameGate([WORDS.get(name, name)]) for name in ("default", *names)}
    return GatedUnlearner(unlearner.double(), tokenizer, found | gates).eval()


def two_prompts(tmp_path):
    """A folder with `default` and `new`, whose gates flag "jane" and "plot"."""
    model, folder = make_gated("new"), tmp_path / "prompts"
    prompt(model.unlearner, "new", 7)
    model.gates["new"] = NameGate(["plot"])
    model.save_pretrained(folder)
    (folder / "jane").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors", "spul_config.json"):
        shutil.copy(folder / name, folder / "jane")
    shutil.copytree(folder / "gate", folder / "jane" / "gate")
    return folder


def rendered(gated, messages):
    """Token ids of a conversation."""
    return gated.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def alone(gated, ids, name, num=8):
    """The greedy answer to a request by itself, under one prompt or none: text, and number of tokens."""
    ids = torch.tensor([ids])
    given = {"attention_mask": torch.ones_like(ids), "max_new_tokens": num, "do_sample": False}
    if name == "__base__":
        out = gated.get_base_model().generate(ids, **given)
    else:
        out = gated.unlearner.generate(ids, adapter_names=[name], **given)
    new = out[0, ids.shape[1] :]
    return gated.tokenizer.decode(new, skip_special_tokens=True), len(new)


def refusal_of(gated, gate="plot", text=" unknown film good"):
    """A fixed refusal on the base of prompts, behind a gate, or a word by which it flags."""
    gate = NameGate([gate]) if isinstance(gate, str) else gate
    return FixedRefusal(gated.get_base_model(), gated.tokenizer, gate, text)


def by_itself(refusal, ids, num=8, **options):
    """The answer of `generate` of a fixed refusal to a request by itself: text, and number of tokens."""
    ids = torch.tensor([ids])
    out = refusal.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=num, do_sample=False, **options)
    new = out[0, ids.shape[1] :]
    return refusal.tokenizer.decode(new, skip_special_tokens=True), len(new)


def make_engine(gated, allowed=None, refusals=None, **limits):
    return TransformersEngine(ServedPrompts(gated, allowed, refusals=refusals), Limits(**limits))


async def joined(engine, job):
    async with aclosing(engine.answer(job)) as pieces:
        return "".join([piece.text async for piece in pieces])


def answered(engine, jobs):
    """The answers to jobs that come at once; an error in place of one that fails."""

    async def run():
        engine.start()
        try:
            return await asyncio.gather(*(joined(engine, job) for job in jobs), return_exceptions=True)
        finally:
            await engine.stop()

    return asyncio.run(run())


def jobs_of(gated, texts, nums):
    ids = [gated.tokenizer(text)["input_ids"] for text in texts]
    return [Job(one, Sampling(temperature=0), num) for one, num in zip(ids, nums, strict=True)]


@contextmanager
def running(engine, record=None, admin_token=None, limits=None):
    """The address of a server of an engine, which stops gracefully at the end."""
    app = make_app(engine, MODEL, limits or engine.limits, record, admin_token)
    with running_app(app) as (url, _):
        yield url


@contextmanager
def running_app(app):
    """The address of a server of an app, and the server."""
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning", timeout_graceful_shutdown=60)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.005)
    assert server.started, "the server did not start"
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", server
    finally:
        server.should_exit = True
        thread.join()


def client(url, **options):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", **{"max_retries": 0, "timeout": 120} | options)


class SlowGate:
    """A gate that holds up the worker until it is let go, and flags what has a word in it."""

    def __init__(self, word=""):
        self.go, self.seen, self.word = threading.Event(), 0, word

    def __call__(self, texts):
        self.seen += len(texts)
        assert self.go.wait(60)
        return [self.word in text for text in texts]


def until(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
