"""Conversations to token ids: the chat template, what it adds after the answer, long ones."""

from __future__ import annotations

import pytest
from encoded import row, talk, with_template

from spul.data import ForgetRetainCollator, RowEncoder


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


def asked(content, **more):
    return {**talk("", "unknown"), "prompt": [{"role": "user", "content": content, **more}]}


@pytest.mark.parametrize(
    ("content", "same"),
    [
        ([{"type": "text", "text": "is the film good"}], "is the film good"),
        ([{"type": "text", "text": "is the", "url": None}, {"type": "text", "text": " film"}], "is the film"),
        ([], ""),
        (None, ""),
    ],
)
@pytest.mark.parametrize("position", ["start", "message"])
@pytest.mark.parametrize("taken", ["m['content']", "'' + m['content']", "m['content'].strip()", "m['content'] | trim"])
def test_a_template_that_takes_texts_gets_the_text_of_parts_and_none_for_nothing(
    chatty, content, same, position, taken
):
    chatty.chat_template = chatty.chat_template.replace("m['content']", taken)
    encoder = RowEncoder(chatty, 64, prompt_position=position)
    assert encoder.encode(asked(content)) == encoder.encode(asked(same))


def test_an_image_is_refused_by_a_template_that_takes_texts(chatty):
    with pytest.raises(ValueError, match="it takes contents as texts, and a message has parts other than texts"):
        RowEncoder(chatty, 64).encode(asked([{"type": "image"}, {"type": "text", "text": "is the film good"}]))


def test_a_template_that_takes_parts_gets_them_as_they_are(chatty):
    chatty.chat_template = (
        "{% for m in messages %}<s>{% if m['content'] is string %}{{ m['content'] }}{% else %}"
        "{% for part in m['content'] %}{{ part['text'] }}|{% endfor %}{% endif %}</s>{% endfor %}"
    )
    parts = [{"type": "text", "text": "film"}, {"type": "text", "text": "good"}]
    assert chatty.decode(RowEncoder(chatty, 64).encode(asked(parts)).prompt_ids) == "<s>film<unk>good<unk></s>"


def test_fields_that_only_their_column_has_are_none_to_the_template(chatty):
    chatty.chat_template = (
        "{% for m in messages %}<s>{% if 'calls' in m %}bad{% endif %}{% for part in m['parts'] or [] %}"
        "{% if 'image' in part %}plot{% endif %}{% endfor %}{{ m['content'] }}</s>{% endfor %}"
    )
    row = asked("good", calls=None, parts=[{"image": None, "text": "film"}])
    assert chatty.decode(RowEncoder(chatty, 64).encode(row).prompt_ids) == "<s>good</s>"
    assert row["prompt"][0]["calls"] is None  # the row stays as it was


@pytest.mark.parametrize("role", ["user", "system", "tool"])
@pytest.mark.parametrize("after", [False, True])
def test_a_message_that_is_no_answer_is_refused_in_a_completion(chatty, role, after):
    other, answer = {"role": role, "content": "a"}, {"role": "assistant", "content": "bad"}
    row = {
        "prompt": [{"role": "user", "content": "film"}],
        "completion": [answer, other] if after else [other, answer],
    }
    with pytest.raises(ValueError, match=f"completion has a message of the role '{role}', which would be trained"):
        RowEncoder(chatty, 64).encode(row)


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


def test_a_conversation_without_a_chat_template_is_refused_with_what_can_be_done(tokenizer):
    talk = {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]}
    with pytest.raises(ValueError, match=r"the tokenizer has no chat template, .* pass prompts .* as texts"):
        RowEncoder(tokenizer, 32).encode(talk)
