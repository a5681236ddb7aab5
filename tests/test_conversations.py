"""Where the last user message of a conversation begins, by the chat template; its text; which prompts are equal."""

import json

import pytest
from datasets import Dataset
from helpers import CHAT_TEMPLATE, make_tokenizer

from spul.data.conversations import (
    comparable,
    content_of,
    conversation_prompt_ids,
    leaves_out,
    message_start,
    with_content,
)
from spul.data.encoder import RowEncoder

TURNS = [
    {"role": "system", "content": "the plot"},
    {"role": "user", "content": "good film"},
    {"role": "assistant", "content": "positive"},
    {"role": "user", "content": "about jane doe"},
]


def chatty(template=CHAT_TEMPLATE):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def uncached(key, compute):
    return list(compute())


def halves(tokenizer, messages):
    """The texts before and after the place of the prompt."""
    ids = conversation_prompt_ids(tokenizer, messages, uncached)
    start = message_start(tokenizer, messages, uncached)
    return tokenizer.decode(ids[:start]), tokenizer.decode(ids[start:])


@pytest.mark.parametrize("num", [2, 4])
@pytest.mark.parametrize("content", ["about jane doe", "a", "z", "answer", "", " good film ", "good film", "</s>"])
def test_the_place_is_after_the_role_header_of_the_last_user_message(content, num):
    messages = [*TURNS[: num - 1], {"role": "user", "content": content}]
    before, after = halves(chatty(), messages)
    assert before.endswith("<s>user\n")
    assert after == f"{content}</s><s>assistant\n"
    assert before.count("<s>") == num


def test_messages_after_it_stay_behind_the_place():
    before, after = halves(chatty(), [*TURNS, {"role": "tool", "content": "bad"}])
    assert before.endswith("<s>user\n")
    assert after == "about jane doe</s><s>tool\nbad</s><s>assistant\n"


def test_a_message_in_parts_begins_at_its_first_text():
    template = (
        "{% for m in messages %}{{ m['role'] }}:{% for part in m['content'] %}"
        "{{ '<unk>' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endfor %}"
    )
    parts = [{"type": "image"}, {"type": "text", "text": "good film"}, {"type": "text", "text": " about jane"}]
    before, after = halves(chatty(template), [{"role": "user", "content": parts}])
    assert (before, after) == ("user:<unk>", "good film about jane")


def test_a_token_that_begins_before_the_message_is_not_split():
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] | trim }}\n{% endfor %}"
    before, after = halves(chatty(template), [{"role": "user", "content": " film"}])
    assert (before, after) == ("user:", " film\n")  # " film" is one token


def test_a_conversation_without_a_user_message_is_refused():
    with pytest.raises(ValueError, match=r'the last message of the role "user", and there is none: .*Expected one'):
        message_start(chatty(), TURNS[:1], uncached)


@pytest.mark.parametrize(
    "content", ["{{ m['content'] | upper }}", "{{ m['content'] | length }}", "nothing", "{{ m['content'][1:] }}"]
)
def test_a_template_that_does_not_show_where_the_message_stands_is_refused(content):
    template = "{% for m in messages %}<s>{{ m['role'] }}\n" + content + "</s>{% endfor %}"
    with pytest.raises(ValueError, match="does not show where the last user message stands"):
        message_start(chatty(template), TURNS, uncached)


def test_a_tokenizer_without_offsets_is_refused(monkeypatch):
    tokenizer = chatty()
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    with pytest.raises(ValueError, match="is not a fast tokenizer"):
        message_start(tokenizer, TURNS, uncached)


# ---- messages in parts ----

PHOTO = {"type": "image", "text": None}


def part(text):
    return {"type": "text", "text": text}


@pytest.mark.parametrize(
    ("content", "text", "changed"),
    [
        ("a b", "a b", "new"),
        (None, None, "new"),
        ([part("a ")], "a ", [part("new")]),
        ([part("a "), part("b")], "a b", [part("new")]),
        ([PHOTO, part("a "), PHOTO, part("b"), PHOTO], "a b", [PHOTO, part("new"), PHOTO, PHOTO]),
        ([PHOTO], None, [PHOTO, part("new")]),
        ([], None, [part("new")]),
    ],
)
def test_all_texts_of_a_message_are_one_and_another_stands_in_place_of_the_first(content, text, changed):
    message = {"role": "user", "content": content}
    assert content_of(message) == text
    assert with_content(message, "new") == {"role": "user", "content": changed}
    assert message["content"] == content


