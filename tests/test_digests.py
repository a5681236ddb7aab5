"""Digests of weights, rows and settings."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import stat

import pytest
import torch
from datasets import Dataset
from helpers import build
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn

from spul import SoftPromptUnlearner, fingerprint
from spul.records.digests import (
    DataSummary,
    digest,
    digest_of_rows,
    is_summary_of,
    make_digest_key,
    read_digest_key,
    sorted_digests,
    summarize_groups,
    summarize_rows,
)

KEY = bytes(range(32))
ROWS = [
    {"prompt": "a", "completion": " positive"},
    {"prompt": "b", "completion": " negative"},
    {"prompt": "c", "completion": " positive"},
]


# ---- fingerprint ----


def test_a_fingerprint_is_64_hexadecimal_digits_and_repeatable():
    model = build("llama")
    assert re.fullmatch("[0-9a-f]{64}", fingerprint(model))
    assert fingerprint(build("llama")) == fingerprint(model)


def test_weights_from_bfloat16_have_one_fingerprint_in_both_types(family):
    half = build(family, torch.bfloat16)
    expected = fingerprint(half)
    assert fingerprint(half.float()) == expected


def test_float32_weights_keep_their_fingerprint_when_rounded_to_bfloat16():
    model = build("gpt2")
    expected = fingerprint(model)
    assert fingerprint(model.to(torch.bfloat16)) == expected


def test_a_change_of_any_one_tensor_changes_the_fingerprint(family):
    model = build(family)
    before, seen = fingerprint(model), set()
    for parameter in model.parameters():
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter.add_(0.5)
        seen.add(fingerprint(model))
        with torch.no_grad():
            parameter.copy_(kept)
    assert before not in seen
    assert len(seen) == len(list(model.parameters()))
    assert fingerprint(model) == before


@pytest.mark.parametrize("place", range(10))
def test_a_change_of_any_one_entry_of_a_small_tensor_changes_the_fingerprint(place):
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    before = fingerprint(model)
    with torch.no_grad():
        (model.weight.view(-1) if place < 8 else model.bias)[place % 8] += 1.0
    assert fingerprint(model) != before


def test_the_first_and_the_last_entry_of_a_large_tensor_are_read():
    for place in (0, -1):
        model = nn.Linear(100, 50, bias=False)
        before = fingerprint(model)
        with torch.no_grad():
            model.weight.view(-1)[place] += 1.0
        assert fingerprint(model) != before


def test_models_that_differ_in_names_or_shapes_only_differ_in_fingerprint():
    class One(nn.Module):
        def __init__(self, name: str, *shape: int) -> None:
            super().__init__()
            self.register_parameter(name, nn.Parameter(torch.zeros(*shape)))

    models = [One("a", 4, 2), One("b", 4, 2), One("a", 2, 4), One("a", 8)]
    assert len({fingerprint(model) for model in models}) == 4


def test_other_families_have_other_fingerprints():
    families = ["llama", "opt", "gpt2", "qwen3", "gemma3", "gpt_neox"]
    assert len({fingerprint(build(name)) for name in families}) == len(families)


def test_order_of_definition_does_not_matter():
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    other = nn.ModuleDict({"b": model["b"], "a": model["a"]})
    assert fingerprint(other) == fingerprint(model)


def test_empty_and_scalar_parameters_are_no_obstacle():
    model = nn.ParameterDict({"empty": torch.zeros(0, 3), "scalar": torch.tensor(1.0)})
    other = nn.ParameterDict({"empty": torch.zeros(0, 3), "scalar": torch.tensor(2.0)})
    assert fingerprint(model) != fingerprint(other)


def test_gradients_modes_and_buffers_do_not_matter():
    model = build("llama")
    before = fingerprint(model)
    model.train().requires_grad_(False)
    model.register_buffer("extra", torch.ones(2))
    assert fingerprint(model) == before


def test_a_prompt_does_not_change_the_fingerprint_of_its_base():
    model = build("llama")
    before = fingerprint(model)
    unlearner = SoftPromptUnlearner(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    assert fingerprint(unlearner.get_base_model()) == before


def test_lora_removed_again_leaves_the_fingerprint_as_it_was():
    model = build("llama")
    before = fingerprint(model)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    assert fingerprint(adapted.unload()) == before


def test_weights_that_are_not_in_memory_have_no_fingerprint():
    assert fingerprint(nn.Linear(2, 2, device="meta")) is None
    assert fingerprint(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))) is None


# ---- digests of rows ----


def test_rows_are_counted_and_digested_in_whatever_order():
    summary = summarized(ROWS)
    assert summary.rows == 3
    assert re.fullmatch("[0-9a-f]{64}", summary.digest)
    assert summarized(ROWS[::-1]) == summary
    assert summarized(Dataset.from_list(ROWS).shuffle(seed=1)) == summary
    assert summarized(iter(ROWS)) == summary


@pytest.mark.parametrize("changed", range(3))
@pytest.mark.parametrize("column", ["prompt", "completion"])
def test_a_change_of_any_row_changes_the_digest(changed, column):
    rows = [{**row, column: row[column] + ("." if i == changed else "")} for i, row in enumerate(ROWS)]
    assert summarized(rows).digest != summarized(ROWS).digest


def test_a_row_more_or_less_or_twice_changes_the_digest():
    sets = [ROWS, ROWS[:2], ROWS[1:], [*ROWS, ROWS[0]], [*ROWS, ROWS[1]], []]
    summaries = [summarized(rows) for rows in sets]
    assert [summary.rows for summary in summaries] == [3, 2, 2, 4, 4, 0]
    assert len({summary.digest for summary in summaries}) == 6


def test_text_that_moves_from_prompt_to_completion_changes_the_digest():
    one, other = {"prompt": "ab", "completion": "c"}, {"prompt": "a", "completion": "bc"}
    assert summarized([one]).digest != summarized([other]).digest


def test_other_columns_do_not_enter_the_digest():
    assert summarized([{**row, "row_id": i, "is_forget": True} for i, row in enumerate(ROWS)]) == summarized(ROWS)


def test_tokenized_rows_are_digested_by_their_tokens():
    rows = [{"input_ids": [3, 4, 5], "completion_mask": [0, 0, 1]}, {"input_ids": [3, 4], "completion_mask": [0, 1]}]
    summary = summarized(rows)
    assert summary.rows == 2
    assert summarized(rows[::-1]) == summary
    rows[0]["input_ids"] = [3, 4, 6]
    assert summarized(rows).digest != summary.digest
    rows[0] = {"input_ids": [3, 4, 5], "completion_mask": [0, 1, 1]}
    assert summarized(rows).digest != summary.digest


def test_tokenized_rows_in_torch_format_have_the_digest_of_plain_ones():
    rows = Dataset.from_list([{"input_ids": [3, 4, 5], "completion_mask": [0, 0, 1]}])
    assert summarized(rows.with_format("torch")) == summarized(rows)


def test_conversations_are_digested_by_their_messages():
    def talk(answer: str) -> dict:
        return {"prompt": [{"role": "user", "content": "who"}], "completion": [{"role": "a", "content": answer}]}

    assert summarized([talk("jane")]) == summarized(Dataset.from_list([talk("jane")]))
    assert summarized([talk("jane")]).digest != summarized([talk("doe")]).digest


@pytest.mark.parametrize("form", ["torch", "numpy"])
def test_conversations_in_another_format_have_the_digests_of_plain_ones(form):
    talk = {name: [{"role": "user", "content": name}] for name in ("prompt", "completion")}
    rows = Dataset.from_list([talk, {**talk, "completion": talk["prompt"]}])
    assert summarized(rows.with_format(form)) == summarized(rows)
    assert sorted_digests(rows.with_format(form)) == sorted_digests(rows)
    assert digest_of_rows(rows.with_format(form)) == digest_of_rows(rows)


def test_rows_behind_a_transform_have_the_digest_of_the_rows_that_it_makes_of_all_their_columns():
    def asked(batch):
        return {**batch, "prompt": [s + p for s, p in zip(batch["system"], batch["prompt"], strict=True)]}

    rows = Dataset.from_list([{**row, "system": f"{i} "} for i, row in enumerate(ROWS)])
    transformed, mapped = rows.with_transform(asked), rows.map(asked, batched=True)
    assert digest_of_rows(transformed) == digest_of_rows(mapped) != digest_of_rows(rows)
    assert digest_of_rows(transformed, ["system"]) == digest_of_rows(mapped, ["system"]) != digest_of_rows(mapped)
    assert summarized(transformed) == summarized(mapped)


def test_the_digest_of_rows_in_order_is_of_prompt_and_completion_alone():
    numbered = Dataset.from_list([{**row, "row_id": i} for i, row in enumerate(ROWS)])
    assert digest_of_rows(numbered) == digest_of_rows(ROWS) == digest_of_rows(Dataset.from_list(ROWS))
    assert digest_of_rows(ROWS[::-1]) != digest_of_rows(ROWS)
    assert digest_of_rows(["a", "b"]) != digest_of_rows(["ab"])


def test_further_columns_count_in_the_digest_of_rows_where_rows_have_them():
    def texts(*values):
        return Dataset.from_list([{**row, "text": text} for row, text in zip(ROWS, values, strict=True)])

    first, other = texts(*"abc"), texts(*"abd")
    assert digest_of_rows(first) == digest_of_rows(other) == digest_of_rows(Dataset.from_list(ROWS), ["text"])
    assert digest_of_rows(first, ["text"]) == digest_of_rows(first, ["text", "prompt", "none"])
    assert len({digest_of_rows(rows, ["text"]) for rows in (first, other, Dataset.from_list(ROWS))}) == 3


# ---- keys ----


def summarized(rows):
    return summarize_rows(rows, KEY)


def test_without_a_key_rows_are_counted_alone():
    assert summarize_rows(ROWS) == summarize_rows(iter(ROWS)) == DataSummary(3, None)


def test_a_set_that_was_guessed_is_confirmed_by_the_key_alone():
    """A corpus split by one of many names: the one split that gives the digest tells the name."""
    sets = [[row for row in ROWS if name in row["prompt"]] for name in "abcdefgh"]
    shared = summarize_rows(sets[1], KEY)
    without_key = [
        found
        for rows in sets
        for found in (summarize_rows(rows, bytes(32)).digest, digest_of_rows(rows), summarize_rows(rows).digest)
    ]
    plain = [hashlib.sha256(b"".join(hashlib.sha256(json.dumps([r["prompt"], r["completion"]]).encode()).digest()
                                     for r in rows)).hexdigest() for rows in sets]  # fmt: skip
    assert shared.digest not in [*without_key, *plain]
    assert [is_summary_of(shared, rows, KEY) for rows in sets] == [False, True] + [False] * 6


def test_a_summary_is_of_its_rows_in_any_order_and_of_no_others():
    summary = summarize_rows(ROWS, KEY)
    assert is_summary_of(summary, Dataset.from_list(ROWS[::-1]), KEY)
    assert not is_summary_of(summary, ROWS[:2], KEY)
    assert not is_summary_of(DataSummary(2, summary.digest), ROWS, KEY)
    assert not is_summary_of(DataSummary(3, "ü"), ROWS, KEY)
    assert not is_summary_of(summary, ROWS, bytes(32))
    with pytest.raises(ValueError, match="has no digest, as of a training without digest_key"):
        is_summary_of(DataSummary(3), ROWS, KEY)


def test_a_key_file_is_its_owners_alone_random_and_never_replaced(tmp_path):
    before = os.umask(0)
    try:
        path = make_digest_key(tmp_path / "one.key")
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(read_digest_key(path)) == 32
    assert read_digest_key(path) != read_digest_key(make_digest_key(str(tmp_path / "other.key")))
    content = path.read_bytes()
    with pytest.raises(FileExistsError, match="could not be recomputed with another"):
        make_digest_key(path)
    assert path.read_bytes() == content
    assert summarize_rows(ROWS, path) == summarize_rows(ROWS, str(path)) == summarize_rows(ROWS, read_digest_key(path))


@pytest.mark.parametrize("content", [b"", b"secret words", b"ab" * 15, b"abc" * 11, b"\xff" * 40, b"a b" * 20])
def test_what_is_no_key_is_refused_without_being_shown(tmp_path, content):
    path = tmp_path / "key"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="holds no digest_key; expected at least 32 hexadecimal digits") as error:
        summarize_rows(ROWS, path)
    assert not content or content.decode(errors="ignore").strip() == "" or content.decode() not in str(error.value)


def test_keys_that_are_missing_short_or_of_another_type_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"make one with spul\.records\.make_digest_key"):
        read_digest_key(tmp_path / "key")
    with pytest.raises(ValueError, match="digest_key has 15 bytes; expected at least 16"):
        read_digest_key(bytes(15))
    with pytest.raises(TypeError, match="digest_key is a int; expected bytes, or the path"):
        read_digest_key(5)


# ---- settings ----


def test_settings_have_one_digest_whatever_their_order():
    settings = {"a": 1, "b": {"x", "y", "z"}, "c": (1, 2), "dtype": torch.float32}
    same = {"dtype": torch.float32, "c": [1, 2], "b": {"z", "y", "x"}, "a": 1}
    assert re.fullmatch("[0-9a-f]{64}", digest(settings))
    assert digest(settings) == digest(same)
    assert len({digest(settings | change) for change in ({}, {"a": 2}, {"a": "1"}, {"b": {"x"}}, {"d": None})}) == 5


def summary_by_sorting(rows):
    """The digest of rows written plainly."""
    digests = []
    for row in rows:
        content = [row.get("prompt"), row.get("completion")]
        if content[0] is None:
            content = [[int(i) for i in row[key]] for key in ("input_ids", "completion_mask")]
        digests.append(hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).digest())
    return DataSummary(len(digests), hmac.new(KEY, b"".join(sorted(digests)), hashlib.sha256).hexdigest())


def test_the_digest_of_rows_is_that_of_their_sorted_digests():
    chat = {"prompt": [{"role": "user", "content": "é\n"}], "completion": [{"content": "x", "role": "assistant"}]}
    tokenized = {"prompt": None, "input_ids": torch.tensor([5, 6]), "completion_mask": [0, 1]}
    texts = [{"prompt": f"a {i}", "completion": " b", "other": i} for i in range(3_000)]  # some digests end with zeros
    for rows in ([], texts, [chat, tokenized, *texts[:5]]):
        assert summarized(rows) == summary_by_sorting(rows)


def test_two_groups_in_one_pass_have_the_summaries_of_each():
    rows = [{"prompt": f"a {i}", "completion": " b"} for i in range(50)]
    flags = [i % 3 == 0 for i in range(50)]
    groups = [[row for row, flag in zip(rows, flags, strict=True) if flag is one] for one in (True, False)]
    assert summarize_groups(iter(rows), flags, KEY) == tuple(map(summary_by_sorting, groups))


def test_fewer_flags_than_rows_are_refused():
    with pytest.raises(ValueError, match="more rows than flags"):
        summarize_groups(ROWS, [True] * (len(ROWS) - 1), KEY)


def test_the_bytes_of_a_key_file_are_its_key(tmp_path):
    path = make_digest_key(tmp_path / "key")
    content = path.read_bytes()
    assert read_digest_key(content) == read_digest_key(path) == bytes.fromhex(content.decode())
    assert is_summary_of(summarize_rows(ROWS, path), ROWS, content)
    assert read_digest_key(KEY) == KEY
