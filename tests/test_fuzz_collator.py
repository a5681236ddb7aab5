"""Rows of every odd kind: the collator refuses them by a message that names row or column, or its batch is right."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pages import make_tokenizer

from spul import ForgetRetainCollator

GENERIC = [" neutral", " unknown"]
COLUMNS = ("prompt", "completion", "is_forget", "row_id", "input_ids", "completion_mask", "num_ending", "generic_ids")
NAMED = re.compile(r"\brows?\b|" + "|".join(COLUMNS))
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content.strip() }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TOKENIZER = make_tokenizer()
TOKENIZER.chat_template = TEMPLATE
BOS = TOKENIZER.bos_token

ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.binary(max_size=3),
    st.lists(st.one_of(st.integers(-2, 600), st.none(), st.text(max_size=3)), max_size=4),
    st.dictionaries(st.text(max_size=3), st.none(), max_size=2),
    st.sampled_from([np.float32(1), np.int64(1), np.array([1, 2]), torch.tensor(1), torch.tensor([[1]]), 2**70, {1}]),
    st.just("\ud800"),
)
TEXT = st.one_of(
    st.text(max_size=30),
    st.text(alphabet=st.characters(codec="utf-8"), max_size=200),
    st.sampled_from(
        ["", " ", BOS, f"{BOS} jane", f"{BOS}{BOS}a", " positive", "a\x00b", "é", "日本", "👩‍👩‍👧", "x" * 300]
    ),
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.one_of(st.sampled_from(["user", "assistant", "tool"]), ODD), "content": st.one_of(TEXT, ODD)}
)
MESSAGES = st.lists(
    st.one_of(st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": TEXT}), MESSAGE, ODD),
    max_size=3,
)
IDS = st.lists(st.integers(0, 499), max_size=6)
FLAG = st.one_of(st.booleans(), st.sampled_from([0, 1, np.bool_(True), torch.tensor(0)]))
EXTRA = {"row_id": st.one_of(st.integers(0, 9), ODD), "copy": st.integers(0, 2), "other": ODD, 5: ODD}


def row_of(fields):
    return st.fixed_dictionaries(fields, optional=EXTRA)


GOOD_TEXT = row_of({"prompt": TEXT, "completion": TEXT, "is_forget": FLAG})
CHAT = row_of({"prompt": MESSAGES, "completion": MESSAGES, "is_forget": FLAG})
TOKENIZED = st.tuples(IDS, IDS, FLAG).map(
    lambda t: {"input_ids": t[0] + t[1], "completion_mask": [0] * len(t[0]) + [1] * len(t[1]), "is_forget": t[2]}
)
ANY = st.fixed_dictionaries(
    {},
    optional={
        "prompt": st.one_of(TEXT, MESSAGES, ODD),
        "completion": st.one_of(TEXT, MESSAGES, ODD),
        "is_forget": st.one_of(FLAG, ODD),
        "input_ids": st.one_of(IDS, ODD),
        "completion_mask": st.one_of(st.lists(st.integers(0, 1), max_size=6), ODD),
        "num_ending": ODD,
        "generic_ids": st.one_of(st.lists(IDS, max_size=3), ODD),
        **EXTRA,
    },
)
ROWS = st.one_of(
    st.lists(GOOD_TEXT, min_size=1, max_size=3),
    st.lists(st.one_of(GOOD_TEXT, CHAT, TOKENIZED), max_size=3),
    st.lists(st.one_of(ANY, ODD), max_size=2),
    ODD,
)
BOUNDED = settings(
    max_examples=1000, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


def made(make):
    """The batch that it makes; None if it refuses by a message that names a row or a column."""
    try:
        return make()
    except (ValueError, TypeError) as found:
        error = found
    assert NAMED.search(str(error)), f"names neither row nor column: {error!r}"
    assert len(str(error)) < 1500, "shows a row at its whole length"
    return None


def collated(collator, rows):
    """The batch; None if the rows are refused by a message that names a row or a column."""
    return made(lambda: collator(rows))


def answers(row, is_forget, generic):
    """The texts that a row's labels may decode to."""
    if is_forget and generic is not None:
        return generic
    if "input_ids" in row:
        mask = list(row["completion_mask"])
        return [TOKENIZER.decode([i for i, own in zip(row["input_ids"], mask, strict=True) if own])]
    completion = row["completion"]
    return [completion if isinstance(completion, str) else completion[-1]["content"]]


