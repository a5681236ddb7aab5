"""Text of tokens as they come: whole characters, up to a stop text; joined it is what the tokens say at once."""

from __future__ import annotations

import random

import pytest
from helpers import make_tokenizer

from spul.serving.answers import Answer, AnswerParts, AnswerText, Piece

STOPS = [(), ("film",), ("lm is", "is good"), ("zz",), ("the film is good",), ("\u00e9",)]


def parts(tokenizer, ids, stop=(), request=()):
    text, found = AnswerText(tokenizer, request, stop), []
    for one in ids:
        found.append(text.push(one))
        if text.stopped:
            break
    return [*found, text.finish()], text.stopped


def cut(text, stop):
    """The slow way: the text before the first stop text in it."""
    ends = [text.index(one) for one in stop if one in text]
    return text[: min(ends, default=len(text))]


@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize(
    "text", ["the film is good", "caf\u00e9 \u4e2d\u6587 \U0001f600 fi film", "fil fi the filfilm"]
)
def test_parts_joined_are_the_text_before_the_first_stop(text, stop):
    tokenizer = make_tokenizer()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    found, stopped = parts(tokenizer, ids, stop, request=tokenizer("about jane")["input_ids"])
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    assert "".join(found) == cut(whole, stop)
    assert stopped == any(one in whole for one in stop)


@pytest.mark.parametrize("seed", range(20))
def test_any_tokens_give_what_they_say_at_once(seed):
    """Also bytes that are no characters."""
    tokenizer, draws = make_tokenizer(), random.Random(seed)
    ids = [draws.randrange(len(tokenizer)) for _ in range(30)]
    assert "".join(parts(tokenizer, ids)[0]) == tokenizer.decode(ids, skip_special_tokens=True)


def test_parts_are_sent_as_they_come_and_hold_back_what_may_be_a_stop():
    tokenizer = make_tokenizer()
    ids = tokenizer("good film bad", add_special_tokens=False)["input_ids"]
    assert sum(bool(one) for one in parts(tokenizer, ids)[0]) > 2
    text = AnswerText(tokenizer, [], ("film good",))
    sent = "".join(text.push(one) for one in tokenizer("bad film", add_special_tokens=False)["input_ids"])
    assert sent == "bad "
    assert text.finish() == "film"


@pytest.mark.parametrize(
    ("num", "stop", "ends", "expected"),
    [(9, (), {2}, [(" good", 1, None), (" film", 2, None), ("", 3, "stop")]),
     (2, (), {2}, [(" good", 1, None), (" film", 2, "length")]),
     (9, ("ilm",), {2}, [(" good", 1, None), (" f", 2, "stop")]),
     (9, (), {7}, [(" good", 1, None), (" film", 2, None), ("", 3, "length")])],
)  # fmt: skip
def test_parts_end_at_an_end_token_a_stop_text_or_the_most_tokens_and_count_them(num, stop, ends, expected):
    tokenizer = make_tokenizer()
    ids = [*tokenizer(" good film", add_special_tokens=False)["input_ids"], 2]
    parts = AnswerParts(tokenizer, [], stop, num, ends)
    found = [parts.push(one) for one in ids if not parts.is_done] + [parts.end()]
    assert [(one.text, one.num_tokens, one.finish_reason) for one in found if one is not None] == expected
    assert parts.is_done


def test_bodies_of_chats_and_completions_have_the_shape_of_openai():
    last = Piece("b", 2, "stop")
    chat, text = Answer("chat", "m", 3), Answer("completion", "m", 3)
    assert chat.whole("ab", last)["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    assert chat.whole("ab", last)["choices"][0]["message"] == {"role": "assistant", "content": "ab"}
    assert text.whole("ab", last)["choices"][0]["text"] == "ab"
    assert [one.whole("ab", last)["object"] for one in (chat, text)] == ["chat.completion", "text_completion"]
    assert chat.chunk(last, False)["choices"][0]["delta"] == {"content": "b"}
    assert chat.chunk(last, True)["choices"][0]["delta"] == {"role": "assistant", "content": "b"}
    assert text.chunk(last, True)["choices"][0] == {"index": 0, "text": "b", "logprobs": None, "finish_reason": "stop"}
