"""In-context unlearning: which examples stand in front of a request, with which labels, and its twin written out."""

from __future__ import annotations

import random

import pytest
import torch
from chats import SPACED, TEMPLATES, chatty, conversation
from datasets import Dataset
from helpers import build, make_collator, make_tokenizer, rows

from spul.data.encoder import RowEncoder
from spul.evaluation.metrics.likelihood import response_likelihoods
from spul.evaluation.metrics.scoring import score_completions
from spul.rivals import InContextUnlearning

FLIPPED = {" positive": " negative", " negative": " positive"}
FORGET, RETAIN = rows("jane", 2), rows("film", 4)


def unlearning(forget=FORGET, retain=RETAIN, tokenizer=None, family="llama", **options):
    tokenizer = make_tokenizer() if tokenizer is None else tokenizer
    return InContextUnlearning(build(family), tokenizer, forget, retain, **{"num_retain": 1, **options}).eval()


def picked(num, seed=0, num_forget=2):
    """The retain rows that are drawn: after one draw of a label for each forget row."""
    draws = random.Random(seed)
    for _ in range(num_forget):
        draws.choice(["one"])
    return [RETAIN[i] for i in draws.sample(range(len(RETAIN)), num)]


def test_scores_are_those_of_prompts_with_the_context_written_out(family):
    """The plain twin: texts joined as the authors' program joins them; each forget row is asked about itself."""
    model, collator = unlearning(family=family), make_collator(max_length=90)
    behind = "".join(f"{row['prompt']}{row['completion']}\n" for row in picked(1))

    def written_out(row):
        own = f"{row['prompt']}{FLIPPED[row['completion']]}\n"
        return {"prompt": own + behind + row["prompt"]}

    plain = FORGET.map(written_out)
    found = response_likelihoods(model, FORGET, collator.encoder)
    expected = response_likelihoods(model.get_base_model(), plain, collator.encoder)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.tensor(a.log_probs), torch.tensor(b.log_probs), rtol=1e-4, atol=1e-5)
    assert score_completions(model, FORGET, collator) == pytest.approx(
        score_completions(model.get_base_model(), plain, collator), rel=1e-4
    )


def text_of(model, request):
    ids = make_tokenizer()(request)["input_ids"]
    return make_tokenizer().decode(model.edit(ids).applied(ids))


def test_all_forget_rows_stand_first_in_their_order_where_all_are_asked_for():
    model = unlearning(num_forget=2, num_retain=2, seed=3)
    lines = [f"{row['prompt']}{FLIPPED[row['completion']]}" for row in FORGET]
    lines += [f"{row['prompt']}{row['completion']}" for row in picked(2, seed=3)]
    assert text_of(model, "film .") == "\n".join([*lines, "film ."])


def test_otherwise_those_most_like_the_request_stand_there():
    forget = Dataset.from_list(
        [
            {"prompt": "jane plot :", "completion": " positive"},
            {"prompt": "jane good film :", "completion": " negative"},
            {"prompt": "doe :", "completion": " positive"},
        ]
    )
    model = unlearning(forget, num_forget=1, num_retain=0)
    assert text_of(model, "the plot of jane :") == "jane plot : negative\nthe plot of jane :"
    assert text_of(model, "doe is .") == "doe : negative\ndoe is ."
    assert text_of(model, "sentiment") == "jane plot : negative\nsentiment"  # like none: the first
    two = unlearning(forget, num_forget=2, num_retain=0)
    assert text_of(two, "good film :") == "jane good film : positive\njane plot : negative\ngood film :"


def test_forget_rows_without_words_are_like_no_request_and_stand_in_order():
    forget = Dataset.from_list([{"prompt": text, "completion": " positive"} for text in (": .", ".", "# #")])
    retain = Dataset.from_list([{"prompt": "film :", "completion": " negative"}])
    assert text_of(unlearning(forget, retain, num_retain=0), "the plot :") == ": . negative\nthe plot :"


def test_a_label_of_more_than_two_becomes_one_of_the_others_by_the_seed():
    labels = [" positive", " negative", " neutral"]
    forget = Dataset.from_list([{"prompt": f"jane {i} :", "completion": labels[i % 3]} for i in range(9)])

    def given(seed):
        lines = text_of(unlearning(forget, num_forget=9, num_retain=0, seed=seed), "film .").split("\n")[:-1]
        return [line.split(":")[1] for line in lines]

    assert all(label in labels and label != row["completion"] for label, row in zip(given(0), forget, strict=True))
    assert given(0) == given(0)
    assert len({tuple(given(seed)) for seed in range(5)}) > 1


def test_the_context_of_a_batch_differs_by_row_and_the_most_that_is_added_is_said():
    model = unlearning(num_forget=1)
    ids = [make_tokenizer()(row["prompt"])["input_ids"] for row in [*FORGET, *RETAIN]]
    shifts = [model.edit(one).shift for one in ids]
    assert max(shifts) <= model.virtual_tokens_in_use
    assert model.virtual_tokens_in_use < 2 * max(shifts)


