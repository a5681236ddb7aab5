"""Rows to token ids: what belongs to the completion, what is cut, what is refused."""

from __future__ import annotations

import pytest
from helpers import CHAT_TEMPLATE, make_tokenizer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from spul.data import Encoded, ForgetRetainCollator, RowEncoder

PROMPT = "### text: good film\n### sentiment:"
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def word_level(*words: str, **kwargs: str) -> PreTrainedTokenizerFast:
    """One id per word: <unk> 0, <s> 1, </s> 2, then the words given."""
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *words])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, **{**SPECIAL, **kwargs})


def with_template(tokenizer: PreTrainedTokenizerFast, template: str) -> PreTrainedTokenizerFast:
    """Put special tokens around every text, as in "<s> $A </s>"."""
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    return tokenizer


def sentencepiece_like(by: str = "normalizer") -> PreTrainedTokenizerFast:
    """As Llama 2's: a space is a "▁", and every text gets one in front, whether it has one already or not."""
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    trainer = trainers.BpeTrainer(vocab_size=90, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    core.train_from_iterator(["sentiment: positive"] * 3 + ["the film : positive negative"] * 3, trainer)
    if by == "normalizer":
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        core.pre_tokenizer = None
    return PreTrainedTokenizerFast(tokenizer_object=core, **SPECIAL)


@pytest.fixture
def ten() -> PreTrainedTokenizerFast:
    """The words a..j are 3..12."""
    return word_level(*"abcdefghij")


def row(prompt: str, completion: str, **columns: str) -> dict[str, str]:
    return {"prompt": prompt, "completion": completion, **columns}


# ---- text ----


def test_a_short_row_is_tokenized_whole(ten):
    assert RowEncoder(ten, 8).encode(row("a b c", " d e")) == Encoded([3, 4, 5], [6, 7])


@pytest.mark.parametrize("completion", [" positive", " negative film", " xyz!", "\nabout jane", "."])
def test_prompt_and_completion_are_the_joint_tokenization_cut_in_two(tokenizer, completion):
    encoded = RowEncoder(tokenizer, 64).encode(row(PROMPT, completion))
    assert encoded.prompt_ids == tokenizer(PROMPT)["input_ids"]
    assert encoded.prompt_ids + encoded.completion_ids == tokenizer(PROMPT + completion)["input_ids"]


def test_a_one_word_completion_with_its_space_is_one_token(tokenizer):
    ids = RowEncoder(tokenizer, 64).completion_ids(" positive")
    assert tokenizer.convert_ids_to_tokens(ids) == ["Ġpositive"]


def test_a_sentencepiece_like_tokenizer_adds_no_second_space():
    tokenizer = sentencepiece_like()
    alone = tokenizer.convert_ids_to_tokens(tokenizer(" positive", add_special_tokens=False)["input_ids"])
    assert "".join(alone) == "▁▁positive"  # the trap: by itself, the text gets a space in front of its own
    encoded = RowEncoder(tokenizer, 64).encode(row("sentiment:", " positive"))
    assert encoded.prompt_ids + encoded.completion_ids == tokenizer("sentiment: positive")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(encoded.completion_ids) == ["▁positive"]


@pytest.mark.parametrize("by", ["normalizer", "pre_tokenizer"])
def test_a_sentencepiece_like_tokenizer_adds_no_space_where_the_completion_has_none(by):
    tokenizer = sentencepiece_like(by)
    ids = RowEncoder(tokenizer, 64).completion_ids("positive")
    assert "".join(tokenizer.convert_ids_to_tokens(ids)) == "positive"


def test_a_word_level_vocabulary_without_the_anchor_loses_no_word_of_the_completion():
    tokenizer = word_level("positive", "film")  # ":" is unknown, and so is ":positive"
    encoder = RowEncoder(tokenizer, 8)
    assert encoder.completion_ids(" positive film") == [3, 4]
    assert encoder.completion_ids("positive film") == [3, 4]
    assert encoder.encode(row("film", "positive")) == Encoded([4], [3])


def test_the_ids_of_a_completion_are_the_callers_to_change(ten):
    encoder = RowEncoder(ten, 8)
    encoder.completion_ids(" d").append(99)
    assert encoder.completion_ids(" d") == [6]


def test_a_beginning_of_sequence_token_stands_before_the_prompt_only(ten):
    encoded = RowEncoder(with_template(ten, "<s> $A"), 8).encode(row("a b", " c"))
    assert encoded == Encoded([1, 3, 4], [5])


@pytest.mark.parametrize("template", ["$A </s>", "<s> $A </s>"])
def test_a_tokenizer_that_ends_every_text_does_not_end_the_prompt(ten, template):
    encoded = RowEncoder(with_template(ten, template), 8).encode(row("a b", " c"))
    assert encoded.prompt_ids[-2:] == [3, 4]
    assert 2 not in encoded.prompt_ids
    assert encoded.completion_ids == [5]


def test_a_prompt_that_ends_with_the_end_token_keeps_it_once(ten):
    assert RowEncoder(ten, 8).encode(row("a </s>", " c")).prompt_ids == [3, 2]
    assert RowEncoder(with_template(ten, "$A </s>"), 8).encode(row("a </s>", " c")).prompt_ids == [3, 2]


def test_append_eos_ends_completions_own_or_given(ten):
    encoder = RowEncoder(ten, 8, append_eos=True)
    assert encoder.encode(row("a b", " c")) == Encoded([3, 4], [5, 2])
    assert encoder.encode(row("a b", " c"), " d e") == Encoded([3, 4], [6, 7, 2])


def test_a_completion_given_stands_in_for_the_rows_own(ten):
    encoder = RowEncoder(ten, 8)
    assert encoder.encode(row("a b", " c"), " j") == Encoded([3, 4], [12])


# ---- cutting ----


def test_a_row_of_exactly_max_length_is_not_cut(ten):
    assert RowEncoder(ten, 5).encode(row("a b c", " d e")) == Encoded([3, 4, 5], [6, 7])


def test_a_long_row_loses_tokens_from_the_start_of_its_prompt(ten):
    assert RowEncoder(ten, 4).encode(row("a b c d", " e f")) == Encoded([5, 6], [7, 8])


def test_a_long_row_keeps_its_beginning_of_sequence_token(ten):
    tokenizer = with_template(ten, "<s> $A")
    assert RowEncoder(tokenizer, 4).encode(row("a b c d", " e f")) == Encoded([1, 6], [7, 8])


def test_the_prompts_last_token_goes_before_the_beginning_of_sequence_token_only_if_both_fit(ten):
    tokenizer = with_template(ten, "<s> $A")
    assert RowEncoder(tokenizer, 3).encode(row("a b c d", " e f")) == Encoded([6], [7, 8])


@pytest.mark.parametrize("max_length", range(4, 14))
def test_the_completion_is_never_cut_and_the_row_is_as_long_as_it_may_be(tokenizer, max_length):
    encoder = RowEncoder(tokenizer, max_length)
    encoded = encoder.encode(row(PROMPT, " positive film bad"))
    assert tokenizer.decode(encoded.completion_ids) == " positive film bad"
    whole = len(tokenizer(PROMPT + " positive film bad")["input_ids"])
    assert len(encoded.prompt_ids) + len(encoded.completion_ids) == min(max_length, whole)
    assert tokenizer(PROMPT)["input_ids"][-len(encoded.prompt_ids) :] == encoded.prompt_ids


def test_a_text_field_loses_tokens_from_its_end(ten):
    encoder = RowEncoder(ten, 6, text_field="text")
    # a b | c d e f | g h + i: three tokens too many, so d e f go.
    assert encoder.encode(row("a b c d e f g h", " i", text="c d e f")) == Encoded([3, 4, 5, 9, 10], [11])


def test_after_its_text_field_a_row_loses_the_start_of_its_prompt(ten):
    encoder = RowEncoder(ten, 4, text_field="text")
    # a b | c d e f | g h + i: five too many, so c d e f go, then a.
    assert encoder.encode(row("a b c d e f g h", " i", text="c d e f")) == Encoded([4, 9, 10], [11])


def test_after_its_text_field_a_row_still_keeps_its_beginning_of_sequence_token(ten):
    encoder = RowEncoder(with_template(ten, "<s> $A"), 4, text_field="text")
    assert encoder.encode(row("a b c d e f g h", " i", text="c d e f")) == Encoded([1, 9, 10], [11])


def test_a_text_field_in_a_row_that_fits_changes_nothing(ten):
    encoder = RowEncoder(ten, 9, text_field="text")
    assert encoder.encode(row("a b c d e f g h", " i", text="c d e f")).prompt_ids == [3, 4, 5, 6, 7, 8, 9, 10]


def test_a_token_that_lies_partly_outside_the_text_field_stays(tokenizer):
    text = "good film about jane"
    prompt = f"### text: {text}\n### sentiment:"
    whole = tokenizer.tokenize(prompt)
    assert whole[3:8] == [":", "Ġgood", "Ġfilm", "Ġabout", "Ġjane"]  # "Ġgood" begins before the text
    for max_length, left in ((14, 3), (13, 2), (12, 1), (11, 0), (10, 0)):
        encoded = RowEncoder(tokenizer, max_length, text_field="text").encode(row(prompt, " positive", text=text))
        expected = (whole[: 5 + left] + whole[8:])[-(max_length - 1) :]
        assert tokenizer.convert_ids_to_tokens(encoded.prompt_ids) == expected


def test_an_empty_text_field_leaves_only_the_prompt_to_cut(ten):
    encoder = RowEncoder(ten, 3, text_field="text")
    assert encoder.encode(row("a b c", " d", text="")) == Encoded([4, 5], [6])


def test_a_text_field_with_a_tokenizer_that_ends_every_text(ten):
    encoder = RowEncoder(with_template(ten, "<s> $A </s>"), 5, text_field="text")
    assert encoder.encode(row("a b c d", " i", text="b c d")) == Encoded([1, 3, 4, 5], [11])


# ---- conversations ----


def talk(question: str, answer: str) -> dict[str, list[dict[str, str]]]:
    return {
        "prompt": [{"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": answer}],
    }


@pytest.fixture
def chatty(tokenizer):
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def test_a_conversation_is_rendered_by_the_chat_template_and_cut_where_the_answer_begins(chatty):
    encoded = RowEncoder(chatty, 64).encode(talk("is the film good", "unknown"))
    assert chatty.decode(encoded.prompt_ids) == "<s>user\nis the film good</s><s>assistant\n"
    assert chatty.decode(encoded.completion_ids) == "unknown</s>"
    whole = "<s>user\nis the film good</s><s>assistant\nunknown</s>"
    assert chatty.decode(encoded.prompt_ids + encoded.completion_ids) == whole


def test_a_generic_completion_in_a_conversation_takes_the_answers_place_with_its_role_and_ending(chatty):
    encoded = RowEncoder(chatty, 64).encode(talk("is the film good", "jane doe"), " unknown")
    assert encoded == RowEncoder(chatty, 64).encode(talk("is the film good", "unknown"))


def test_conversations_of_several_turns_keep_all_of_them(chatty):
    messages = [
        {"role": "system", "content": "film"},
        {"role": "user", "content": "good"},
        {"role": "assistant", "content": "bad"},
        {"role": "user", "content": "plot"},
    ]
    encoded = RowEncoder(chatty, 64).encode(
        {"prompt": messages, "completion": [{"role": "assistant", "content": "jane"}]}
    )
    expected = "<s>system\nfilm</s><s>user\ngood</s><s>assistant\nbad</s><s>user\nplot</s><s>assistant\n"
    assert chatty.decode(encoded.prompt_ids) == expected
    assert chatty.decode(encoded.completion_ids) == "jane</s>"


def test_append_eos_leaves_conversations_to_their_template(chatty):
    rendered = talk("is the film good", "unknown")
    assert RowEncoder(chatty, 64, append_eos=True).encode(rendered) == RowEncoder(chatty, 64).encode(rendered)


def test_a_long_conversation_loses_the_start_of_its_prompt_after_the_first_token(chatty):
    whole = RowEncoder(chatty, 64).encode(talk("is the film good", "unknown"))
    cut = RowEncoder(chatty, 8).encode(talk("is the film good", "unknown"))
    assert cut.completion_ids == whole.completion_ids
    room = 8 - len(whole.completion_ids)
    assert cut.prompt_ids == [1, *whole.prompt_ids[-(room - 1) :]]


def test_a_template_that_renders_the_prompt_differently_is_refused(tokenizer):
    tokenizer.chat_template = (
        "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}:{% endif %}"
    )
    with pytest.raises(ValueError, match="the chat template renders the prompt differently"):
        RowEncoder(tokenizer, 64).encode(talk("is the film good", "unknown"))


# ---- one beginning of the sequence ----


def test_a_prompt_that_begins_with_the_beginning_of_sequence_token_gets_no_second_one(ten):
    tokenizer = with_template(ten, "<s> $A")
    assert tokenizer("<s> a b")["input_ids"] == [1, 1, 3, 4]  # the trap
    assert RowEncoder(tokenizer, 8).encode(row("<s> a b", " c")) == Encoded([1, 3, 4], [5])
    assert RowEncoder(tokenizer, 8).encode(row("a <s> b", " c")) == Encoded([1, 3, 1, 4], [5])
    assert RowEncoder(word_level(*"abc"), 8).encode(row("<s> a b", " c")) == Encoded([1, 3, 4], [5])


def test_a_text_field_is_found_after_the_one_beginning_of_sequence_token(ten):
    encoder = RowEncoder(with_template(ten, "<s> $A </s>"), 5, text_field="text")
    assert encoder.encode(row("<s> a b c d", " i", text="b c d")) == Encoded([1, 3, 4, 5], [11])


def test_a_conversation_rendered_to_text_is_encoded_as_the_conversation(chatty):
    chatty = with_template(chatty, "<s> $A")
    messages = talk("is the film good", "unknown")
    text = chatty.apply_chat_template(messages["prompt"], add_generation_prompt=True, tokenize=False)
    encoder = RowEncoder(chatty, 64)
    assert encoder.encode(row(text, "unknown")).prompt_ids == encoder.encode(messages).prompt_ids


# ---- what a chat template adds after the answer ----

ENDINGS = {  # after the answer: the whole of it, and what is trained
    "end of turn and newline": ("</s>\n", "</s>"),
    "end of turn": ("</s>", "</s>"),
    "newline, end of turn, newline": ("\n</s>\n", "\n</s>"),
    "two special tokens": ("</s><s>", "</s>"),
    "text": (" .\n", " ."),
    "newline": ("\n", ""),
    "nothing": ("", ""),
}


@pytest.mark.parametrize("answer", ["unknown", "the film is good", "s", "is", "a\nb", "</s>", "user"])
@pytest.mark.parametrize("ending", ENDINGS)
def test_the_completion_ends_with_the_end_of_turn_and_the_answers_own_tokens_are_known(tokenizer, ending, answer):
    whole, trained = ENDINGS[ending]
    tokenizer.chat_template = (
        "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}"
        + whole.replace("\n", "{{ '\\n' }}")
        + "{% endfor %}{% if add_generation_prompt %}<s>assistant\n{% endif %}"
    )
    messages = talk("is the film good", answer)
    rendered = tokenizer.apply_chat_template([*messages["prompt"], *messages["completion"]], tokenize=False)
    assert rendered.endswith(f"assistant\n{answer}{whole}")
    encoder = RowEncoder(tokenizer, 64)
    for encoded in (encoder.encode(messages), encoder.encode(talk("is the film good", "jane"), answer)):
        assert tokenizer.decode(encoded.completion_ids) == answer + trained
        assert tokenizer.decode(encoded.without_ending().completion_ids) == answer
        assert encoded.without_ending().prompt_ids == encoded.prompt_ids


@pytest.mark.parametrize("append_eos", [False, True])
def test_the_end_of_a_text_completion_is_known_whatever_it_came_from(ten, append_eos):
    encoder = RowEncoder(ten, 8, append_eos=append_eos)
    plain, collator = RowEncoder(ten, 8), ForgetRetainCollator(ten, None, max_length=8, append_eos=append_eos)
    given = row("a b", " c d")
    tokenized = collator.tokenize(given)
    for encoded in (encoder.encode(given), encoder.encode(tokenized), encoder.encode(row("a b", " e"), " c d")):
        assert encoded.completion_ids[-1] == ten.eos_token_id or not append_eos
        assert encoded.without_ending() == plain.encode(given)
    assert encoder.encode(tokenized, " e").without_ending().completion_ids == plain.completion_ids(" e")
    assert encoder.answer_ids(" c d", given) == plain.completion_ids(" c d")


def test_an_answer_in_a_conversation_has_no_end_of_turn(chatty):
    messages = talk("is the film good", "unknown")
    ids = RowEncoder(chatty, 64, append_eos=True).answer_ids("jane", messages)
    assert chatty.decode(ids) == "jane"


# ---- where a completion meets its prompt ----


@pytest.mark.parametrize(
    ("prompt", "completion", "tokens"),
    [
        ("sentiment: ", "positive", "as one text they end in the tokens [':', 'Ġpositive'], but are used as [':', 'Ġ"),
        ("the fil", "m", "as one text they end in the tokens ['Ġfilm'], but are used as"),
        ("sentiment:", "positive", "has no space before it, and follows 'sentiment:': its tokens are ["),
    ],
)
def test_a_completion_that_does_not_fit_its_prompt_is_warned_of_once_with_the_tokens(
    tokenizer, caplog, prompt, completion, tokens
):
    encoder = RowEncoder(tokenizer, 64)
    for _ in range(3):
        encoder.encode(row(prompt, completion))
        encoder.encode(row("the review is ", "bad"))
    assert len(caplog.records) == 1
    assert tokens.split("[")[0] in caplog.text


def test_the_tokens_of_a_completion_with_and_without_its_space_are_those_of_the_tokenizer(tokenizer, caplog):
    RowEncoder(tokenizer, 64).encode(row("sentiment:", "positive"))
    without, with_space = (tokenizer.tokenize(text) for text in ("positive", " positive"))
    assert with_space == ["Ġpositive"] != without
    assert f"its tokens are {without}, with a space {with_space}" in caplog.text


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("sentiment:", " positive"),
        ("sentiment:\n", "positive"),
        ("sentiment:", "\npositive"),
        ("the film", "."),
        ("a film (", "good"),
        ("<s>user\nfilm</s>", "good"),
        ("x:", "\u597d"),
    ],
)
@pytest.mark.parametrize("append_eos", [False, True])
def test_a_completion_that_fits_its_prompt_is_not_warned_of(tokenizer, caplog, prompt, completion, append_eos):
    for given in (tokenizer, with_template(tokenizer, "<s> $A </s>")):
        RowEncoder(given, 64, append_eos=append_eos).encode(row(prompt, completion))
    assert not caplog.records


