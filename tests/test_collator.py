"""Rows to batches, raw and tokenized."""

from __future__ import annotations

import copy

import pytest
import torch
from collated import GENERIC, answers, assert_equal_batches, make_rows
from datasets import Dataset

from spul import ForgetRetainCollator
from spul.data import REFUSALS, RowEncoder
from spul.data.dataset import forget_retain_dataset

# ---- batches ----


def test_a_literal_batch(words):
    rows = [
        {"prompt": "a b c", "completion": " d", "is_forget": True, "row_id": 0},
        {"prompt": "a", "completion": " e f", "is_forget": False, "row_id": 5},
    ]
    batch = ForgetRetainCollator(words, [" n u"])(rows)
    expected = {
        "input_ids": [[3, 4, 5, 14, 15], [3, 7, 8, 2, 2]],
        "attention_mask": [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]],
        "labels": [[-100, -100, -100, 14, 15], [-100, 7, 8, -100, -100]],
        "is_forget": [True, False],
        "row_id": [0, 5],
    }
    assert {name: value.tolist() for name, value in batch.items()} == expected
    assert batch["is_forget"].dtype == torch.bool
    assert all(batch[name].dtype == torch.int64 for name in expected if name != "is_forget")


def test_only_retain_rows_keep_their_own_completion(words):
    collator = ForgetRetainCollator(words, [" n"])
    assert answers(collator(make_rows(2, 2).to_list())) == {0: [14], 1: [14], 2: [7], 3: [7]}


def test_without_generic_completions_every_row_keeps_its_own(words):
    collator = ForgetRetainCollator(words, None)
    assert answers(collator(make_rows(2, 2).to_list())) == {0: [6], 1: [6], 2: [7], 3: [7]}


def test_rows_are_padded_on_the_right_whatever_the_tokenizer_prefers(words):
    words.padding_side = "left"
    rows = [{"prompt": p, "completion": " d", "is_forget": False} for p in ("a", "a b c d")]
    batch = ForgetRetainCollator(words, [" n"])(rows)
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[-100, 6, -100, -100, -100], [-100, -100, -100, -100, 6]]
    assert words.padding_side == "left"


def test_a_pad_token_is_used_if_there_is_one_and_is_never_a_label(words):
    words.pad_token = "z"
    rows = [{"prompt": p, "completion": " d", "is_forget": False} for p in ("a", "a b c")]
    batch = ForgetRetainCollator(words, [" n"])(rows)
    assert batch["input_ids"].tolist() == [[3, 6, 16, 16], [3, 4, 5, 6]]
    assert batch["labels"].tolist() == [[-100, 6, -100, -100], [-100, -100, -100, 6]]


def test_a_tokenizer_without_a_pad_token_is_not_changed(words):
    before = copy.deepcopy(words.special_tokens_map), len(words)
    ForgetRetainCollator(words, GENERIC)(make_rows(2, 2).to_list())
    assert (words.special_tokens_map, len(words)) == before
    assert words.pad_token is None


def test_the_width_is_padded_to_a_multiple(words):
    batch = ForgetRetainCollator(words, [" n"], pad_to_multiple_of=4)(make_rows(1).to_list())
    assert batch["input_ids"].shape == (2, 8)
    assert batch["attention_mask"].tolist() == [[1] * 6 + [0] * 2] * 2


def test_row_ids_are_left_out_unless_all_rows_have_one(words):
    rows = [
        {"prompt": "a", "completion": " d", "is_forget": True, "row_id": 0},
        {"prompt": "b", "completion": " d", "is_forget": False},
    ]
    assert "row_id" not in ForgetRetainCollator(words, [" n"])(rows)


def test_append_eos_ends_own_and_generic_completions(words):
    collator = ForgetRetainCollator(words, [" n"], append_eos=True)
    assert answers(collator(make_rows(1, 1).to_list())) == {0: [14, 2], 1: [7, 2]}


