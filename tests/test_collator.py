"""Rows to batches, and the draws of generic completions."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from spul import ForgetRetainCollator
from spul.data import REFUSALS, RowEncoder
from spul.data.dataset import forget_retain_dataset

GENERIC = [" n", " u", " z"]


@pytest.fixture
def words() -> PreTrainedTokenizerFast:
    """The words a..j are 3..12, ":" is 13, and n, u, z are 14, 15, 16."""
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *"abcdefghij:nuz"])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def make_rows(num_forget: int, num_retain: int = 1) -> Dataset:
    """Prompts of five words, all different."""
    prompts = itertools.product("abcdefghij", repeat=4)
    forget = [{"prompt": "f " + " ".join(next(prompts)), "completion": " d"} for _ in range(num_forget)]
    retain = [{"prompt": "g " + " ".join(next(prompts)), "completion": " e"} for _ in range(num_retain)]
    return forget_retain_dataset(Dataset.from_list(forget), Dataset.from_list(retain))


def answers(batch: dict[str, torch.Tensor]) -> dict[int, list[int]]:
    """Row id to the tokens of its response."""
    labels = zip(batch["row_id"].tolist(), batch["labels"], strict=True)
    return {row: label[label != -100].tolist() for row, label in labels}


def draws(collator: ForgetRetainCollator, rows: Dataset, **loader) -> dict[int, list[int]]:
    """One pass over the rows by a data loader: row id to response tokens."""
    found: dict[int, list[int]] = {}
    for batch in DataLoader(rows, batch_size=8, collate_fn=collator, **loader):
        found |= answers(batch)
    return found


def same_share(one: dict, other: dict) -> float:
    return sum(one[row] == other[row] for row in one) / len(one)


def assert_equal_batches(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


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
    monkeypatch.setattr("spul.data.encoder.CACHE_SIZE", 5)
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


# ---- draws ----


@pytest.fixture(scope="module")
def forget_rows() -> Dataset:
    """Three hundred forget rows."""
    return make_rows(300).filter(lambda row: row["is_forget"])


def test_draws_are_uniform(words):
    rows = list(make_rows(3000).select(range(3000)))
    collator = ForgetRetainCollator(words, GENERIC)
    for _ in range(2):
        tokens = [token for (token,) in answers(collator(rows)).values()]
        counts = [tokens.count(token) for token in (14, 15, 16)]
        assert sum(counts) == 3000
        # Chi-square with 2 degrees of freedom: above 18.4 for one seed in ten thousand.
        assert sum((count - 1000) ** 2 / 1000 for count in counts) < 18.4


def test_every_pass_draws_afresh(words, forget_rows):
    collator = ForgetRetainCollator(words, GENERIC)
    first, second, third = (draws(collator, forget_rows) for _ in range(3))
    for one, other in ((first, second), (second, third), (first, third)):
        assert 0.2 < same_share(one, other) < 0.47  # independent draws of three agree in a third


def test_the_same_seed_draws_the_same_and_another_seed_others(words, forget_rows):
    one, again, other = (ForgetRetainCollator(words, GENERIC, seed=seed) for seed in (3, 3, 4))
    for _ in range(2):
        expected = draws(one, forget_rows)
        assert draws(again, forget_rows) == expected
        assert 0.2 < same_share(draws(other, forget_rows), expected) < 0.47


def test_draws_do_not_depend_on_batch_mates_or_order(words, forget_rows):
    whole, single = ForgetRetainCollator(words, GENERIC), ForgetRetainCollator(words, GENERIC)
    expected = answers(whole(list(forget_rows)))
    found: dict[int, list[int]] = {}
    for row in forget_rows.shuffle(seed=5):
        found |= answers(single([row]))
    assert found == expected


def test_draws_do_not_depend_on_torchs_random_state(words, forget_rows):
    torch.manual_seed(1)
    expected = draws(ForgetRetainCollator(words, GENERIC), forget_rows)
    torch.manual_seed(2)
    assert draws(ForgetRetainCollator(words, GENERIC), forget_rows) == expected


def test_rows_without_row_ids_draw_by_their_prompts(words, forget_rows):
    rows = list(forget_rows.remove_columns("row_id"))
    one, other = ForgetRetainCollator(words, GENERIC), ForgetRetainCollator(words, GENERIC)
    batch, backwards = one(rows), other(rows[::-1])
    assert torch.equal(batch["labels"], backwards["labels"].flip(0))
    assert len(batch["labels"].unique()) == 4


def test_copies_of_a_row_draw_apart_and_reproducibly(words, forget_rows):
    rows = list(forget_rows)
    copies = [[{**row, "copy": number} for row in rows] for number in (0, 1)]
    collator, other = ForgetRetainCollator(words, GENERIC), ForgetRetainCollator(words, GENERIC)
    collator.set_epoch(2)
    other.set_epoch(2)
    first, second = (answers(collator(some)) for some in copies)
    assert 0.2 < same_share(first, second) < 0.47
    assert answers(other(copies[1])) == second  # whichever copy comes first
    assert answers(other(rows)) == first  # a row that is not numbered is the first copy


def test_set_epoch_draws_what_that_epoch_drew(words, forget_rows):
    collator = ForgetRetainCollator(words, GENERIC)
    epochs = []
    for epoch in range(3):
        collator.set_epoch(epoch)
        epochs.append(draws(collator, forget_rows))
    assert 0.2 < same_share(epochs[0], epochs[1]) < 0.47
    assert 0.2 < same_share(epochs[1], epochs[2]) < 0.47
    collator.set_epoch(1)
    assert draws(collator, forget_rows) == epochs[1]
    fresh = ForgetRetainCollator(words, GENERIC)
    fresh.set_epoch(2)
    assert draws(fresh, forget_rows) == epochs[2]


def test_set_epoch_to_the_same_epoch_begins_it_anew(words, forget_rows):
    collator = ForgetRetainCollator(words, GENERIC)
    collator.set_epoch(1)
    expected = draws(collator, forget_rows)
    collator.set_epoch(1)
    assert draws(collator, forget_rows) == expected


def test_within_an_epoch_a_row_that_comes_again_draws_afresh(words, forget_rows):
    collator = ForgetRetainCollator(words, GENERIC)
    collator.set_epoch(0)
    assert 0.2 < same_share(draws(collator, forget_rows), draws(collator, forget_rows)) < 0.47


def test_resample_false_draws_once_per_row(words, forget_rows):
    collator = ForgetRetainCollator(words, GENERIC, resample=False)
    expected = draws(collator, forget_rows)
    assert len({tuple(answer) for answer in expected.values()}) == 3
    for epoch in range(2):
        collator.set_epoch(epoch)
        assert draws(collator, forget_rows) == expected
    assert draws(collator, forget_rows, num_workers=2) == expected
    assert draws(ForgetRetainCollator(words, GENERIC, resample=False), forget_rows) == expected


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_draw_what_the_main_process_draws_where_epochs_are_set(words, forget_rows, persistent):
    rows, plain, worked = forget_rows, ForgetRetainCollator(words, GENERIC), ForgetRetainCollator(words, GENERIC)
    loader = DataLoader(rows, 8, shuffle=True, collate_fn=worked, num_workers=2, persistent_workers=persistent)
    for epoch in range(3):
        plain.set_epoch(epoch)
        worked.set_epoch(epoch)
        found: dict[int, list[int]] = {}
        for batch in loader:
            found |= answers(batch)
        assert found == draws(plain, rows)


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_draw_afresh_in_every_pass_where_no_epochs_are_set(words, forget_rows, persistent):
    torch.manual_seed(0)
    collator = ForgetRetainCollator(words, GENERIC)
    loader = DataLoader(
        forget_rows, 8, shuffle=True, collate_fn=collator, num_workers=2, persistent_workers=persistent
    )
    passes = []
    for _ in range(2):
        passes.append({})
        for batch in loader:
            passes[-1] |= answers(batch)
    assert 0.2 < same_share(*passes) < 0.47


# ---- what is refused ----


def test_one_string_of_generic_completions_is_refused(words):
    with pytest.raises(TypeError, match="generic_completions=' neutral' is one string; pass a list"):
        ForgetRetainCollator(words, " neutral")


@pytest.mark.parametrize("generic", [[], [""], [" n", "  "], [" n", " n"], [" n", "N "], ()])
def test_empty_or_repeated_generic_completions_are_refused(words, generic):
    with pytest.raises(ValueError, match=r"generic_completions=\[.*expected one or more different, non-empty texts"):
        ForgetRetainCollator(words, generic)


@pytest.mark.parametrize("flag", ["False", 2, None])
def test_a_flag_that_is_none_is_refused_with_its_row_and_value(words, flag):
    collator = ForgetRetainCollator(words, GENERIC)
    row = {"prompt": "a", "completion": " d"}
    rows = [{**row, "is_forget": False}, {**row, "is_forget": flag}]
    with pytest.raises(ValueError, match=f"row 1 of the batch has is_forget={flag!r}; expected True or False"):
        collator(rows)
    for call in (collator.tokenize, lambda row: collator([row])):
        with pytest.raises(ValueError, match=f"the row with row_id=7 has is_forget={flag!r}; expected True or False"):
            call({**rows[1], "row_id": 7})


def test_rows_without_is_forget_are_refused_with_the_trainers_option(words):
    rows = [{"prompt": "a", "completion": " d", "is_forget": True}, {"completion": " d", "prompt": "b"}]
    with pytest.raises(ValueError, match=r"row 1 of the batch has no is_forget, only \['completion', 'pro") as error:
        ForgetRetainCollator(words, GENERIC)(rows)
    assert "remove_unused_columns=False" in str(error.value)
    assert "forget_retain_dataset" in str(error.value)


@pytest.mark.parametrize("is_forget", [True, False])
@pytest.mark.parametrize("completion", [" n", "n", " N", " n "])
def test_a_generic_completion_that_is_a_label_is_refused(words, completion, is_forget):
    rows = [{"prompt": "a", "completion": completion, "is_forget": is_forget}]
    with pytest.raises(ValueError, match="a forget row would be trained to its own label"):
        ForgetRetainCollator(words, GENERIC)(rows)


@pytest.mark.parametrize("append_eos", [False, True])
@pytest.mark.parametrize("label", [" n", "n", " N"])
def test_a_generic_completion_that_is_a_label_is_refused_in_tokenized_rows(label, append_eos):
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", "a", "n", "N", ":"])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    cased = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>")
    collator = ForgetRetainCollator(cased, [" n"], append_eos=append_eos)
    rows = [collator.tokenize({"prompt": "a", "completion": label, "is_forget": True})]
    with pytest.raises(ValueError, match="a forget row would be trained to its own label"):
        collator(rows)


@pytest.mark.parametrize("label", ["unknown", "  unknown"])
def test_a_tokenized_label_that_differs_from_a_generic_completion_by_spaces_is_refused(tokenizer, label):
    collator = ForgetRetainCollator(tokenizer, [" unknown"])
    rows = [collator.tokenize({"prompt": "text:", "completion": label, "is_forget": False})]
    with pytest.raises(ValueError, match="a forget row would be trained to its own label"):
        collator(rows)


def test_a_generic_completion_that_is_a_label_of_a_conversation_is_refused(tokenizer):
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}\n{{ m['content'] }}</s>{% endfor %}"
    rows = [
        {
            "prompt": [{"role": "user", "content": "who"}],
            "completion": [{"role": "assistant", "content": "Unknown"}],
            "is_forget": True,
        }
    ]
    with pytest.raises(ValueError, match="the completion 'Unknown' of a row is one of generic_completions"):
        ForgetRetainCollator(tokenizer, [" unknown"])(rows)


def test_a_label_that_only_begins_like_a_generic_completion_is_none(words):
    rows = [{"prompt": "a", "completion": " n u", "is_forget": False, "row_id": 0}]
    assert answers(ForgetRetainCollator(words, [" n"])(rows)) == {0: [14, 15]}


def test_a_completion_longer_than_max_length_is_refused(words):
    rows = [{"prompt": "a", "completion": " b", "is_forget": True}]
    with pytest.raises(ValueError, match="a completion has 3 tokens and max_length=3"):
        ForgetRetainCollator(words, [" n u z"], max_length=3)(rows)


def test_a_slice_of_a_dataset_is_told_from_a_list_of_rows(tokenizer):
    with pytest.raises(TypeError, match="pass a list of rows"):
        ForgetRetainCollator(tokenizer, [" x"])({"prompt": ["a"], "completion": ["b"], "is_forget": [True]})


# ---- rows that are cut ----


def long_rows(words=("a", "b", "c", "d")) -> Dataset:
    forget = [{"prompt": f"{w} e f g h i j a b c", "completion": " d"} for w in words]
    retain = [{"prompt": "a b", "completion": " e"}, {"prompt": "c c c c c c c c c c c d", "completion": " e"}]
    return forget_retain_dataset(Dataset.from_list(forget), Dataset.from_list(retain))


@pytest.mark.parametrize(("max_length", "rows", "tokens"), [(13, 0, 0), (12, 1, 1), (11, 1, 2), (10, 5, 4 + 3)])
@pytest.mark.parametrize("as_list", [False, True])
def test_rows_that_are_cut_are_counted_and_warned_of_once(words, caplog, max_length, rows, tokens, as_list):
    collator = ForgetRetainCollator(words, GENERIC, max_length)
    data = long_rows()
    # The twin: every row encoded whole, and what is above max_length.
    whole = [len(RowEncoder(words, 99).encode(row)) for row in data]
    assert (sum(n > max_length for n in whole), sum(max(0, n - max_length) for n in whole)) == (rows, tokens)
    assert collator.warn_of_cut_rows(list(data) if as_list else data) == collator.encoder.num_cut == rows
    assert len(caplog.records) == (rows > 0)
    if rows:
        assert f"{rows} of 6 rows of train_dataset are longer than max_length={max_length} and lose {tokens} " in (
            caplog.text
        )
        assert "ForgetRetainCollator(..., text_field=...)" in caplog.text


def test_the_longest_generic_completion_counts_in_the_length_of_a_forget_row(words, caplog):
    assert ForgetRetainCollator(words, [" n u z"], 11).warn_of_cut_rows(long_rows()) == 5


def test_a_tokenized_row_that_is_cut_is_counted_and_the_first_one_warned_of(words, caplog):
    collator = ForgetRetainCollator(words, GENERIC, 10)
    long_rows().map(collator.tokenize)
    assert collator.encoder.num_cut == 5
    assert [record.message.split(",")[0] for record in caplog.records] == [
        "a row is longer than max_length=10 and loses 1 tokens"
    ]


@pytest.mark.parametrize(
    ("names", "lost"), [(["a e"], "a e"), (["e f", "i j"], None), (["E"], None), (["z", "A"], None)]
)
def test_a_forget_row_that_loses_a_name_altogether_is_refused(words, names, lost):
    collator = ForgetRetainCollator(words, GENERIC, 10, names=names)
    rows = long_rows()
    for call in (collator.warn_of_cut_rows, collator, lambda rows: [collator.tokenize(row) for row in rows]):
        if lost is None:
            call(list(rows))
            continue
        with pytest.raises(ValueError, match=r"the forget row with row_id=0 loses the name 'a e' to max_length=10"):
            call(list(rows))


def test_a_text_field_that_loses_a_name_is_refused_and_a_retain_row_is_not(words):
    row = {"prompt": "a b c d e", "completion": " f", "text": "b c d", "row_id": 3}
    collator = ForgetRetainCollator(words, GENERIC, 5, text_field="text", names=["d"])
    with pytest.raises(ValueError, match=r"row_id=3 loses the name 'd' to max_length=5.*'a b c d e'"):
        collator([{**row, "is_forget": True}])
    collator([{**row, "is_forget": False}])


def test_one_name_as_a_string_is_refused(words):
    with pytest.raises(TypeError, match="names is 'jane doe'; expected a list"):
        ForgetRetainCollator(words, GENERIC, names="jane doe")