def check(batch, rows, generic, max_length, multiple):
    ids, mask, labels = (batch[name] for name in ("input_ids", "attention_mask", "labels"))
    assert ids.shape == mask.shape == labels.shape
    assert {tensor.dtype for tensor in (ids, mask, labels)} == {torch.int64}
    assert (len(ids), ids.shape[1] % (multiple or 1)) == (len(rows), 0)
    assert (mask.diff(dim=1) <= 0).all()  # right-padded
    assert mask.sum(1).max() <= max_length
    assert batch["is_forget"].dtype == torch.bool
    assert batch["is_forget"].tolist() == [bool(row["is_forget"]) for row in rows]
    assert ("row_id" in batch) == all("row_id" in row for row in rows)
    for i, row in enumerate(rows):
        num = int(mask[i].sum())
        is_label = labels[i] != -100
        assert not is_label[num:].any()  # labels only where there is attention
        assert torch.equal(labels[i][is_label], ids[i][is_label])
        first = int(is_label.nonzero()[0])
        assert first > 0  # something to answer to
        assert is_label[first:num].all()
        if "input_ids" not in row:
            given = row["prompt"] if isinstance(row["prompt"], str) else ""
            count = 0
            while given.startswith(BOS * (count + 1)):
                count += 1
            leading = next(
                (j for j, token in enumerate(ids[i, :first].tolist()) if token != TOKENIZER.bos_token_id), first
            )
            assert leading <= max(1, count)
        decoded = TOKENIZER.decode(labels[i][is_label].tolist())
        expected = answers(row, batch["is_forget"][i], generic)
        if "input_ids" in row or isinstance(row["prompt"], str):
            assert decoded in expected
        else:
            assert decoded.removesuffix("</s>").strip() in [text.strip() for text in expected]


@BOUNDED
@given(
    rows=ROWS,
    generic=st.sampled_from([GENERIC, None]),
    max_length=st.sampled_from([8, 24, 512]),
    multiple=st.sampled_from([None, 8]),
    text_field=st.sampled_from([None, None, "prompt", "other"]),
)
def test_rows_are_refused_by_name_or_make_a_right_batch(rows, generic, max_length, multiple, text_field):
    collator = ForgetRetainCollator(TOKENIZER, generic, max_length, text_field=text_field, pad_to_multiple_of=multiple)
    batch = collated(collator, rows)
    if batch is not None:
        check(batch, list(rows), generic, max_length, multiple)


@BOUNDED
@given(row=st.one_of(GOOD_TEXT, CHAT), max_length=st.sampled_from([24, 512]))
def test_a_row_tokenized_ahead_makes_the_same_batch(row, max_length):
    collator = ForgetRetainCollator(TOKENIZER, GENERIC, max_length, resample=False)
    plain = collated(collator, [row])
    tokenized = made(lambda: collator.tokenize(row))
    if plain is None:  # tokenizing may refuse it too, but sees no more than one row: not what makes a batch
        return
    ahead = collated(collator, [{**row, **tokenized}])
    for name, tensor in plain.items():
        assert torch.equal(ahead[name], tensor), name


def test_the_fuzz_reaches_both_ends():
    """Good rows of each kind pass, so that the tests above do not hold by refusing all."""
    chat = [[{"role": "user", "content": "jane"}], [{"role": "assistant", "content": "good"}]]
    good = [
        {"prompt": "jane:", "completion": " positive", "is_forget": True},
        {"prompt": chat[0], "completion": chat[1], "is_forget": False},
        {"input_ids": [2, 5, 6], "completion_mask": [0, 0, 1], "is_forget": 0},
    ]
    batch = collated(ForgetRetainCollator(TOKENIZER, GENERIC), good)
    check(batch, good, GENERIC, 1024, None)
    with pytest.raises(ValueError, match="row 1 of the batch has no is_forget"):
        ForgetRetainCollator(TOKENIZER, GENERIC)([good[0], {"prompt": "a", "completion": " b"}])
