"""Alternate answers sampled from the model itself."""

from __future__ import annotations

import pytest
import torch
from encoded import with_template, word_level
from helpers import build, make_answers, make_dataset, make_tokenizer, make_unlearner

from spul.training import add_alternates
from spul.training.alternates import _keep, _request

SETTINGS = {"num": 3, "max_new_tokens": 6, "template": "{prompt}{completion} other:", "progress": False}


def test_forget_rows_get_different_answers_that_are_not_their_own():
    dataset = make_answers(4, 3)
    found = add_alternates(build("llama"), make_tokenizer(), dataset, **SETTINGS, temperature=2.0)
    assert found.remove_columns("alternates")[:] == dataset[:]
    assert found["alternates"][4:] == [[], [], []]
    for row in found.select(range(4)):
        assert 1 <= len(row["alternates"]) <= 3
        assert len({text.strip().casefold() for text in row["alternates"]}) == len(row["alternates"])
        assert row["completion"] not in row["alternates"]
        assert all(text.startswith(" ") and text.strip() for text in row["alternates"])


def test_the_seed_decides_and_the_global_generator_does_not_move():
    dataset, tokenizer = make_answers(2, 1), make_tokenizer()
    torch.manual_seed(4)
    state = torch.random.get_rng_state()
    first = add_alternates(build("llama"), tokenizer, dataset, **SETTINGS)["alternates"]
    torch.random.set_rng_state(state)
    torch.rand(3)
    before = torch.random.get_rng_state()
    model = build("llama")
    torch.random.set_rng_state(before)
    assert add_alternates(model, tokenizer, dataset, **SETTINGS)["alternates"] == first
    assert torch.equal(torch.random.get_rng_state(), before)
    assert add_alternates(model, tokenizer, dataset, **SETTINGS, seed=1)["alternates"] != first


def test_a_transform_that_would_lose_the_column_is_refused_before_an_answer_is_sampled(monkeypatch):
    base, dataset = build("llama"), make_answers(2, 1)
    monkeypatch.setattr(base, "generate", lambda *args, **kwargs: pytest.fail("sampled"))
    rows = dataset.with_transform(lambda batch: {name: batch[name] for name in dataset.column_names})
    with pytest.raises(ValueError, match="expected 'alternates' among them"):
        add_alternates(base, make_tokenizer(), rows, **SETTINGS)


def test_rows_that_cannot_be_asked_about_are_refused_before_an_answer_is_sampled(monkeypatch):
    base, tokenizer, dataset = build("llama"), make_tokenizer(), make_answers(3, 1)
    monkeypatch.setattr(base, "generate", lambda *args, **kwargs: pytest.fail("sampled"))
    with pytest.raises(ValueError, match=r"dataset lacks the column\(s\) \['prompt'\]"):
        add_alternates(base, tokenizer, dataset.remove_columns("prompt"), **SETTINGS)
    longer = dataset.map(lambda row, i: {"prompt": row["prompt"] + " x" * 90 * (i == 2)}, with_indices=True)
    with pytest.raises(ValueError, match=r"exceed the model's 96 positions"):
        add_alternates(base, tokenizer, longer, **SETTINGS, batch_size=1)


def test_the_base_writes_also_under_a_prompt():
    dataset, tokenizer = make_answers(2, 1), make_tokenizer()
    prompted = add_alternates(make_unlearner(), tokenizer, dataset, **SETTINGS)
    assert prompted["alternates"] == add_alternates(build("llama"), tokenizer, dataset, **SETTINGS)["alternates"]


@pytest.mark.parametrize(
    ("name", "value"),
    [("stop_strings", ["a"]), ("num_beams", 2), ("repetition_penalty", 9.0), ("return_dict_in_generate", True)],
)
def test_generation_settings_of_the_base_change_no_answer(name, value):
    dataset, tokenizer, base = make_answers(2, 1), make_tokenizer(), build("llama")
    expected = add_alternates(base, tokenizer, dataset, **SETTINGS)["alternates"]
    own = base.generation_config
    setattr(own, name, value)
    assert add_alternates(base, tokenizer, dataset, **SETTINGS)["alternates"] == expected
    assert base.generation_config is own
    assert getattr(own, name) == value


def test_answers_end_at_the_first_line_and_keep_the_leading_space():
    found: list[str] = []
    _keep(found, [" in Rome\nQuestion: why", "\n\nin rome", "in Oslo", "", " In Paris Answer: x"], " in Oslo", 5)
    assert found == [" in Rome", " In Paris"]


def test_a_request_has_the_last_message_of_the_user_in_the_chat_template():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }} {{ m.content }}{% endfor %}"
    prompt = [{"role": "user", "content": " film "}]
    row = {"prompt": prompt, "completion": [{"role": "assistant", "content": " good"}]}
    assert tokenizer.decode(_request(row, "{prompt} {completion}", tokenizer)) == "user film good"
    row["prompt"] = [*prompt, {"role": "assistant", "content": "the plot"}, {"role": "tool", "content": "bad"}]
    assert tokenizer.decode(_request(row, "{prompt} {completion}", tokenizer)) == "user film good"
    row["prompt"] = [{"role": "user", "content": [{"type": "text", "text": text} for text in ("fi", "lm")]}]
    assert tokenizer.decode(_request(row, "{prompt} {completion}", tokenizer)) == "user film good"


def test_a_text_that_holds_a_field_of_the_template_stays_as_it_is():
    row = {"prompt": "a {completion}", "completion": "b {prompt}"}
    tokenizer = word_level("a", "b", "{completion}:", "{prompt}")
    assert tokenizer.decode(_request(row, "{prompt}: {completion}", tokenizer)) == "a {completion}: b {prompt}"


def test_a_request_of_text_is_begun_once_and_not_ended():
    row = {"prompt": "<s> film", "completion": " good"}
    for template in ("<s> $A", "$A </s>", "<s> $A </s>"):
        tokenizer = with_template(word_level("film", "good"), template)
        assert tokenizer.decode(_request(row, "{prompt} {completion}", tokenizer)) == "<s> film good"


def test_what_cannot_be_done_is_refused():
    model, tokenizer, dataset = build("llama"), make_tokenizer(), make_dataset(2, 1)
    with pytest.raises(ValueError, match="has no forget rows"):
        add_alternates(model, tokenizer, dataset.select([2]), **SETTINGS)
    with pytest.raises(ValueError, match="has a column 'alternates' already"):
        add_alternates(model, tokenizer, dataset.add_column("alternates", [[]] * 3), **SETTINGS)
    for name, value in (("num", 0), ("max_new_tokens", True), ("batch_size", -1)):
        with pytest.raises(ValueError, match=rf"{name}={value}: expected a whole number above 0"):
            add_alternates(model, tokenizer, dataset, **{**SETTINGS, name: value})
    with pytest.raises(ValueError, match="template='x': expected a text with"):
        add_alternates(model, tokenizer, dataset, **{**SETTINGS, "template": "x"})
    for value in (0.0, float("inf"), True, "1"):
        with pytest.raises(ValueError, match=rf"temperature={value!r}: expected a number above 0"):
            add_alternates(model, tokenizer, dataset, **SETTINGS, temperature=value)
    with pytest.raises(ValueError, match=r"an answer of 200 exceed the model's 96 positions"):
        add_alternates(model, tokenizer, dataset, **{**SETTINGS, "max_new_tokens": 200})
