"""Bodies of requests: read, or refused with the field at fault."""

from __future__ import annotations

import json

import pytest

from spul.serving.errors import ApiError
from spul.serving.requests import Limits, Sampling, read_body

LIMITS = Limits(max_new_tokens=32)
MESSAGES = [{"role": "user", "content": "good"}]


def read(kind="completion", **fields):
    content = {"messages": MESSAGES} if kind == "chat" else {"prompt": "good"}
    return read_body(kind, json.dumps({"model": "m", **content, **fields}).encode(), "m", LIMITS)


def refusal(body=None, kind="completion", **fields):
    with pytest.raises(ApiError) as caught:
        read(kind, **fields) if body is None else read_body(kind, body, "m", LIMITS)
    error = caught.value.body()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return caught.value.status, error["param"]


def test_defaults_are_those_of_openai():
    assert read().sampling == read("chat").sampling == Sampling(1.0, 1.0, None, ())
    assert (read().max_tokens, read("chat").max_tokens) == (16, None)
    assert not read().stream


def test_fields_are_read():
    found = read("chat", temperature=0, top_p=0.5, seed=3, stop="x", max_completion_tokens=4, stream=True, user="me",
                 stream_options={"include_usage": True})  # fmt: skip
    assert found.sampling == Sampling(0.0, 0.5, 3, ("x",))
    assert (found.max_tokens, found.stream, found.include_usage) == (4, True, True)
    assert found.content == MESSAGES
    assert read("chat", max_tokens=4, max_completion_tokens=4).max_tokens == 4


def test_messages_are_texts_and_parts_of_text():
    said = {"role": "assistant", "content": "a", "tool_calls": None, "refusal": None}
    parts = {"role": "user", "content": [{"type": "text", "text": "b"}, {"type": "text", "text": "c"}]}
    assert read("chat", messages=[said, parts]).content == [
        {"role": "assistant", "content": "a"},
        parts,
    ]


def test_prompts_are_one_text_or_one_list_of_ids():
    assert [read(prompt=one).content for one in ("a", ["a"], [1, 2], [[1, 2]])] == ["a", "a", [1, 2], [1, 2]]


@pytest.mark.parametrize("fields", [
    {"n": 1}, {"logprobs": None}, {"tools": None}, {"presence_penalty": 0.0}, {"frequency_penalty": 0},
    {"logit_bias": {}}, {"response_format": {"type": "text"}}, {"best_of": 1}, {"echo": False},
])  # fmt: skip
def test_what_asks_for_nothing_is_taken(fields):
    assert read(**fields) == read()


@pytest.mark.parametrize(("param", "value"), [
    ("n", 2), ("n", True), ("logprobs", 1), ("logprobs", 0), ("echo", True), ("suffix", "x"), ("best_of", 2),
    ("presence_penalty", 0.1), ("frequency_penalty", -1), ("logit_bias", {"3": 1}), ("tools", [{}]), ("top_k", 5),
    ("response_format", {"type": "json_object"}), ("adapter_names", ["__base__"]), ("prompt_embeds", "x"),
    ("temperature", -0.1), ("temperature", 2.1), ("temperature", True), ("temperature", "1"), ("top_p", 0),
    ("top_p", 1.1), ("seed", 1.5), ("seed", 2**64), ("max_tokens", 0), ("max_tokens", 33), ("max_tokens", 1.0),
    ("stop", ""), ("stop", ["a"] * 5), ("stop", 3), ("stream", "yes"), ("stream", 1), ("prompt", ""), ("prompt", []),
    ("prompt", ["a", "b"]), ("prompt", [True]), ("prompt", [[1], [2]]), ("prompt", {"a": 1}),
    ("stream_options", {"include_usage": True}), ("stream_options", []), ("stream_options", False),
    ("model", None), ("messages", MESSAGES),
])  # fmt: skip
def test_what_is_malformed_or_not_supported_is_refused_with_its_name(param, value):
    assert refusal(**{param: value}) == (400, param)


@pytest.mark.parametrize("message", [
    "good", {"content": "a"}, {"role": "tool", "content": "a"}, {"role": "user"}, {"role": "user", "content": []},
    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
    {"role": "user", "content": [{"type": "text", "text": "a", "cache": 1}]}, {"role": "user", "content": 3},
    {"role": "user", "content": [{"type": "text", "text": 3}]}, {"role": "user", "content": "a", "name": "me"},
    {"role": "assistant", "content": "a", "tool_calls": [{}]}, {"role": ["user"], "content": "a"},
])  # fmt: skip
def test_messages_that_are_no_plain_texts_are_refused(message):
    assert refusal(kind="chat", messages=[*MESSAGES, message]) == (400, "messages[1]")


def test_lengths_that_contradict_each_other_and_empty_conversations_are_refused():
    assert refusal(kind="chat", max_tokens=3, max_completion_tokens=4)[0] == 400
    assert refusal(kind="chat", messages=[]) == (400, "messages")
    assert refusal(kind="chat", prompt="good") == (400, "prompt")
    assert refusal(max_completion_tokens=4) == (400, "max_completion_tokens")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"\xff",
        b'{"seed": NaN}',
        b"[" * 100_000,
        b"3",
        b'{"prompt": "\\ud800"}',
        b'{"\\udfff": 1}',
        b'{"stop": "\xed\xa0\x80"}',
        b'{"seed": 1' + b"0" * 9999 + b"}",
    ],
)
def test_what_is_no_json_object_is_refused(body):
    assert refusal(body) == (400, None)


@pytest.mark.parametrize(
    ("body", "key"),
    [
        (b'{"model": "m", "prompt": "good", "seed": 1, "prompt": "bad"}', "'prompt'"),
        (b'{"model": "m", "messages": [{"role": "user", "content": "good", "content": "bad"}]}', "'content'"),
        (b'{"a": 1, "\\u0061": 1}', "'a'"),
        (b'{"\\udfff": 1, "\\udfff": 2}', r"'\udfff'"),
    ],
)
def test_a_key_that_is_given_twice_is_refused_by_its_name_since_readers_take_either(body, key):
    with pytest.raises(ApiError) as caught:
        read_body("completion", body, "m", LIMITS)
    assert (caught.value.status, caught.value.message) == (400, f"the key {key} is given twice; expected it once.")
    json.dumps(caught.value.body(), ensure_ascii=False).encode()


def test_another_model_is_not_found():
    assert refusal(model="n") == (404, "model")


@pytest.mark.parametrize("name", ["max_body_bytes", "max_new_tokens", "max_batch", "max_waiting", "timeout"])
@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), 1e300])
def test_limits_are_above_0_and_finite(name, value):
    with pytest.raises(ValueError, match=name):
        Limits(**{name: value})