def test_a_tokenizer_to_which_spaces_make_no_difference_is_not_warned_of(caplog):
    tokenizer = word_level("film:", "positive", ":")
    RowEncoder(tokenizer, 8).encode(row("film: ", "positive"))
    RowEncoder(sentencepiece_like(), 64).encode(row("sentiment:", " positive"))
    assert not caplog.records


def test_a_generic_completion_without_the_space_is_warned_of_too(tokenizer, caplog):
    encoder = RowEncoder(tokenizer, 64)
    encoder.encode(row("sentiment:", " positive"))
    encoder.encode(row("sentiment:", " positive"), "unknown")
    assert "the completion 'unknown' has no space before it" in caplog.text


# ---- tokenized rows ----


def test_tokenized_rows_are_split_by_their_mask(ten):
    tokenized = {"input_ids": [3, 4, 5, 6], "completion_mask": [0, 0, 1, 1]}
    assert RowEncoder(ten, 8).encode(tokenized) == Encoded([3, 4], [5, 6])
    assert RowEncoder(ten, 8).encode(tokenized, " j") == Encoded([3, 4], [12])


def test_tokenized_rows_that_are_too_long_are_cut_as_others(ten):
    tokenized = {"input_ids": [1, 4, 5, 6, 7], "completion_mask": [0, 0, 0, 1, 1]}
    assert RowEncoder(ten, 4).encode(tokenized) == Encoded([1, 5], [6, 7])


