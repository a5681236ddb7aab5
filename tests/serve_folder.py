"""A folder of what `spul serve` serves, its options, and a recorder of events by name."""

from __future__ import annotations

import shutil

import torch
from helpers import CHAT_TEMPLATE, build, make_tokenizer
from servers import make_gated, refusal_of
from transformers import HfArgumentParser

from spul.commands.serve import COMMANDS

EVENTS = []


def record(event):
    EVENTS.append(event)


def write_served(found):
    """A base in `tiny`, in `prompts` two prompts of it behind gates, and in `no` a fixed refusal."""
    build("llama", torch.float64).save_pretrained(found / "tiny")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(found / "tiny")
    make_gated("other").save_pretrained(found / "prompts")
    shutil.copytree(found / "prompts" / "other", found / "no-gate")
    shutil.rmtree(found / "no-gate" / "gate")
    refusal_of(make_gated(), "film").save_pretrained(found / "no")
    (found / "token").write_text("\ufeffa-token-of-the-administrator\n", encoding="utf-8")
    (found / "empty").write_text("")
    (found / "utf-16").write_text("a-token-of-the-administrator", encoding="utf-16")
    (found / "two-lines").write_text("a-token\nof-the-administrator")
    return found


def options(folder, *arguments):
    given = [str(one).replace("@", f"{folder}/") for one in arguments]
    [found] = HfArgumentParser(COMMANDS[""].options).parse_args_into_dataclasses(["--model", f"{folder}/tiny", *given])
    return found