def test_a_message_without_content_has_no_text():
    assert content_of({"role": "assistant", "tool_calls": []}) is None


# ---- equal prompts ----


def user(content, **more):
    return [{"role": "user", "content": content, **more}]


@pytest.mark.parametrize(
    "same",
    [
        [{"content": "a b", "role": "user"}],
        user("a b", name=None),
        user([part("a b")]),
        user([part("a "), {"text": "b", "type": "text", "url": None}]),
    ],
)
def test_order_of_fields_empty_fields_and_parts_make_no_other_prompt(same):
    assert comparable(same) == comparable(user("a b"))
    assert hash(comparable(same)) == hash(comparable(user("a b")))


@pytest.mark.parametrize(
    "other",
    [
        "a b",
        str(user("a b")),
        json.dumps(user("a b"), sort_keys=True),
        user("a b."),
        user("a b", name="x"),
        [{"role": "system", "content": "a b"}],
        user("a b") * 2,
        user([part("a b"), PHOTO]),
        user(None),
    ],
)
def test_a_text_and_other_messages_are_other_prompts(other):
    assert comparable(other) != comparable(user("a b"))
    assert comparable("a b") == "a b"


def test_columns_of_other_fields_hold_the_same_prompts():
    calls = [{"name": "f", "arguments": {"x": "1", "y": None}}]
    plain = Dataset.from_list([{"prompt": user("a")}, {"prompt": user("b", calls=[{"name": "f"}])}])
    more = Dataset.from_list(
        [{"prompt": user("c", calls=calls)}, {"prompt": user("a", name="x")}, {"prompt": user("a")}]
    )
    assert comparable(plain[0]["prompt"]) == comparable(more[2]["prompt"])
    assert comparable(plain[0]["prompt"]) != comparable(more[1]["prompt"])


KNOWS_SYSTEM = (
    "{% for m in messages %}{% if m['role'] != 'developer' %}{{ m['role'] }}: {{ m['content'] }}\n"
    "{% endif %}{% endfor %}"
)
INSTRUCTED = {"completion": [{"role": "assistant", "content": "positive"}]}


@pytest.mark.parametrize("at", [0, 2])
def test_a_row_with_an_instruction_that_the_template_drops_is_refused(at):
    encoder = RowEncoder(chatty(KNOWS_SYSTEM), 64)
    for role, taken in (("developer", False), ("system", True), ("developer", False)):  # the last from the cache
        prompt = [*TURNS[1:]]
        prompt.insert(at, {"role": role, "content": "the plot"})
        for encode in (encoder.encode, lambda row: encoder.prompts([row])):
            if taken:
                encode({"prompt": prompt, **INSTRUCTED})
                continue
            with pytest.raises(ValueError, match="leaves out messages of the role 'developer', and a row has one"):
                encode({"prompt": prompt, **INSTRUCTED})


@pytest.mark.parametrize(
    "content", ["{{ m['content'] }}", "{{ m['content'][0]['text'] }}", "{{ m['content'] + '.' }}"]
)
def test_a_template_that_takes_parts_or_texts_leaves_out_what_it_does_not_render(content):
    template = "{% for m in messages %}{% if m['role'] != 'developer' %}" + content + "{% endif %}{% endfor %}"
    assert [leaves_out(chatty(template), role) for role in ("system", "developer")] == [False, True]


def test_a_template_that_renders_every_role_takes_rows_with_each():
    encoder = RowEncoder(chatty(), 64)
    prompt = [{"role": role, "content": "the plot"} for role in ("system", "developer", "tool", "user")]
    assert encoder.tokenizer.decode(encoder.encode({"prompt": prompt, **INSTRUCTED}).prompt_ids).count("the plot") == 4