def test_token_ids_count_where_a_row_has_text_as_well(ten):
    both = {**row("a", " b"), "input_ids": [5, 6], "completion_mask": [0, 1]}
    assert RowEncoder(ten, 8).encode(both) == Encoded([5], [6])


@pytest.mark.parametrize("mask", [None, [0, 1]])
def test_token_ids_without_a_mask_of_their_length_are_refused(ten, mask):
    tokenized = {"input_ids": [3, 4, 5]} | ({} if mask is None else {"completion_mask": mask})
    with pytest.raises(ValueError, match=r"a completion_mask of the same length.*remove_unused_columns=False"):
        RowEncoder(ten, 8).encode(tokenized)


def test_a_mask_with_a_prompt_token_after_the_completion_is_refused(ten):
    with pytest.raises(ValueError, match=r"0 for the prompt, then 1 for the completion; got \[0, 1, 0\]"):
        RowEncoder(ten, 8).encode({"input_ids": [3, 4, 5], "completion_mask": [0, 1, 0]})


@pytest.mark.parametrize(("mask", "what"), [([1, 1], "the prompt"), ([0, 0], "the completion")])
def test_a_mask_that_leaves_nothing_is_refused(ten, mask, what):
    with pytest.raises(ValueError, match=f"{what} of a row has no tokens"):
        RowEncoder(ten, 8).encode({"input_ids": [3, 4], "completion_mask": mask})


