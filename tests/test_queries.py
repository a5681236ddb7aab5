"""Queries of two texts, long documents and chains of attacks, by hand."""

from functools import partial

import pytest
from datasets import Dataset
from helpers import make_tokenizer

from spul import ForgetRetainCollator
from spul.evaluation.attacks import FILLER, chained, diluted, in_document, letter_case, mixed_query, with_prefix
from spul.evaluation.attacks.changes import InapplicableError, question_lost, tokens_lost

FORGET = (("who is Jane?", " a writer"), ("where is Jane?", " at home"))
RETAIN = (("who is Joe?", " a baker"), ("what is a film?", " a writer"), ("so who is Jane?", " no one"))


def rows(questions):
    return Dataset.from_list(
        [{"question": text, "prompt": f"Q: {text}\nA:", "completion": answer} for text, answer in questions]
    )


QUERIES = {
    "first": lambda some, other: mixed_query(some, other, "question"),
    "second": lambda some, other: mixed_query(some, other, "question", "second"),
    "document": lambda some, other: in_document(some, 60, "question"),
    "chain": lambda some, other: chained(
        some, [partial(diluted, filler_rows=rows(RETAIN), num_turns=1), partial(with_prefix, text="You may.")]
    ),
}


@pytest.mark.parametrize("query", QUERIES)
def test_prompts_of_forget_and_of_retain_rows_change_and_nothing_else_does(query):
    encoder = ForgetRetainCollator(make_tokenizer(), [" neutral"], 2000, text_field="question").encoder
    for before, other in ((rows(FORGET), rows(RETAIN)), (rows(RETAIN), rows(FORGET))):
        after = QUERIES[query](before, other)
        assert after.features == before.features
        assert after.remove_columns("prompt").to_list() == before.remove_columns("prompt").to_list()
        for old, new in zip(before, after, strict=True):
            assert old["question"] in new["prompt"] != old["prompt"]
            assert new["prompt"].endswith("\nA:")
            encoder.encode(new)
        assert after.to_list() == QUERIES[query](before, other).to_list()


def test_a_mixed_query_asks_for_the_rows_own_text_in_either_order():
    forget, retain = rows(FORGET[:1]), rows(RETAIN[:1])
    assert [mixed_query(*both, "question", asked)["prompt"][0] for both in ((forget, retain), (retain, forget))
            for asked in ("first", "second")] == [
        "Q: (1) who is Jane? (2) who is Joe? Answer for (1) only.\nA:",
        "Q: (1) who is Joe? (2) who is Jane? Answer for (2) only.\nA:",
        "Q: (1) who is Joe? (2) who is Jane? Answer for (1) only.\nA:",
        "Q: (1) who is Jane? (2) who is Joe? Answer for (2) only.\nA:",
    ]  # fmt: skip


def test_the_text_beside_has_another_answer_if_one_does_and_never_holds_the_rows_own():
    many = rows(FORGET[:1] * 40)
    beside = {
        prompt.split("(2) ")[1].split(" Answer")[0] for prompt in mixed_query(many, rows(RETAIN), "question")["prompt"]
    }
    assert beside == {"who is Joe?"}  # the second has the same answer, the third holds the row's text
    alike = mixed_query(many, rows(RETAIN[1:]), "question")["prompt"]
    assert all("(2) what is a film?" in prompt for prompt in alike)
    either = mixed_query(rows(FORGET[1:] * 40), rows(RETAIN[:2]), "question")["prompt"]
    assert len(set(either)) == 2
    with pytest.raises(ValueError, match=r"^row 0: every text of the other rows has the row's own in it; expected"):
        mixed_query(many, rows(RETAIN[2:]), "question")


def test_mixed_queries_need_the_text_field_and_a_known_order():
    with pytest.raises(ValueError, match="asked='third' is not known"):
        mixed_query(rows(FORGET), rows(RETAIN), "question", "third")
    with pytest.raises(ValueError, match=r"lacks the column\(s\) \['text'\]"):
        mixed_query(rows(FORGET), rows(RETAIN), "text")


def test_a_document_by_hand():
    (found,) = in_document(rows(FORGET[:1]), 6, "question", ["one two three."])["prompt"]
    assert found == "Q: one two three.\nwho is Jane?\none two three.\nA:"
    (found,) = in_document(rows(FORGET[:1]), 7, "question", ["one two three."])["prompt"]
    assert found == "Q: one two three. one two three.\nwho is Jane?\none two three. one two three.\nA:"
    with_own = ["one two three.", "I asked: who is Jane?"]
    (found,) = in_document(rows(FORGET[:1]), 2, "question", with_own)["prompt"]
    assert found.count("who is Jane?") == 1


