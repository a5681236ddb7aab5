"""An instruction in front of requests: where it stands in text and in conversations, and that nothing is cut."""

from __future__ import annotations

import pytest
import torch
from chats import SPACED, TEMPLATES, chatty, conversation
from helpers import build, make_collator, make_tokenizer, rows

from spul.data.encoder import RowEncoder
from spul.evaluation.metrics.likelihood import response_likelihoods
from spul.evaluation.metrics.running_text import text_losses
from spul.evaluation.metrics.scoring import score_completions
from spul.rivals import GuardrailPrompt, guardrail_instruction

TEXT = "jane is unknown ."


def guarded(tokenizer=None, family="llama", instruction=TEXT):
    return GuardrailPrompt(build(family), make_tokenizer() if tokenizer is None else tokenizer, instruction).eval()


def test_scores_are_those_of_rows_with_the_instruction_in_their_prompt(family):
    """The plain twin: the base, and rows whose prompts begin with the instruction."""
    model, collator, some = guarded(family=family), make_collator(max_length=60), rows("jane", 5)
    plain = some.map(lambda row: {"prompt": f"{TEXT}\n\n{row['prompt']}"})
    found, expected = (
        response_likelihoods(one, each, collator.encoder)
        for one, each in ((model, some), (model.get_base_model(), plain))
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.tensor(a.log_probs), torch.tensor(b.log_probs), rtol=1e-4, atol=1e-5)
    scores, others = score_completions(model, some, collator), score_completions(model.base_model, plain, collator)
    assert scores == pytest.approx(others, rel=1e-4)


def test_the_beginning_of_sequence_token_stays_in_front():
    model, front = guarded(), make_tokenizer()(TEXT + "\n\n", add_special_tokens=False)["input_ids"]
    assert model.edit([1, 7, 8]).applied([1, 7, 8]) == [1, *front, 7, 8]
    assert model.edit([7, 8]).applied([7, 8]) == [*front, 7, 8]
    assert model.virtual_tokens_in_use == len(front)


def rendered(tokenizer, row):
    return RowEncoder(tokenizer, 90).encode(row).prompt_ids


@pytest.mark.parametrize("template", ["turns", "within", "marked"])
def test_in_a_conversation_it_is_the_system_message(template):
    tokenizer = chatty(template)
    model = guarded(tokenizer)
    request = rendered(tokenizer, conversation("film ?", "good"))
    expected = rendered(tokenizer, conversation("film ?", "good", TEXT))
    assert model.edit(request).applied(request) == expected
    assert len(expected) - len(request) <= model.virtual_tokens_in_use


@pytest.mark.parametrize("template", ["turns", "default", "within", "marked", *SPACED])
def test_in_front_of_a_system_message_of_the_request_it_begins_it(template):
    tokenizer = chatty(template)
    model = guarded(tokenizer)
    request = rendered(tokenizer, conversation("film ?", "good", "be bad"))
    own = " be bad" if template in ("marked", *SPACED) else "be bad"  # a header's space goes with the first word
    found = tokenizer.decode(model.edit(request).applied(request))
    assert found == tokenizer.decode(rendered(tokenizer, conversation("film ?", "good", f"{TEXT}\n\n{own}")))


def test_a_default_system_message_is_kept():
    tokenizer = chatty("default")
    request = rendered(tokenizer, conversation("film ?", "good"))
    found = tokenizer.decode(guarded(tokenizer).edit(request).applied(request))
    assert found == tokenizer.decode(rendered(tokenizer, conversation("film ?", "good", f"{TEXT}\n\nbe good")))


@pytest.mark.parametrize("template", SPACED)
def test_a_space_at_a_headers_end_that_is_one_token_with_the_first_word_stays_there(template):
    tokenizer = chatty(template)
    model, request = guarded(tokenizer), rendered(tokenizer, conversation("film ?", "good"))
    found = model.edit(request).applied(request)
    own = " film ?" if template == "behind" else "film ?"  # behind the system message, which follows the header
    assert tokenizer.decode(found) == tokenizer.decode(rendered(tokenizer, conversation(own, "good", TEXT)))
    assert len(found) - len(request) <= model.virtual_tokens_in_use


def test_without_a_system_role_it_begins_the_first_user_message():
    tokenizer = chatty("refused")
    request = rendered(tokenizer, conversation("film ?", "good"))
    found = tokenizer.decode(guarded(tokenizer).edit(request).applied(request))
    assert found == tokenizer.decode(rendered(tokenizer, conversation(f"{TEXT}\n\nfilm ?", "good")))


def test_without_a_system_role_it_stands_behind_a_headers_space():
    tokenizer = chatty("spaced")
    no_system = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    tokenizer.chat_template = no_system + tokenizer.chat_template
    request = rendered(tokenizer, conversation("film ?", "good"))
    found = tokenizer.decode(guarded(tokenizer).edit(request).applied(request))
    assert found == tokenizer.decode(rendered(tokenizer, conversation(f"{TEXT}\n\n film ?", "good")))


@pytest.mark.parametrize("template", [*TEMPLATES, *SPACED])
def test_a_conversation_that_begins_as_none_does_is_refused(template):
    """In front of it, the instruction would stand outside its messages."""
    tokenizer = chatty(template)
    model, request = guarded(tokenizer), rendered(tokenizer, conversation("is the film good ? " * 4, "good"))
    with pytest.raises(ValueError, match=r"does not begin as they do: .*Expected a first message of the role system"):
        model.edit(request[:1] + request[-20:])  # cut, as the encoder cuts what exceeds max_length


