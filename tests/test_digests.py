"""Digests of weights, rows and settings."""

from __future__ import annotations

import hashlib
import json
import re

import pytest
import torch
from datasets import Dataset
from helpers import build
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn

from spul import SoftPromptUnlearner, fingerprint
from spul.records.digests import DataSummary, digest, digest_of_rows, summarize_rows

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
    summary = summarize_rows(ROWS)
    assert summary.rows == 3
    assert re.fullmatch("[0-9a-f]{64}", summary.digest)
    assert summarize_rows(ROWS[::-1]) == summary
    assert summarize_rows(Dataset.from_list(ROWS).shuffle(seed=1)) == summary
    assert summarize_rows(iter(ROWS)) == summary


@pytest.mark.parametrize("changed", range(3))
@pytest.mark.parametrize("column", ["prompt", "completion"])
def test_a_change_of_any_row_changes_the_digest(changed, column):
    rows = [{**row, column: row[column] + ("." if i == changed else "")} for i, row in enumerate(ROWS)]
    assert summarize_rows(rows).digest != summarize_rows(ROWS).digest


def test_a_row_more_or_less_or_twice_changes_the_digest():
    sets = [ROWS, ROWS[:2], ROWS[1:], [*ROWS, ROWS[0]], [*ROWS, ROWS[1]], []]
    summaries = [summarize_rows(rows) for rows in sets]
    assert [summary.rows for summary in summaries] == [3, 2, 2, 4, 4, 0]
    assert len({summary.digest for summary in summaries}) == 6


def test_text_that_moves_from_prompt_to_completion_changes_the_digest():
    one, other = {"prompt": "ab", "completion": "c"}, {"prompt": "a", "completion": "bc"}
    assert summarize_rows([one]).digest != summarize_rows([other]).digest


def test_other_columns_do_not_enter_the_digest():
    assert summarize_rows([{**row, "row_id": i, "is_forget": True} for i, row in enumerate(ROWS)]) == summarize_rows(
        ROWS
    )


def test_tokenized_rows_are_digested_by_their_tokens():
    rows = [{"input_ids": [3, 4, 5], "completion_mask": [0, 0, 1]}, {"input_ids": [3, 4], "completion_mask": [0, 1]}]
    summary = summarize_rows(rows)
    assert summary.rows == 2
    assert summarize_rows(rows[::-1]) == summary
    rows[0]["input_ids"] = [3, 4, 6]
    assert summarize_rows(rows).digest != summary.digest
    rows[0] = {"input_ids": [3, 4, 5], "completion_mask": [0, 1, 1]}
    assert summarize_rows(rows).digest != summary.digest


def test_tokenized_rows_in_torch_format_have_the_digest_of_plain_ones():
    rows = Dataset.from_list([{"input_ids": [3, 4, 5], "completion_mask": [0, 0, 1]}])
    assert summarize_rows(rows.with_format("torch")) == summarize_rows(rows)


def test_conversations_are_digested_by_their_messages():
    def talk(answer: str) -> dict:
        return {"prompt": [{"role": "user", "content": "who"}], "completion": [{"role": "a", "content": answer}]}

    assert summarize_rows([talk("jane")]) == summarize_rows(Dataset.from_list([talk("jane")]))
    assert summarize_rows([talk("jane")]).digest != summarize_rows([talk("doe")]).digest


def test_the_digest_of_rows_in_order_is_of_prompt_and_completion_alone():
    numbered = Dataset.from_list([{**row, "row_id": i} for i, row in enumerate(ROWS)])
    assert digest_of_rows(numbered) == digest_of_rows(ROWS) == digest_of_rows(Dataset.from_list(ROWS))
    assert digest_of_rows(ROWS[::-1]) != digest_of_rows(ROWS)
    assert digest_of_rows(["a", "b"]) != digest_of_rows(["ab"])


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
    return DataSummary(len(digests), hashlib.sha256(b"".join(sorted(digests))).hexdigest())


def test_the_digest_of_rows_is_that_of_their_sorted_digests():
    chat = {"prompt": [{"role": "user", "content": "é\n"}], "completion": [{"content": "x", "role": "assistant"}]}
    tokenized = {"prompt": None, "input_ids": torch.tensor([5, 6]), "completion_mask": [0, 1]}
    texts = [{"prompt": f"a {i}", "completion": " b", "other": i} for i in range(3_000)]  # some digests end with zeros
    for rows in ([], texts, [chat, tokenized, *texts[:5]]):
        assert summarize_rows(rows) == summary_by_sorting(rows)
