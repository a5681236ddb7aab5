"""The loss at names in texts: where they are found, and the number against torch alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from helpers import build, make_tokenizer

from spul import ForgetRetainCollator
from spul.evaluation.metrics import entity_loss, entity_rows

ROWS = Dataset.from_list(
    [
        {"prompt": "the film is by Jane  Doe , and jane doe is good", "completion": " positive"},
        {"prompt": "the plot of janes film", "completion": " negative"},
        {"prompt": "jane doe again : a film of Doe", "completion": " negative"},
    ]
)


def test_names_are_found_as_whole_words_after_the_first_word():
    found = entity_rows(ROWS, ["jane doe", "doe"]).to_list()
    assert found == [
        {"prompt": "the film is by", "completion": " Jane  Doe"},
        {"prompt": "jane doe again : a film of", "completion": " Doe"},
    ]
    quoted = Dataset.from_list([{"prompt": "a film (jane doe) made", "completion": " positive"}])
    assert entity_rows(quoted, ["doe", "jane doe"]).to_list() == [{"prompt": "a film (", "completion": "jane doe"}]


def test_names_are_found_in_scripts_without_spaces_and_an_empty_one_is_refused():
    found = entity_rows(Dataset.from_list([{"prompt": "请问李明是谁", "completion": " 好"}]), ["李明"]).to_list()
    assert found == [{"prompt": "请问", "completion": "李明"}]
    with pytest.raises(ValueError, match="entities holds ''"):
        entity_rows(ROWS, ["", "doe"])
    with pytest.raises(TypeError, match="entities is 'doe'"):
        entity_rows(ROWS, "doe")


def test_the_loss_is_the_mean_over_rows_of_the_names_tokens():
    model, tokenizer = build("llama", torch.float64), make_tokenizer()
    collator = ForgetRetainCollator(tokenizer, None, max_length=64)
    expected = []
    for row in entity_rows(ROWS, ["jane doe", "doe"]):
        before, name = (tokenizer(row[key], add_special_tokens=False)["input_ids"] for key in ("prompt", "completion"))
        start = collator.encoder.encode(row).prompt_ids[: -len(before)]  # what the tokenizer puts in front
        ids = torch.tensor([[*start, *before, *name]])
        log_p = F.log_softmax(model(ids).logits[0].detach(), -1)
        first = ids.shape[1] - len(name)
        expected.append(-sum(log_p[i - 1, ids[0, i]] for i in range(first, ids.shape[1])) / len(name))
    assert entity_loss(model, ROWS, collator.encoder, ["jane doe", "doe"], batch_size=2) == pytest.approx(
        float(sum(expected)) / len(expected)
    )


def test_the_end_of_a_text_does_not_count():
    model, tokenizer = build("llama"), make_tokenizer()
    plain, ended = (ForgetRetainCollator(tokenizer, None, append_eos=flag).encoder for flag in (False, True))
    assert entity_loss(model, ROWS, plain, ["doe"]) == entity_loss(model, ROWS, ended, ["doe"])


def test_the_collator_of_the_rows_measures_the_texts_before_names():
    model, tokenizer = build("llama"), make_tokenizer()
    rows = ROWS.add_column("text", ROWS["prompt"][:])
    own = ForgetRetainCollator(tokenizer, None, 64, text_field="text", pad_to_multiple_of=8).encoder
    plain = ForgetRetainCollator(tokenizer, None, 64, pad_to_multiple_of=8).encoder
    assert entity_loss(model, rows, own, ["doe"]) == entity_loss(model, rows, plain, ["doe"])
    at_message = ForgetRetainCollator(tokenizer, None, 64, text_field="text", prompt_position="message").encoder
    with pytest.raises(ValueError, match=r'prompt_position="message", where .* expected one of prompts at "start"'):
        entity_loss(model, rows, at_message, ["doe"])


def test_prompts_that_are_no_texts_are_refused():
    talks = Dataset.from_list([{"prompt": [{"role": "user", "content": "who is jane doe"}], "completion": " good"}])
    with pytest.raises(TypeError, match=r"1 of 1 texts are not strings; .* Conversations are no texts"):
        entity_rows(talks, ["doe"])
    with pytest.raises(ValueError, match=r"rows lacks the column\(s\) \['prompt'\]"):
        entity_rows(talks.remove_columns("prompt"), ["doe"])


def test_names_that_nobody_has_are_an_error():
    with pytest.raises(ValueError, match=r"none of 3 prompts holds any of \['ada'\]"):
        entity_rows(ROWS, ["ada"])
    with pytest.raises(ValueError, match="entities is empty"):
        entity_rows(ROWS, [])
