"""Adapter folders of every odd kind: a load gives the saved prompt, or a clear error and everything as it was before.

Mutated are `adapter_config.json` and `spul_config.json`, by fields and by bytes, and the bytes of the weights.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import tracemalloc
import warnings
from functools import cache
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import transformers
from helpers import build, build_unlearner, make_batch, state_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spul import SoftPromptUnlearner

CONFIG, RECORD, WEIGHTS = "adapter_config.json", "spul_config.json", "adapter_model.safetensors"
PROMPT_TYPES = ("prompt_tuning", "p_tuning", "prefix_tuning")
NAMED = re.compile(r"adapter|spul_config|config|num_|token_dim|peft_type|task_type")
IDS = make_batch()["input_ids"]
BOUNDED = settings(
    max_examples=40, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)

ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 40),
    st.sampled_from([2**31, 2 * 10**7, 2**63, 2**70, -(2**70), 1e308, 0.5, float("nan"), float("inf"), -0.0]),
    st.sampled_from(
        ["", "5", "RANDOM", "TEXT", "CAUSAL_LM", "LORA", "P_TUNING", "PREFIX_TUNING", "somebody/else", "é"]
    ),
    st.text(max_size=8),
    st.lists(st.one_of(st.integers(), st.text(max_size=2), st.none()), max_size=3),
    st.recursive(
        st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
        lambda inner: st.dictionaries(st.text(max_size=3), inner, max_size=2),
        max_leaves=4,
    ),
)


@cache
def saved(prompt_type):
    """The files of a saved prompt, by name."""
    with tempfile.TemporaryDirectory() as folder:
        model = build_unlearner("llama", prompt_type, torch.float32)
        model.spul_config.metrics = {"test": {"accuracy": 0.5}}
        model.save_pretrained(folder)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@cache
def models(prompt_type):
    """A base, an unlearner that is used and one that trains, their states, and what the saved prompt answers."""
    folder = written(saved(prompt_type))
    base, used, live = (build("llama").train() for _ in range(3))
    used = SoftPromptUnlearner.from_pretrained(used, folder)
    live = SoftPromptUnlearner.from_pretrained(live, folder, is_trainable=True)
    expected = SoftPromptUnlearner.from_pretrained(build("llama"), folder)(input_ids=IDS).logits
    shutil.rmtree(folder)
    return [(model, state_of(model)) for model in (base, used, live)], expected


def written(files):
    folder = Path(tempfile.mkdtemp())
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def fields_of(prompt_type, name):
    return sorted(json.loads(saved(prompt_type)[name]))


def mutated(data, changes, dropped, twice):
    """JSON text with changed, unknown, missing and repeated fields; NaN and Infinity as Python writes them."""
    data = {key: value for key, value in {**data, **changes}.items() if key not in dropped}
    text = json.dumps(data)
    if twice is not None:
        text = text[:-1] + ("," if data else "") + json.dumps(twice[0]) + ":" + json.dumps(twice[1]) + "}"
    return text.encode("utf-8", "surrogatepass")


@st.composite
def mutations(draw, name):
    """A prompt type, and the bytes of a file of its folder."""
    prompt_type = draw(st.sampled_from(PROMPT_TYPES))
    content = saved(prompt_type)[name]
    kind = draw(st.sampled_from(["fields", "fields", "fields", "bytes", "cut", "other"]))
    if kind == "bytes":
        at = draw(st.integers(0, len(content) - 1))
        content = content[:at] + draw(st.binary(min_size=1, max_size=3)) + content[at + 1 :]
    elif kind == "cut":
        content = content[: draw(st.integers(0, len(content)))]
    elif kind == "other":
        content = draw(
            st.sampled_from(
                [b"", b"null", b"5", b"[]", b'"a"', b"\xff\xfe{}", b"[" * 3000, b"{" * 3000, b"NaN", b"{}"]
            )
        )
    else:
        keys = st.one_of(st.sampled_from(fields_of(prompt_type, name)), st.text(max_size=5))
        content = mutated(
            json.loads(content),
            draw(st.dictionaries(keys, ODD, max_size=2)),
            draw(st.sets(st.sampled_from(fields_of(prompt_type, name)), max_size=1)),
            draw(st.one_of(st.none(), st.tuples(keys, ODD))),
        )
    return prompt_type, content


def refuse(*args, **kwargs):
    raise AssertionError(f"fetched: {args} {kwargs}")


def check(prompt_type, name, content):
    """Every way to load: refused by name and nothing changed, or the prompt that was saved."""
    folder = written({**saved(prompt_type), name: content})
    loads = [  # with the number of the model in `models` that each may change
        (0, lambda base: SoftPromptUnlearner.from_pretrained(base, folder)),
        (0, lambda base: SoftPromptUnlearner.from_pretrained(base, folder, is_trainable=True)),
        (1, lambda used: loaded_into(used, folder, "second")),
        (1, lambda used: loaded_into(used, folder, "default")),
        (2, lambda live: loaded_into(live, folder, "default", is_trainable=True)),
    ]
    try:
        for way, (number, load) in enumerate(loads):
            (model, before), expected = models(prompt_type)[0][number], models(prompt_type)[1]
            loaded = attempt(lambda model=model, load=load: load(model), folder)
            if loaded is None:
                assert state_of(model) == before, f"way {way}: changed by a load that failed"
                continue
            models.cache_clear()  # this one was changed by loading
            torch.testing.assert_close(loaded.eval()(input_ids=IDS).logits, expected)
            loaded.save_pretrained(str(folder / "again"))
    finally:
        shutil.rmtree(folder)


def loaded_into(model, folder, name, **options):
    model.load_adapter(folder, name, **options)
    model.set_adapter(name)
    return model


def attempt(load, folder):
    """Its prompt; None if its error names what is wrong. Nothing is fetched, nor much memory asked for."""
    tracemalloc.start()
    try:
        with (
            warnings.catch_warnings(),
            patch("socket.socket.connect", refuse),
            patch("spul.records.files.hf_hub_download", refuse),
            patch.object(transformers.AutoTokenizer, "from_pretrained", refuse),
        ):
            warnings.simplefilter("ignore")
            return load()
    except (ValueError, TypeError) as found:
        error = found
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 50 * 2**20
    assert str(folder) in str(error) or NAMED.search(str(error)), f"names neither file nor field: {error!r}"
    return None


@BOUNDED
@given(mutation=mutations(CONFIG))
def test_an_odd_adapter_config_loads_the_saved_prompt_or_is_refused(mutation):
    check(mutation[0], CONFIG, mutation[1])


@BOUNDED
@given(mutation=mutations(RECORD))
def test_an_odd_record_loads_the_saved_prompt_or_is_refused(mutation):
    check(mutation[0], RECORD, mutation[1])


@BOUNDED
@given(data=st.data(), prompt_type=st.sampled_from(PROMPT_TYPES), cut=st.booleans())
def test_no_flipped_bit_and_no_cut_of_the_weights_is_loaded(data, prompt_type, cut):
    content = saved(prompt_type)[WEIGHTS]
    if cut:
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        bit = data.draw(st.integers(0, 8 * len(content) - 1))
        content = content[: bit // 8] + bytes([content[bit // 8] ^ 1 << bit % 8]) + content[bit // 8 + 1 :]
    folder = written({**saved(prompt_type), WEIGHTS: content})
    base, before = models(prompt_type)[0][0]
    with pytest.raises(ValueError, match=re.escape(WEIGHTS)):
        SoftPromptUnlearner.from_pretrained(base, folder)
    assert state_of(base) == before
    shutil.rmtree(folder)


@pytest.mark.parametrize("prompt_type", PROMPT_TYPES)
def test_files_as_they_were_saved_load(prompt_type):
    """The fuzz above does not hold by refusing all."""
    folder = written(saved(prompt_type))
    expected = models(prompt_type)[1]
    torch.testing.assert_close(
        SoftPromptUnlearner.from_pretrained(build("llama"), folder)(input_ids=IDS).logits, expected
    )
    shutil.rmtree(folder)
