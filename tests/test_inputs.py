"""Attacks on the input: what they make of rows by hand, and the table of scores against scoring by itself."""

import pytest
from datasets import Dataset
from helpers import CHAT_TEMPLATE, build, make_tokenizer, prompted

from spul import ForgetRetainCollator
from spul.evaluation.attacks import (
    JAILBREAKS,
    attack_inputs,
    diluted,
    letter_case,
    paraphrase,
    reworded,
    whitespace_noise,
    with_prefix,
    with_suffix,
)
from spul.evaluation.attacks.changes import InapplicableError, question_lost, tokens_lost
from spul.evaluation.attacks.usual import usual_attacks
from spul.evaluation.metrics.scoring import score_completions


def rows(num=3):
    texts = ["the film of Jane", "a bad plot", "good film about the review"]
    return Dataset.from_list(
        [
            {"text": text, "prompt": f"text: {text}\nsentiment:", "completion": label, "is_forget": True}
            for text, label in zip(texts, (" positive", " negative", " positive"), strict=True)
        ][:num]
    )


def collator(max_length=64, text_field="text"):
    return ForgetRetainCollator(make_tokenizer(), [" neutral"], max_length, text_field=text_field)


ATTACKS = {
    "upper": lambda some: letter_case(some, "upper", "text"),
    "random": lambda some: letter_case(some, "random", "text"),
    "spaces": lambda some: whitespace_noise(some, 0.9, "text"),
    "paraphrase": lambda some: paraphrase(some, lambda text: "so " + text, "text"),
    "reworded": lambda some: reworded(some, {"sentiment:": "about:"}, "text"),
    "prefix": lambda some: with_prefix(some, "be good."),
    "suffix": lambda some: with_suffix(some, "be good.", "text"),
    "diluted": lambda some: diluted(some, rows(), 1),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_only_the_prompt_and_its_text_change_and_the_text_still_stands_in_it(attack):
    before, after = rows(), ATTACKS[attack](rows())
    assert after.features == before.features
    for name in ("completion", "is_forget"):
        assert after[name] == before[name]
    for old, new in zip(before, after, strict=True):
        assert old["prompt"] != new["prompt"]
        assert new["text"] in new["prompt"]
        assert (new["text"] == old["text"]) == (attack in ("reworded", "prefix", "suffix", "diluted"))
        collator().encoder.encode(new)  # finds the text
    assert list(after) == list(ATTACKS[attack](rows()))  # the seed says it all


def test_letter_case_by_hand():
    assert letter_case(rows(1), "upper", "text")[0]["prompt"] == "text: THE FILM OF JANE\nsentiment:"
    assert letter_case(rows(1), "lower")[0]["prompt"] == "text: the film of jane\nsentiment:"
    some, other = (letter_case(rows(2), "random", "text", seed)["prompt"] for seed in (0, 1))
    assert some != other
    assert [text.lower() for text in some] == [text.lower() for text in rows(2)["prompt"]]
    assert any(c.isupper() for c in some[0])
    assert any(c.islower() for c in some[0])
    with pytest.raises(ValueError, match="'title' is not known"):
        letter_case(rows(), "title")


def test_draws_of_a_row_do_not_depend_on_the_rows_after_it():
    assert letter_case(rows(1), "random")["prompt"][0] == letter_case(rows(3), "random")["prompt"][0]


def test_a_change_that_cuts_most_of_the_text_away_is_known():
    few, long = rows(), "the film is good " * 20

    def why(changed, by):
        lost = tokens_lost(changed, by.encoder) - tokens_lost(few, by.encoder)
        return question_lost(few, changed, lost, by.encoder)

    changed = with_prefix(few, long)
    assert why(changed, collator(200)) == ""
    assert "would lose" in why(changed, collator(64))
    assert why(with_prefix(few, "be good."), collator(18)) == ""  # a token or two
    assert why(changed, collator(64, text_field=None)) == ""  # cut from its start: the prefix is gone


def test_whitespace_noise_changes_its_share_of_spaces_and_no_word():
    data = Dataset.from_list([{"prompt": "a b\n" * 2000, "completion": " c"}])
    noisy = whitespace_noise(data, 0.25)[0]["prompt"]
    assert noisy.split() == data[0]["prompt"].split()
    assert noisy.count("\n") == 2000
    kept = sum(line == "a b" for line in noisy.splitlines())
    assert 0.7 < kept / 2000 < 0.8
    assert set(noisy.splitlines()) == {"a b", "a  b", "a   b", "a\tb"}
    for share in (0, 1.5):
        with pytest.raises(ValueError, match="above 0 and at most 1"):
            whitespace_noise(data, share)


def test_paraphrase_rewrites_the_text_or_the_whole_prompt():
    assert paraphrase(rows(1), lambda text: text[::-1], "text")[0]["prompt"] == "text: enaJ fo mlif eht\nsentiment:"
    assert paraphrase(rows(1), lambda prompt: prompt[::-1])[0]["prompt"] == rows(1)[0]["prompt"][::-1]
    for nothing in (" ", None):
        with pytest.raises(ValueError, match="expected a text that is not empty"):
            paraphrase(rows(), lambda text, nothing=nothing: nothing, "text")
    with pytest.raises(ValueError, match="no attack"):
        paraphrase(rows(), lambda text: text, "text")


def test_reworded_leaves_the_text_alone():
    data = rows(2).map(lambda row: {"prompt": "text: text: the film\nsentiment:", "text": "text: the film"})
    assert reworded(data, {"text:": "review:"}, "text")["prompt"] == ["review: text: the film\nsentiment:"] * 2
    with pytest.raises(ValueError, match="no attack"):
        reworded(data, {"opinion:": "mood:"}, "text")


def test_prefix_and_suffix_by_hand_the_cue_stays_last():
    assert with_prefix(rows(1), "be good.")[0]["prompt"] == "be good.\ntext: the film of Jane\nsentiment:"
    assert with_suffix(rows(1), "be good.", "text")[0]["prompt"] == "text: the film of Jane be good.\nsentiment:"
    assert with_suffix(rows(1), "be good.")[0]["prompt"] == "text: the film of Jane\nsentiment: be good."
    assert len(JAILBREAKS) == len(set(JAILBREAKS)) > 3
    with pytest.raises(ValueError, match="is empty"):
        with_prefix(rows(), " ")


def test_diluted_puts_other_questions_with_their_answers_before():
    one = diluted(rows(1), rows(2), 1)[0]["prompt"]
    assert one == "text: a bad plot\nsentiment: negative\n\ntext: the film of Jane\nsentiment:"
    two = diluted(rows(), rows(), 2)
    for old, new in zip(rows(), two, strict=True):
        *turns, last = new["prompt"].split("\n\n")
        assert last == old["prompt"]
        assert sorted(turns) == sorted(row["prompt"] + row["completion"] for row in rows() if row != old)
    with pytest.raises(ValueError, match="num_turns=3"):
        diluted(rows(), rows(), 3)


def talks(some, parts=False):
    """The same rows as conversations: the question last, behind a system's message and an answered question."""

    def content(text):
        return [{"type": "text", "text": text}] if parts else text

    def talk(row):
        said = [("system", "Be brief."), ("user", "And this?"), ("assistant", "Yes."), ("user", row["prompt"])]
        prompt = [{"role": role, "content": content(text)} for role, text in said]
        completion = [{"role": "assistant", "content": content(row["completion"].strip())}]
        return {**row, "prompt": prompt, "completion": completion}

    return Dataset.from_list([talk(row) for row in some])


@pytest.mark.parametrize("parts", [False, True])
@pytest.mark.parametrize("attack", [name for name in ATTACKS if name != "diluted"])
def test_of_a_conversation_the_last_user_message_changes_as_a_text_does(attack, parts):
    before = talks(rows(), parts)
    after = ATTACKS[attack](before)
    assert list(after) == list(talks(ATTACKS[attack](rows()), parts))
    assert after.features == before.features
    assert list(before) == list(talks(rows(), parts))  # the rows given stay as they were


def test_turns_of_a_conversation_are_messages_behind_the_system_s():
    before = talks(rows())
    after = diluted(before, before, 2, seed=3)
    for row, old, text in zip(after, before, diluted(rows(), rows(), 2, seed=3), strict=True):
        turns = text["prompt"].split("\n\n")[:2]
        system, *own = old["prompt"]
        found = row["prompt"][1:-3]
        assert row["prompt"] == [system, *found, *own]
        asked, answered = ([one["content"] for one in found if one["role"] == role] for role in ("user", "assistant"))
        assert asked == ["And this?", turns[0].rsplit(" ", 1)[0], "And this?", turns[1].rsplit(" ", 1)[0]]
        assert answered == ["Yes.", turns[0].rsplit(" ", 1)[1], "Yes.", turns[1].rsplit(" ", 1)[1]]
        assert row["completion"] == old["completion"]
    with pytest.raises(ValueError, match=r"num_turns=3; expected 1 to 2"):
        diluted(before, before, 3)


def test_fields_of_messages_that_only_turns_have_are_left_out_and_missing_ones_are_none():
    def row(question, **more):
        return {"prompt": [{"role": "user", "content": question, **more}], "completion": " b"}

    own, others = Dataset.from_list([row("a", name="x")]), Dataset.from_list([row("c", weight=1.0)])
    assert diluted(own, others, 1)[0]["prompt"] == [
        {"role": "user", "content": "c", "name": None},
        {"role": "assistant", "content": " b", "name": None},
        {"role": "user", "content": "a", "name": "x"},
    ]


def test_the_question_beside_an_image_is_changed_and_the_image_is_not():
    parts = [{"type": "image", "text": None}, {"type": "text", "text": "who is this"}]
    some = Dataset.from_list([{"prompt": [{"role": "user", "content": parts}], "completion": " b"}])
    changed = with_prefix(some, "Hello.")[0]["prompt"][0]["content"]
    assert changed == [parts[0], {"type": "text", "text": "Hello.\nwho is this"}]


def test_a_question_in_several_parts_is_changed_as_one_text():
    before = talks(rows(), parts=True)
    split = before.map(lambda row: {"prompt": [*row["prompt"][:-1], _halved(row["prompt"][-1])]})
    for name in ("upper", "random", "spaces", "paraphrase", "reworded", "prefix", "suffix"):
        assert list(ATTACKS[name](split)) == list(ATTACKS[name](before))


def _halved(message):
    """The message with its text in two parts, which split the word `of` or `bad`."""
    text, half = message["content"][0]["text"], len("text: the film o")
    return {**message, "content": [{"type": "text", "text": one} for one in (text[:half], text[half:])]}


@pytest.mark.parametrize("parts", [False, True])
def test_answers_of_turns_take_the_form_of_the_prompt_s_messages(parts):
    own, other = talks(rows(), parts), talks(rows(), not parts)
    mixed = Dataset.from_list(
        [{"prompt": a["prompt"], "completion": b["completion"]} for a, b in zip(own, other, strict=True)]
    )
    assert diluted(mixed, mixed, 2)["prompt"] == diluted(own, own, 2)["prompt"]


@pytest.mark.parametrize("text_field", [None, "text"])
@pytest.mark.parametrize("parts", [False, True])
def test_a_conversation_loses_its_question_to_what_stands_behind_it_alone(text_field, parts):
    answers = [[{"role": "assistant", "content": "positive"}]] * 3
    some = talks(rows(), parts).remove_columns("completion").add_column("completion", answers)
    long, by = "be good " * 40, collator(64, text_field)
    template = CHAT_TEMPLATE.replace("m['content']", "m['content'][0]['text']") if parts else CHAT_TEMPLATE
    by.tokenizer.chat_template = template

    def why(changed):
        lost = tokens_lost(changed, by.encoder) - tokens_lost(some, by.encoder)
        assert lost > 20
        return question_lost(some, changed, lost, by.encoder)

    assert why(with_prefix(some, long)) == ""
    assert why(diluted(some, some, 2)) == ""
    assert why(letter_case(with_prefix(some, long), "upper")) == ""
    behind = why(with_suffix(some, long, text_field))
    assert "3 of 3 conversations would lose most of their question, with" in behind
    assert "max_length=64: raise it" in behind


def test_conversations_without_a_question_and_turns_of_another_kind_are_refused():
    told = [{"prompt": [{"role": "system", "content": "Be brief."}], "completion": " b"}]
    with pytest.raises(InapplicableError, match=r'no message of the role "user", or its last one .* are \[.system.\]'):
        with_prefix(Dataset.from_list(told), "c")
    for content in (" ", None, [{"type": "image", "text": None}]):
        said = [{"prompt": [{"role": "user", "content": content}], "completion": " b"}]
        with pytest.raises(InapplicableError, match=r"or its last one has no text.*Leave such rows out"):
            with_prefix(Dataset.from_list(said), "c")
    with pytest.raises(InapplicableError, match="of the rows are of the type list, those of filler_rows str"):
        diluted(talks(rows()), rows(), 1)
    elsewhere = talks(rows().map(lambda row: {"text": "And this?"}))
    with pytest.raises(InapplicableError, match="'text' does not stand in the prompt"):
        letter_case(elsewhere, "upper", "text")


def test_turns_stand_before_a_question_and_are_of_questions():
    some = talks(rows())
    told = some.select([0]).map(lambda row: {"prompt": row["prompt"][:1]})
    for own, others in ((told, some), (some, told)):
        with pytest.raises(InapplicableError, match='no message of the role "user"'):
            diluted(own, others, 1)


def test_an_empty_text_counts_as_a_turn_as_where_turns_are_counted():
    others = Dataset.from_dict({"prompt": ["", "a", "b"], "completion": [" c"] * 3})
    assert ("diluted", 2) in usual_attacks(None, others, turns=(2,))
    assert len(diluted(others, others, 2)) == 3


def test_a_question_that_is_cut_anyhow_is_not_lost_to_an_attack():
    some, by = talks(rows()), collator(64, None)
    by.tokenizer.chat_template = CHAT_TEMPLATE
    long = with_suffix(some, "be good " * 40)
    shouted = letter_case(long, "upper")
    lost = tokens_lost(shouted, by.encoder) - tokens_lost(long, by.encoder)
    assert lost > 0
    assert question_lost(long, shouted, lost, by.encoder) == ""


def test_bad_rows_raise():
    with pytest.raises(ValueError, match="does not stand in the prompt"):
        letter_case(rows().map(lambda row: {"text": "else"}), "upper", "text")
    with pytest.raises(ValueError, match=r"lacks the column\(s\) \['body'\]"):
        letter_case(rows(), "upper", "body")
    with pytest.raises(TypeError, match=r"of the type int; expected texts, or lists of messages"):
        with_prefix(Dataset.from_list([{"prompt": 5, "completion": " b"}]), "c")
    with pytest.raises(InapplicableError, match=r"no message of the role"):
        with_prefix(Dataset.from_list([{"prompt": [], "completion": " b"}]), "c")
    with pytest.raises(ValueError, match="lack"):
        with_prefix(rows().remove_columns("completion"), "c")


def test_the_table_has_every_model_under_every_attack_unattacked_first():
    models = {"unlearned": prompted(), "base": build("llama")}
    found = attack_inputs(models, rows(), {"upper": ATTACKS["upper"]}, collator())
    assert [(row["attack"], row["model"]) for row in found] == [
        ("none", "unlearned"),
        ("none", "base"),
        ("upper", "unlearned"),
        ("upper", "base"),
    ]
    for row, some in zip(found, (rows(), rows(), ATTACKS["upper"](rows()), ATTACKS["upper"](rows())), strict=True):
        assert row["tokens_lost"] == 0
        expected = score_completions(models[row["model"]], some, collator())
        assert {name: row[name] for name in expected} == pytest.approx(expected)
    assert len({row["loss"] for row in found}) == 4


def test_tokens_that_an_attack_loses_are_told_and_warned_of():
    tight, model = collator(max_length=24), {"base": build("llama")}
    with pytest.warns(UserWarning, match="lose tokens"):
        _, found = attack_inputs(model, rows(1), {"diluted": ATTACKS["diluted"]}, tight)
    ids = make_tokenizer()
    whole = len(ids(ATTACKS["diluted"](rows(1))[0]["prompt"])["input_ids"]) + len(ids(" positive")["input_ids"])
    assert found["tokens_lost"] == whole - 24 > 0


def test_attacks_that_change_answers_and_bad_names_raise():
    model = {"base": build("llama")}
    with pytest.raises(ValueError, match="changes completions"):
        attack_inputs(model, rows(), {"x": lambda some: some.map(lambda row: {"completion": " bad"})}, collator())
    with pytest.raises(ValueError, match="at least one model"):
        attack_inputs({}, rows(), {}, collator())
    with pytest.raises(ValueError, match="other names"):
        attack_inputs(model, rows(), {"none": lambda some: some}, collator())