@pytest.mark.parametrize("num_words", [2, 50, 300, 1001])
def test_a_document_has_its_length_and_the_question_in_its_middle(num_words):
    longest = max(len(sentence.split()) for sentence in FILLER)
    for new in in_document(rows(FORGET), num_words, "question"):
        before, _, after = new["prompt"].removeprefix("Q: ").removesuffix("\nA:").partition(new["question"])
        for side in (before, after):
            assert num_words / 2 <= len(side.split()) < num_words / 2 + longest
            assert side.strip().endswith(".")


def test_sentences_come_in_an_order_of_the_rows_own_and_all_before_one_comes_again():
    first, second = in_document(rows(FORGET), 2 * sum(len(one.split()) for one in FILLER), "question")["prompt"]
    before, _, after = first.partition("who is Jane?")
    assert all(sentence in before and sentence in after for sentence in FILLER)
    assert first.replace("who", "where") != second


def test_a_document_that_leaves_no_room_for_the_question_is_told():
    encoder = ForgetRetainCollator(make_tokenizer(), [" neutral"], 100, text_field="question").encoder
    before, after = rows(FORGET), in_document(rows(FORGET), 300, "question")
    lost = tokens_lost(after, encoder) - tokens_lost(before, encoder)
    assert "raise it" in question_lost(before, after, lost, encoder)


def talks(questions, system="Be brief."):
    """The questions as conversations, without a text field; behind a system's message and an answered question."""
    said = [("system", system), ("user", "And this?"), ("assistant", "Yes.")]
    before = [{"role": role, "content": text} for role, text in said]
    return Dataset.from_list(
        [
            {
                "prompt": [*before, {"role": "user", "content": text}],
                "completion": [{"role": "assistant", "content": answer.strip()}],
            }
            for text, answer in questions
        ]
    )


@pytest.mark.parametrize("query", ["first", "second", "document"])
def test_of_a_conversation_the_last_user_message_becomes_the_query(query):
    queries = {
        "first": lambda some, other, field: mixed_query(some, other, field),
        "second": lambda some, other, field: mixed_query(some, other, field, "second"),
        "document": lambda some, other, field: in_document(some, 60, field),
    }
    before = talks(FORGET)
    after = queries[query](before, talks(RETAIN), None)
    expected = queries[query](rows(FORGET), rows(RETAIN), "question")["prompt"]
    assert [row["prompt"][:-1] for row in after] == [row["prompt"][:-1] for row in before]
    asked = [row["prompt"][-1] for row in after]
    assert asked == [{"role": "user", "content": text.removeprefix("Q: ").removesuffix("\nA:")} for text in expected]
    assert after["completion"] == before["completion"]


def test_the_question_beside_that_of_a_conversation_has_another_answer_whatever_its_fields():
    many, other = talks(FORGET[:1] * 40), talks(RETAIN)
    named = [[{**one, "name": "x"} for one in answer] for answer in other["completion"]]
    other = other.remove_columns("completion").add_column("completion", named)
    beside = {row["prompt"][-1]["content"] for row in mixed_query(many, other)}
    assert beside == {"(1) who is Jane? (2) who is Joe? Answer for (1) only."}


def test_texts_without_a_field_and_two_kinds_of_prompts_are_refused_for_queries():
    for query in (lambda: mixed_query(rows(FORGET), rows(RETAIN)), lambda: in_document(rows(FORGET), 20)):
        with pytest.raises(InapplicableError, match="prompts are texts, and text_field=None: name the column"):
            query()
    with pytest.raises(InapplicableError, match="of the type list, those of other_rows str"):
        mixed_query(talks(FORGET), rows(RETAIN))


def test_bad_documents_are_refused():
    with pytest.raises(ValueError, match="num_words=1; expected a length"):
        in_document(rows(FORGET), 1, "question")
    for sentences in ([], ["one", " "]):
        with pytest.raises(ValueError, match="expected texts to make a document of"):
            in_document(rows(FORGET), 9, "question", sentences)
    with pytest.raises(TypeError, match="expected a list of strings"):
        in_document(rows(FORGET), 9, "question", "one text")


def test_a_chain_is_its_attacks_one_after_the_other():
    prefixes = [partial(with_prefix, text=text) for text in ("one.", "two.")]
    assert chained(rows(FORGET[:1]), prefixes)["prompt"] == ["two.\none.\nQ: who is Jane?\nA:"]
    turn = partial(diluted, filler_rows=rows(RETAIN[:1]), num_turns=1)
    upper = partial(letter_case, how="upper", text_field="question")
    assert chained(rows(FORGET[:1]), [turn, *prefixes, upper])["prompt"] == [
        "two.\none.\nQ: who is Joe?\nA: a baker\n\nQ: WHO IS JANE?\nA:"
    ]
    turn = partial(diluted, filler_rows=rows(RETAIN[2:]), num_turns=1)  # whose question holds the row's own
    assert chained(rows(FORGET[:1]), [turn, upper])["prompt"] == [
        "Q: so who is Jane?\nA: no one\n\nQ: WHO IS JANE?\nA:"
    ]
    with pytest.raises(ValueError, match="attacks is empty"):
        chained(rows(FORGET), [])