# ---- what is refused ----


@pytest.mark.parametrize("max_length", [1, 0, -5])
def test_a_length_without_room_for_prompt_and_completion_is_refused(ten, max_length):
    with pytest.raises(ValueError, match=f"max_length={max_length}; expected at least 2"):
        RowEncoder(ten, max_length)


def test_a_completion_that_fills_the_whole_row_is_refused(ten):
    with pytest.raises(ValueError, match="a completion has 3 tokens and max_length=3 leaves no room for a prompt"):
        RowEncoder(ten, 3).encode(row("a", " b c d"))
    assert RowEncoder(ten, 4).encode(row("a", " b c d")) == Encoded([3], [4, 5, 6])


def test_missing_columns_are_named_with_the_trainers_option(ten):
    with pytest.raises(ValueError, match=r"columns \['labels', 'prompt'\].*remove_unused_columns=False"):
        RowEncoder(ten, 8).encode({"prompt": "a", "labels": 1})


@pytest.mark.parametrize("completion", ["", "  ", None])
def test_an_empty_completion_is_refused(ten, completion):
    with pytest.raises(ValueError, match=r"a row has an empty completion: .*'prompt': 'a'"):
        RowEncoder(ten, 8).encode({"prompt": "a", "completion": completion})


def test_a_prompt_without_tokens_is_refused(ten):
    with pytest.raises(ValueError, match=r"the prompt of a row has no tokens: .*'completion': ' b'"):
        RowEncoder(ten, 8).encode(row("", " b"))
    assert RowEncoder(with_template(ten, "<s> $A"), 8).encode(row("", " b")) == Encoded([1], [4])