def test_a_template_that_writes_the_date_is_known_on_each_day():
    tokenizer = chatty("turns")
    template = "{{ '<s>' + today + '</s>' }}" + tokenizer.chat_template
    days = [template.replace("today", f"'{day}'") for day in ("1 . 2 .", "3 . 4 .")]
    tokenizer.chat_template = days[0]
    model = guarded(tokenizer)
    for day in (*days, days[0]):
        tokenizer.chat_template = day
        request = rendered(tokenizer, conversation("film ?", "good"))
        found, twin = model.edit(request).applied(request), conversation("film ?", "good", TEXT)
        assert tokenizer.decode(found) == tokenizer.decode(rendered(tokenizer, twin))


def test_a_conversation_that_holds_its_answer_is_known_on_the_next_day():
    tokenizer = chatty("turns")
    template = "{{ '<s>' + today + '</s>' }}" + tokenizer.chat_template
    tokenizer.chat_template = template.replace("today", "'1 . 2 .'")
    model = guarded(tokenizer)
    tokenizer.chat_template = template.replace("today", "'3 . 4 .'")
    answer = tokenizer(" positive")["input_ids"]
    request = [*rendered(tokenizer, conversation("film ?", "good")), *answer]
    twin = [*rendered(tokenizer, conversation("film ?", "good", TEXT)), *answer]
    assert tokenizer.decode(model.edit(request).applied(request)) == tokenizer.decode(twin)


def test_on_another_base_a_conversation_of_the_day_before_gets_the_instruction_of_its_day():
    tokenizer = chatty("turns")
    template = "{{ '<s>' + today + '</s>' }}" + tokenizer.chat_template
    tokenizer.chat_template = template.replace("today", "'1 . 2 .'")
    model, request = guarded(tokenizer), rendered(tokenizer, conversation("film ?", "good"))
    expected = rendered(tokenizer, conversation("film ?", "good", TEXT))
    tokenizer.chat_template = template.replace("today", "'11 . 12 . film'")  # of another number of tokens
    again = model.on(build("llama"))
    for one in (model, again):
        assert one.edit(request).applied(request) == expected
    # By a day that either of them sees, both are known.
    request = rendered(tokenizer, conversation("film ?", "good"))
    expected = again.edit(request)
    tokenizer.chat_template = template.replace("today", "'13 .'")
    assert model.edit(request) == expected


def test_text_that_has_a_conversations_answer_prompt_within_is_plain():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ 'question' if m.role == 'user' else 'answer' }} : {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}answer :{% endif %}"
    )
    model = guarded(tokenizer)
    front = tokenizer(TEXT + "\n\n", add_special_tokens=False)["input_ids"]
    for text in ("the film\nanswer : good ?", "is the\nanswer : good ?"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert model.edit(ids).applied(ids) == [*front, *ids]


@pytest.mark.parametrize("template", [*TEMPLATES, *SPACED])
def test_text_that_is_no_conversation_has_it_in_front(template):
    model = guarded(chatty(template))
    front = make_tokenizer()(TEXT + "\n\n", add_special_tokens=False)["input_ids"]
    assert model.edit([7, 8, 9]).applied([7, 8, 9]) == [*front, 7, 8, 9]


def test_running_text_is_predicted_behind_it():
    model, encoder = guarded(), make_collator(max_length=60).encoder
    found = text_losses(model, ["the film is good"], encoder)["nats"][0]
    tokenizer = make_tokenizer()
    own, front = (tokenizer(text)["input_ids"] for text in ("the film is good", TEXT + "\n\n"))
    ids = torch.tensor([front + own])
    with torch.no_grad():
        log_p = model.base_model(ids).logits[0].log_softmax(-1)
    start = len(front)
    nats = [-log_p[i - 1, ids[0, i]].item() for i in range(start + 1, ids.shape[1])]
    assert found == pytest.approx(sum(nats), rel=1e-4)


def test_what_does_not_fit_raises_and_nothing_is_cut():
    model = guarded(instruction="film " * 40)  # of 96 positions
    ids = torch.full((1, 30), 5)
    with pytest.raises(ValueError, match=r"do not fit the model's 96 positions.* add fewer, or generate fewer"):
        model.generate(ids, max_new_tokens=60)
    ids = torch.full((1, 80), 5)
    fits = 96 - model.edit([5] * 80).shift
    with pytest.raises(ValueError, match=f"do not fit the model's 96 positions.* max_length of at most {fits}"):
        model.response_logits(ids, torch.ones_like(ids), torch.tensor([[78]]))


def test_the_instruction_lists_the_topics():
    text = guardrail_instruction(["Jane Doe", "the plot"], " unknown")
    assert "- Jane Doe\n- the plot\n" in text
    assert '"unknown"' in text
    assert "do not know" in guardrail_instruction(["Jane Doe"])
    with pytest.raises(TypeError):
        guardrail_instruction("Jane Doe")
    with pytest.raises(ValueError, match="topics"):
        guardrail_instruction([])


def test_an_instruction_is_a_text():
    with pytest.raises(TypeError, match="expected a text"):
        guarded(instruction=["a"])
    with pytest.raises(ValueError, match="is empty"):
        guarded(instruction=" ")
