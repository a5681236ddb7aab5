"""Checkpoints of earlier versions, which noted less of their rows and loss, resume with what they noted."""

import json
import logging

import pytest
from helpers import make_answers, make_collator, make_dataset, rows
from resumed import make, with_rewritten

from spul import UnlearningLoss
from spul.training.resuming import IDENTITY


def test_a_checkpoint_without_a_note_of_rows_and_loss_is_resumed_with_a_warning(tmp_path, caplog):
    make(tmp_path).train()
    path = tmp_path / "checkpoint-1" / "trainer_state.json"
    state = json.loads(path.read_text())
    del state["stateful_callbacks"][IDENTITY]
    path.write_text(json.dumps(state))
    again = make(tmp_path, make_answers(), max_steps=2)
    with caplog.at_level(logging.WARNING):
        again.train(resume_from_checkpoint=True)
    assert "does not say what rows and loss it was trained with" in caplog.text
    assert again.state.global_step == 2


def test_a_checkpoint_with_a_digest_of_an_earlier_version_resumes_with_a_warning(tmp_path, caplog):
    make(tmp_path).train()
    path = tmp_path / "checkpoint-1" / "trainer_state.json"
    state = json.loads(path.read_text())
    saved_rows = state["stateful_callbacks"][IDENTITY]["rows"]
    saved_rows["content"] = saved_rows.pop("values")
    path.write_text(json.dumps(state))
    with pytest.raises(ValueError, match=r"settings: rows\.retain: 21 saved, 20 passed\. Resume"):
        make(tmp_path, make_dataset(11, 20), max_steps=2).train(resume_from_checkpoint=True)
    again = make(tmp_path, max_steps=2)
    with caplog.at_level(logging.WARNING):
        again.train(resume_from_checkpoint=True)
    assert "a digest of its rows by an earlier version" in caplog.text
    assert again.state.global_step == 2


def noted_by_an_earlier_version(folder, change=lambda saved: None):
    """Make the checkpoint in a folder note what it did before dropped rows and lengths were noted."""
    path = folder / "checkpoint-1" / "trainer_state.json"
    state = json.loads(path.read_text())
    saved = state["stateful_callbacks"][IDENTITY]
    del saved["dataloader_drop_last"], saved["lengths"]
    change(saved)
    path.write_text(json.dumps(state))


def test_a_checkpoint_that_notes_less_as_one_of_an_earlier_version_resumes(tmp_path):
    make(tmp_path).train()
    noted_by_an_earlier_version(tmp_path)
    with pytest.raises(ValueError, match=r"settings: loss\.alpha: 1\.0 saved, 0\.25 passed\. Resume"):
        make(tmp_path, loss=UnlearningLoss(alpha=0.25), max_steps=2).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match=r"settings: rows_of_a_step: 8 saved, 4 passed\. Resume"):
        make(tmp_path, per_device_train_batch_size=4, max_steps=2).train(resume_from_checkpoint=True)
    again = make(tmp_path, max_steps=2, dataloader_drop_last=True)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 2


def test_the_rows_of_a_step_that_an_earlier_version_asked_for_are_not_compared_with_those_found(tmp_path):
    make(tmp_path, per_device_train_batch_size=4).train()
    noted_by_an_earlier_version(tmp_path, lambda saved: saved.update(rows_of_a_step=8))  # half fitted into memory
    again = make(tmp_path, max_steps=2, auto_find_batch_size=True)
    again.train(resume_from_checkpoint=True)
    assert (again.state.global_step, again._train_batch_size) == (2, 4)


def test_rows_tokenized_ahead_by_an_earlier_version_which_noted_no_rewritten_ones_resume(tmp_path):
    collator = make_collator(max_length=200)
    tokenized = with_rewritten(rows("jane", 11), rows("film", 21)).map(collator.tokenize)
    make(tmp_path, tokenized, collator=collator).train()
    with pytest.raises(ValueError, match=r"rows\.rewritten: .* saved, none passed"):
        make(tmp_path, tokenized.remove_columns("rewritten_by"), collator=collator).train(resume_from_checkpoint=True)
    noted_by_an_earlier_version(tmp_path, lambda saved: saved["rows"].update(rewritten=None))
    others = tokenized.select(range(len(tokenized) - 1, -1, -1))
    with pytest.raises(ValueError, match=r"settings: rows\.values: \w{12} saved, \w{12} passed\. Resume"):
        make(tmp_path, others, collator=collator).train(resume_from_checkpoint=True)
    again = make(tmp_path, tokenized, collator=collator, max_steps=2)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 2