def test_a_long_row_is_cut_at_its_prompt_with_room_for_the_generic_completion(words):
    rows = [{"prompt": "a b c d e f", "completion": " g", "is_forget": True}]
    batch = ForgetRetainCollator(words, [" n u z"], max_length=5)(rows)
    assert batch["input_ids"].tolist() == [[7, 8, 14, 15, 16]]
    assert batch["labels"].tolist() == [[-100, -100, 14, 15, 16]]


def test_a_text_field_is_what_is_cut(words):
    rows = [{"prompt": "a b c d e f", "text": "b c d", "completion": " g", "is_forget": True}]
    batch = ForgetRetainCollator(words, [" n"], max_length=5, text_field="text")(rows)
    assert batch["input_ids"].tolist() == [[3, 4, 7, 8, 14]]


def test_true_batch_keeps_the_completions_of_forget_rows_and_needs_no_flags(words):
    collator = ForgetRetainCollator(words, [" n"])
    rows = [{"prompt": "a b", "completion": " d"}, {"prompt": "c", "completion": " e"}]
    expected = {
        "input_ids": [[3, 4, 6], [5, 7, 2]],
        "attention_mask": [[1, 1, 1], [1, 1, 0]],
        "labels": [[-100, -100, 6], [-100, 7, -100]],
    }
    assert {name: value.tolist() for name, value in collator.encoder.batch(rows).items()} == expected
    assert answers(collator.encoder.batch(make_rows(1, 1).to_list())) == {0: [6], 1: [7]}


def test_true_batch_takes_other_completions_even_generic_ones(words):
    collator = ForgetRetainCollator(words, [" n"])
    assert answers(collator.encoder.batch(make_rows(1, 1).to_list(), [" n", " a b"])) == {0: [14], 1: [3, 4]}


def test_true_batch_does_not_disturb_the_draws(words):
    rows = make_rows(30).to_list()
    one, other = ForgetRetainCollator(words, GENERIC), ForgetRetainCollator(words, GENERIC)
    one.encoder.batch(rows)
    assert_equal_batches(one(rows), other(rows))


# ---- tokenized rows ----


def test_tokenize_gives_ids_and_a_mask_of_the_rows_own_completion(words):
    collator = ForgetRetainCollator(words, [" n"])
    row = {"prompt": "a b", "completion": " d e", "is_forget": True, "row_id": 3, "stars": 5}
    assert collator.tokenize(row) == {
        "input_ids": [3, 4, 6, 7],
        "completion_mask": [0, 0, 1, 1],
        "is_forget": True,
        "row_id": 3,
    }


@pytest.mark.parametrize("remove", [[], ["prompt", "completion"]])
def test_tokenized_rows_give_the_batches_that_raw_rows_give(words, remove):
    rows = make_rows(20, 20)
    raw, tokenized = (ForgetRetainCollator(words, GENERIC, append_eos=True) for _ in range(2))
    mapped = rows.map(tokenized.tokenize, remove_columns=remove)
    assert "input_ids" in mapped.column_names
    for _ in range(2):
        assert_equal_batches(tokenized(list(mapped)), raw(list(rows)))


def test_tokenized_rows_in_torch_format_give_the_same_batches(words):
    one, other = (ForgetRetainCollator(words, GENERIC) for _ in range(2))
    mapped = make_rows(20, 20).map(one.tokenize, remove_columns=["prompt", "completion"])
    assert_equal_batches(one(list(mapped.with_format("torch"))), other(list(mapped)))


@pytest.mark.parametrize("generic", [" n", " n u z"])
def test_long_tokenized_rows_give_the_batches_that_raw_rows_give(words, generic):
    rows = forget_retain_dataset(
        Dataset.from_list([{"prompt": "a b c d e f g h", "text": "c d e f", "completion": " i j"}]),
        Dataset.from_list([{"prompt": "b c d e f g h i", "text": "d e f g", "completion": " i j"}]),
    )
    collator = ForgetRetainCollator(words, [generic], max_length=7, text_field="text")
    mapped = rows.map(collator.tokenize, remove_columns=["prompt", "completion", "text"])
    assert_equal_batches(collator(list(mapped)), collator(list(rows)))