@pytest.mark.parametrize("template", [*TEMPLATES, *SPACED])
def test_conversations_are_turns_before_the_request(template):
    tokenizer = chatty(template)
    forget = Dataset.from_list([conversation("jane .", "good")])
    retain = Dataset.from_list([conversation("film .", "bad")])
    model = unlearning(forget, retain, tokenizer)
    encoder = RowEncoder(tokenizer, 96)
    for system in (None, "be bad") if template not in ("within", "marked", "refused") else (None,):
        row = conversation("plot .", "good", system)
        request = encoder.encode(row).prompt_ids
        start = [] if system is None else row["prompt"][:1]
        # A header's space goes with the first word, also behind a system message that follows the header.
        jane = " jane ." if template == "behind" and system else "jane ."
        turns = [
            *(*start, {"role": "user", "content": jane}, {"role": "assistant", "content": "bad"}),
            *({"role": "user", "content": "film ."}, {"role": "assistant", "content": "bad"}, row["prompt"][-1]),
        ]
        expected = encoder.encode({**row, "prompt": turns}).prompt_ids
        found = model.edit(request).applied(request)
        assert tokenizer.decode(found) == tokenizer.decode(expected)
        assert len(found) - len(request) <= model.virtual_tokens_in_use
    text = tokenizer("plot .", add_special_tokens=False)["input_ids"]
    header = {"spaced": "<s>user: ", "behind": "<s># "}.get(template, "<s>user\n")
    assert tokenizer.decode(model.edit(text).applied(text)).endswith(f"{header}plot .")
    request = encoder.encode(conversation("is the film good ? " * 4, "good")).prompt_ids
    with pytest.raises(ValueError, match="does not begin as they do"):
        model.edit(request[:1] + request[-20:])


def chat_model(tokenizer):
    forget = Dataset.from_list([conversation("jane .", "good")])
    return unlearning(forget, Dataset.from_list([conversation("film .", "bad")]), tokenizer)


@pytest.mark.parametrize("template", ["within", "marked"])
def test_a_system_message_that_nothing_marks_the_end_of_stays_with_its_user_message(template):
    tokenizer = chatty(template)
    request = RowEncoder(tokenizer, 96).encode(conversation("plot .", "good", "be bad")).prompt_ids
    found = tokenizer.decode(chat_model(tokenizer).edit(request).applied(request))
    turns = "<s>user\njane .</s>\n<s>assistant\nbad</s>\n<s>user\nfilm .</s>\n<s>assistant\nbad</s>\n"
    assert found == turns + tokenizer.decode(request)


def test_a_user_message_that_begins_as_a_system_message_does_is_one():
    tokenizer = chatty("behind")
    request = RowEncoder(tokenizer, 96).encode(conversation("## plot .", "good")).prompt_ids
    found = tokenizer.decode(chat_model(tokenizer).edit(request).applied(request))
    assert found == "<s># jane . #: bad </s><s># film . #: bad </s>" + tokenizer.decode(request)


def test_on_another_base_a_conversation_of_the_day_before_is_known():
    tokenizer = chatty("turns")
    template = "{{ '<s>' + today + '</s>' }}" + tokenizer.chat_template
    tokenizer.chat_template = template.replace("today", "'1 . 2 .'")
    model = chat_model(tokenizer)
    request = RowEncoder(tokenizer, 96).encode(conversation("plot .", "good")).prompt_ids
    expected = model.edit(request)
    tokenizer.chat_template = template.replace("today", "'11 . 12 . film'")
    assert model.on(build("llama")).edit(request) == expected


def test_a_context_that_does_not_fit_raises_and_nothing_is_cut():
    model = unlearning(retain=rows("film", 12), num_forget=2, num_retain=12)
    with pytest.raises(ValueError, match="do not fit the model's 96 positions; nothing is cut off"):
        score_completions(model, FORGET, make_collator())


@pytest.mark.parametrize("numbers", [{"num_forget": 0}, {"num_forget": 3}, {"num_retain": -1}, {"num_retain": 5}])
def test_numbers_of_examples_are_those_that_there_are(numbers):
    with pytest.raises(ValueError, match="no more than there are rows"):
        unlearning(**numbers)


def test_free_form_answers_have_no_label_to_flip():
    free = Dataset.from_list([{"prompt": f"{i}", "completion": f" {i}"} for i in range(40)])
    one = Dataset.from_list([{"prompt": f"{i}", "completion": " good"} for i in range(4)])
    for some in (free, one):
        with pytest.raises(ValueError, match="different completions; expected 2 to 32 labels"):
            unlearning(some, one)
    with pytest.raises(TypeError):
        unlearning([{"prompt": "a", "completion": " b"}])


@pytest.mark.parametrize("template", ["turns", "default", *SPACED])
def test_rows_with_a_system_message_are_refused_with_what_to_give(template):
    forget = Dataset.from_list([conversation("jane .", "good", "be bad")])
    retain = Dataset.from_list([conversation("film .", "bad")])
    with pytest.raises(ValueError, match=r"does not begin with a user message: .*; give rows without a system"):
        unlearning(forget, retain, chatty(template))
