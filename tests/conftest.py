"""Fixtures; what they are made of stands in helpers.py."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import pytest
from absl import logging as absl_logging
from datasets import Dataset
from encoded import word_level
from helpers import CHAT_TEMPLATE, CONFIGS, FAMILIES, make_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import spul.data.sources
import spul.evaluation.aggregation
import spul.training.reference

# rouge-score imports absl, which closes the stream that it took for stderr, pytest's, when uvicorn configures logging.
absl_logging.get_absl_handler().python_handler.stream = sys.__stderr__


@pytest.fixture(autouse=True, scope="module")
def imports_out_of_collections():
    """Every training collects garbage several times, each time through all that was ever imported, unless frozen.

    Once a module, since compiling and drawing import a lot on first use.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def cache_home(tmp_path_factory):
    """Cached references go to a folder of the tests' own, also in the processes that they start."""
    home = str(tmp_path_factory.mktemp("hf_home"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", home)
        patch.setattr(spul.training.reference, "HF_HOME", home)
        yield home


@pytest.fixture
def examples(monkeypatch) -> Path:
    """The folder of the examples, whose programs and packages can then be imported."""
    folder = Path(__file__).parents[1] / "examples"
    monkeypatch.syspath_prepend(str(folder))
    return folder


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of 120 pieces: words of several tokens, no pad token."""
    return make_tokenizer()


@pytest.fixture
def words() -> PreTrainedTokenizerFast:
    """The words a..j are 3..12, ":" is 13, and n, u, z are 14, 15, 16."""
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *"abcdefghij:nuz"])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture
def ten() -> PreTrainedTokenizerFast:
    """The words a..j are 3..12."""
    return word_level(*"abcdefghij")


@pytest.fixture
def chatty(tokenizer):
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@pytest.fixture(params=CONFIGS)
def prompt_type(request) -> str:
    return request.param


@pytest.fixture
def hub(monkeypatch):
    """The contents of the Hub: (name, configuration, split) -> rows; anything else is an error."""
    sets: dict[tuple[str, str | None, str], list[dict]] = {}
    monkeypatch.setattr(
        spul.data.sources, "load_dataset", lambda name, config, *, split: Dataset.from_list(sets[name, config, split])
    )
    return sets


@pytest.fixture
def few_resamples(monkeypatch):
    """For evaluations whose intervals are not looked at: these have tests of their own."""
    monkeypatch.setattr(spul.evaluation.aggregation, "NUM_RESAMPLES", 20)