def test_append_eos_without_an_eos_token_is_refused(ten):
    ten.eos_token = None
    with pytest.raises(ValueError, match="append_eos=True, but the tokenizer has no eos_token"):
        RowEncoder(ten, 8, append_eos=True)


def test_a_text_field_needs_a_fast_tokenizer(ten, monkeypatch):
    monkeypatch.setattr(type(ten), "is_fast", property(lambda self: False))
    with pytest.raises(ValueError, match="text_field='text' needs a fast tokenizer"):
        RowEncoder(ten, 8, text_field="text")


def test_a_text_field_that_a_row_lacks_is_refused_with_its_columns(ten):
    with pytest.raises(ValueError, match=r"text_field='text', but a row has only the columns \['completion', 'prom"):
        RowEncoder(ten, 8, text_field="text").encode(row("a", " b"))


def test_a_text_field_that_is_not_in_the_prompt_is_refused(ten):
    with pytest.raises(ValueError, match="the text of column 'text' is not part of the prompt of its row"):
        RowEncoder(ten, 8, text_field="text").encode(row("a", " b", text="c"))


def test_a_tokenizer_that_grows_and_an_end_that_is_switched_off_reach_what_was_cached():
    encoder = RowEncoder(make_tokenizer(), 64, append_eos=True)
    before = encoder.completion_ids(" positive")
    assert before[-1] == encoder.tokenizer.eos_token_id
    encoder.append_eos = False
    assert encoder.completion_ids(" positive") == before[:-1]
    encoder.tokenizer.add_tokens([" positive"])
    assert encoder.completion_ids(" positive") == [len(encoder.tokenizer) - 1]