def test_tokenized_conversations_give_the_batches_that_raw_ones_give(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
    )

    def talk(question: str) -> Dataset:
        messages = {
            "prompt": [{"role": "user", "content": question}],
            "completion": [{"role": "assistant", "content": "jane"}],
        }
        return Dataset.from_list([messages])

    rows = forget_retain_dataset(talk("who"), talk("why"))
    collator = ForgetRetainCollator(tokenizer, [" unknown"])
    batch = collator(list(rows))
    kept = batch["labels"][0][batch["labels"][0] != -100]
    assert tokenizer.decode(kept) == "unknown</s>"
    mapped = rows.map(collator.tokenize, remove_columns=["prompt", "completion"])
    assert_equal_batches(collator(list(mapped)), batch)


@pytest.fixture
def counted(tokenizer, monkeypatch) -> list[list[dict[str, str]]]:
    """The conversations that the tokenizer renders, one entry per call."""
    tokenizer.chat_template = (
        "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
    )
    rendered: list[list[dict[str, str]]] = []
    render = tokenizer.apply_chat_template

    def counting(messages, **kwargs):
        rendered.append(messages)
        return render(messages, **kwargs)

    monkeypatch.setattr(tokenizer, "apply_chat_template", counting)
    return rendered


def test_a_conversation_is_rendered_once_for_each_generic_completion(tokenizer, counted):
    def talks(*questions: str) -> Dataset:
        answer = [{"role": "assistant", "content": "jane"}]
        return Dataset.from_list(
            [{"prompt": [{"role": "user", "content": text}], "completion": answer} for text in questions]
        )

    rows = list(forget_retain_dataset(talks("who", "why", "film", "plot"), talks("good")))
    collator = ForgetRetainCollator(tokenizer, REFUSALS)
    batches = [collator(rows) for _ in range(3)]
    expected = 4 * (len(REFUSALS) + 2) + 2 + 1  # the last one shows what the template puts after an answer
    assert len(counted) == expected
    collator.tokenize(rows[0])
    collator.encoder.with_max_length(60).encode(rows[0], REFUSALS[0])
    assert len(counted) == expected

    # What a fresh encoder renders anew is the same.
    for batch in batches:
        for row, answer in answers(batch).items():
            drawn = [" jane"] if row == 4 else REFUSALS
            fresh = [RowEncoder(tokenizer, 1024).encode(rows[row], text).completion_ids for text in drawn]
            assert answer in fresh
    first = answers(batches[0])
    assert any(answers(batch) != first for batch in batches[1:])
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    assert collator.encoder.encode(rows[0]) == RowEncoder(tokenizer, 1024).encode(rows[0])


def test_a_full_cache_changes_no_batch(tokenizer, counted, monkeypatch):
    monkeypatch.setattr("spul.data.text_encoder.CACHE_SIZE", 5)
    talk = {"prompt": [{"role": "user", "content": "who"}], "completion": [{"role": "assistant", "content": "jane"}]}
    rows = [{**talk, "is_forget": True, "row_id": 0}]
    small, large = (ForgetRetainCollator(tokenizer, REFUSALS) for _ in range(2))
    expected = [small(rows) for _ in range(3)]
    assert len(counted) > 2 * len(REFUSALS)
    monkeypatch.undo()
    for batch in expected:
        assert_equal_batches(large(rows), batch)


def test_what_was_encoded_does_not_change_the_fingerprint_of_a_mapped_data_set(words):
    collator = ForgetRetainCollator(words, GENERIC)
    rows = make_rows(2, 2)
    before = rows.map(collator.tokenize)._fingerprint
    collator.encoder.encode({"prompt": "a", "completion": " b c"})
    assert rows.map(collator.tokenize)._fingerprint == before
