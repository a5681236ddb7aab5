"""RowEncoder: where a soft prompt at the message stands."""

from __future__ import annotations

import pytest
from encoded import PROMPT, row, with_template
from helpers import CHAT_TEMPLATE

from spul.data import ForgetRetainCollator, RowEncoder


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


def test_prompts_of_no_rows_or_of_tokenized_ones_say_what_is_expected(tokenizer):
    collator = ForgetRetainCollator(tokenizer, None, text_field="text", prompt_position="message")
    with pytest.raises(ValueError, match="no rows to continue; expected a list of at least one"):
        collator.encoder.prompts([])
    row = {"prompt": PROMPT, "completion": " positive", "text": "good film"}
    with pytest.raises(ValueError, match="a row is tokenized, without its prompt; expected rows with prompt"):
        collator.encoder.prompts([collator.tokenize(row)])


def test_batches_have_positions_if_prompts_stand_at_message(tokenizer):
    rows = [row(PROMPT, " positive", text="good film"), row("### text: bad", " negative", text="bad")]
    encoder = at_message(tokenizer, text_field="text")
    assert encoder.batch(rows)["prompt_position"].tolist() == [encoder.encode(one).prompt_position for one in rows]
    assert "prompt_position" not in RowEncoder(tokenizer, 64, "text").batch(rows)