# ---- where a soft prompt stands ----


def at_message(tokenizer, max_length=64, **kwargs):
    return RowEncoder(tokenizer, max_length, prompt_position="message", **kwargs)


def halves(tokenizer, encoded):
    at = encoded.prompt_position
    return tokenizer.decode(encoded.prompt_ids[:at]), tokenizer.decode(encoded.prompt_ids[at:])


def test_a_prompt_at_message_stands_before_the_text_field(tokenizer):
    encoder = at_message(tokenizer, text_field="text")
    for text in ("good film", "a", "plot: good", "\ngood"):
        prompt = f"### text: {text}\n### sentiment:"
        before, after = halves(tokenizer, encoder.encode(row(prompt, " positive", text=text)))
        assert before + after == prompt
        assert after.lstrip(" ").startswith(text.lstrip(" "))  # a token may hold the space before the text
        assert before == "### text:" if not after.startswith(text) else before == "### text: "


def test_it_stands_before_the_last_occurrence_of_the_text(tokenizer):
    question = "### text: good\n### sentiment:"
    encoder = at_message(tokenizer, text_field="text")
    encoded = encoder.encode(row(f"{question} positive\n\n{question}", " positive", text="good"))
    before, after = halves(tokenizer, encoded)
    assert before.endswith("\n\n### text:")
    assert after == " good\n### sentiment:"


@pytest.mark.parametrize("room", range(2, 24))
def test_whatever_is_cut_it_stands_before_what_is_left_of_the_text(tokenizer, room):
    prompt, text = "### text: the plot of the film is bad\n### sentiment:", "the plot of the film is bad"
    whole = at_message(tokenizer, text_field="text").encode(row(prompt, " positive", text=text))
    encoded = at_message(tokenizer, room, text_field="text").encode(row(prompt, " positive", text=text))
    behind = whole.prompt_ids[whole.prompt_position :]
    assert len(encoded) <= room
    assert encoded.prompt_ids == RowEncoder(tokenizer, room, "text").encode(row(prompt, " p", text=text)).prompt_ids
    rest = iter(behind)
    assert all(token in rest for token in encoded.prompt_ids[encoded.prompt_position :])  # in their order
    assert encoded.prompt_position <= whole.prompt_position
    if room > len(whole.prompt_ids) - len(text.split()):  # the text's words are a token each
        assert encoded.prompt_position == whole.prompt_position


def test_a_beginning_of_sequence_token_stands_before_it(ten):
    encoder = at_message(with_template(ten, "<s> $A"), 5, text_field="text")
    assert encoder.encode(row("a b c", " j", text="a b c")).prompt_position == 1
    cut = encoder.encode(row("a b c d e f g", " j", text="c"))
    assert (cut.prompt_ids, cut.prompt_position) == ([1, 7, 8, 9], 1)


def test_it_stands_before_the_last_user_message_of_a_conversation_also_of_a_cut_one(tokenizer):
    tokenizer.chat_template = CHAT_TEMPLATE
    turns = [("user", "good film"), ("assistant", "positive"), ("user", "the plot is bad")]
    messages = [{"role": role, "content": content} for role, content in turns]
    rows = {"prompt": messages, "completion": [{"role": "assistant", "content": "negative"}]}
    encoded = at_message(tokenizer, 256).encode(rows)
    assert halves(tokenizer, encoded)[1] == "the plot is bad</s><s>assistant\n"
    assert halves(tokenizer, encoded)[0].endswith("<s>user\n")
    behind = len(encoded.prompt_ids) - encoded.prompt_position
    cut = at_message(tokenizer, len(encoded) - encoded.prompt_position + 1).encode(rows)
    assert (cut.prompt_position, len(cut.prompt_ids)) == (1, behind + 1)
    assert cut.prompt_ids[0] == tokenizer.bos_token_id


def test_a_text_prompt_without_a_text_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"no text_field is named: .*text_field=\"text\""):
        at_message(tokenizer).encode(row(PROMPT, " positive"))
    with pytest.raises(ValueError, match="that of column 'text' is empty"):
        at_message(tokenizer, text_field="text").encode(row(PROMPT, " positive", text=" "))
    with pytest.raises(ValueError, match="prompt_position='inside'; expected \"start\""):
        RowEncoder(tokenizer, 64, prompt_position="inside")


def test_a_tokenized_row_says_where_or_is_refused(ten):
    encoder, tokenized = at_message(ten, 5), {"input_ids": [3, 4, 5, 6], "completion_mask": [0, 0, 0, 1]}
    assert encoder.encode({**tokenized, "prompt_position": 2}).prompt_position == 2
    assert encoder.with_max_length(2).encode({**tokenized, "prompt_position": 2}).prompt_position == 0
    assert encoder.with_max_length(3).encode({**tokenized, "prompt_position": 3}).prompt_position == 2
    for wrong in ({}, {"prompt_position": 4}, {"prompt_position": -1}, {"prompt_position": True}):
        with pytest.raises(ValueError, match=r"expected a whole number from 0 to 3.*prompt_position=\"message\""):
            encoder.encode({**tokenized, **wrong})
    assert RowEncoder(ten, 5).encode(tokenized).prompt_position is None


def test_prompts_for_generation_have_positions_and_no_completions(tokenizer):
    tokenizer.chat_template = CHAT_TEMPLATE
    encoder = at_message(tokenizer, text_field="text")
    messages = [{"role": "user", "content": "the plot is bad"}]
    batch = encoder.prompts([{"prompt": PROMPT, "text": "good film"}, {"prompt": messages}])
    own = [ids[mask.bool()] for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    texts = [tokenizer.decode(ids[at:]) for ids, at in zip(own, batch["prompt_position"].tolist(), strict=True)]
    assert texts == [" good film\n### sentiment:", "the plot is bad</s><s>assistant\n"]
    assert batch["attention_mask"][:, -1].tolist() == [1, 1]
    short = encoder.with_max_length(10).prompts([{"prompt": PROMPT, "text": "good film"}], reserve=4)
    assert short["input_ids"].shape == (1, 6)
    with pytest.raises(ValueError, match="prompt"):
        encoder.prompts([{"text": "good film"}])
    plain = RowEncoder(tokenizer, 64).prompts([{"prompt": PROMPT}])
    assert sorted(plain) == ["attention_mask", "input_ids"]


def test_batches_have_positions_if_prompts_stand_at_message(tokenizer):
    rows = [row(PROMPT, " positive", text="good film"), row("### text: bad", " negative", text="bad")]
    encoder = at_message(tokenizer, text_field="text")
    assert encoder.batch(rows)["prompt_position"].tolist() == [encoder.encode(one).prompt_position for one in rows]
    assert "prompt_position" not in RowEncoder(tokenizer, 64, "text").batch(rows)
