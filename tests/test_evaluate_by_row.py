"""Rows under prompts of their own, in scoring and in an evaluation: each measured as under its prompt alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import CONFIGS, make_collator, trainable_model
from small_evaluations import make_model, make_splits, measured, per_row

from spul.data import SPLITS
from spul.data.rows import ADAPTER_NAME
from spul.evaluation.attacks.sampling import sampled_answers
from spul.evaluation.metrics import attack_scores, generate_answers, response_likelihoods
from spul.evaluation.metrics.embeddings import response_embeddings
from spul.evaluation.metrics.scoring import score_completions, with_adapter_names

pytestmark = pytest.mark.usefixtures("few_resamples")


def several():
    """The small evaluations' prompt, active, and a longer one that answers otherwise."""
    model = make_model("prompt_tuning")
    torch.manual_seed(7)
    model.add_adapter("other", CONFIGS["prompt_tuning"](9))
    with torch.no_grad():
        model.prompt_encoder["other"].embedding.weight.normal_(0, 0.5)
    return model.eval()


def names_for(num):
    return [("default", "other", "__base__")[i % 3] for i in range(num)]


def under(model, name, measure):
    """A measure under one prompt for all rows, or of the base."""
    if name == "__base__":
        with model.disable_adapter():
            return measure()
    model.set_adapter(name)
    try:
        return measure()
    finally:
        model.set_adapter("default")


def assert_by_row(model, rows, measure, **tolerance):
    """Measures of rows under names are, row by row, those under that row's prompt."""
    names = names_for(len(rows))
    found = measure(with_adapter_names(model, rows, names))
    alone = {name: under(model, name, lambda: measure(rows)) for name in set(names)}
    for i, name in enumerate(names):
        np.testing.assert_allclose(found[i], alone[name][i], rtol=1e-4, atol=1e-5, err_msg=name)
    assert any(np.abs(np.asarray(alone["default"][i]) - alone["other"][i]).max() > 1e-4 for i in range(len(rows)))


@pytest.mark.parametrize("batch_size", [3, 32])
def test_metrics_of_each_row_are_those_under_its_prompt(batch_size):
    model, rows, encoder = several(), make_splits()["test_retain"], make_collator().encoder
    assert_by_row(
        model,
        rows,
        lambda some: [one.log_probs.sum() for one in response_likelihoods(model, some, encoder, batch_size)],
    )
    assert_by_row(model, rows, lambda some: response_embeddings(model, some, encoder, batch_size))
    assert_by_row(model, rows, lambda some: attack_scores(model, some, encoder, batch_size=batch_size)["loss"])


def test_generated_and_sampled_answers_of_each_row_are_those_under_its_prompt():
    model, rows, encoder = several(), make_splits()["test_retain"], make_collator().encoder
    names = names_for(len(rows))
    named = with_adapter_names(model, rows, names)
    for generate in (
        lambda some: generate_answers(model, some, encoder, 4, max_new_tokens=6),
        lambda some: sampled_answers(model, some, encoder, 2, max_new_tokens=4),
    ):
        alone = {name: under(model, name, lambda generate=generate: generate(rows)) for name in set(names)}
        assert generate(named) == [alone[name][i] for i, name in enumerate(names)]


def test_scores_of_a_set_are_the_mean_over_rows_under_their_prompts():
    model, rows, collator = several(), make_splits()["test_retain"], make_collator()
    names = names_for(len(rows))
    found = score_completions(model, rows, collator, batch_size=5, adapter_names=names)
    total = 0.0
    for name in set(names):
        some = rows.select([i for i, own in enumerate(names) if own == name])
        total += len(some) * under(model, name, lambda some=some: score_completions(model, some, collator))["loss"]
    assert found["loss"] == pytest.approx(total / len(rows), rel=1e-5)
    named = rows.add_column(ADAPTER_NAME, names)
    assert score_completions(model, named, collator, batch_size=5) == found
    assert score_completions(model, named, collator, batch_size=5, adapter_names=names) == found


def test_a_transform_that_leaves_the_names_out_is_refused():
    """The rows would run under the active prompt."""
    model, rows, collator = several(), make_splits()["test_retain"], make_collator()
    names = names_for(len(rows))

    def of_two_columns(batch):
        return {name: batch[name] for name in ("prompt", "completion")}

    with pytest.raises(ValueError, match="expected 'adapter_name' among them"):
        score_completions(model, rows.with_transform(of_two_columns), collator, adapter_names=names)
    named = rows.add_column(ADAPTER_NAME, names)
    for measure in (
        lambda some: score_completions(model, some, collator),
        lambda some: response_likelihoods(model, some, collator.encoder),
        lambda some: response_embeddings(model, some, collator.encoder),
        lambda some: generate_answers(model, some, collator.encoder, 4),
    ):
        with pytest.raises(ValueError, match="expected 'adapter_name' among them"):
            measure(named.with_transform(of_two_columns))
    expected = score_completions(model, named, collator)
    of_others = named.with_transform(of_two_columns, columns=["prompt", "completion"], output_all_columns=True)
    for transformed in (named.with_transform(dict), of_others):
        assert score_completions(model, transformed, collator) == expected


def test_an_evaluation_runs_rows_under_their_prompts_and_skips_what_has_one_prompt_for_all():
    model, splits = several(), make_splits()
    names = {split: names_for(len(rows)) for split, rows in splits.items()} | {"test_forget": "other"}
    measures = ("utility", "input attack", "relearning", "quantized", "soft suffix", "linear probe", "sampling")
    found = measured(model, *measures, adapter_names=names)
    for name in ("relearning", "quantized", "soft suffix"):
        assert "adapter_names gives rows prompts of their own" in found.skipped[name]
    alone = {}
    for name in ("default", "other", "__base__"):
        alone[name] = under(model, name, lambda: measured(model, "utility", "input attack"))
    for split in SPLITS:
        own = per_row(found, "utility", split, "unlearned")["loss"]
        for i, loss in enumerate(own):
            name = names[split] if isinstance(names[split], str) else names[split][i]
            assert loss == pytest.approx(per_row(alone[name], "utility", split, "unlearned")["loss"][i], rel=1e-4)
        base = per_row(found, "utility", split, "detached")["loss"]
        assert base == pytest.approx(per_row(alone["default"], "utility", split, "detached")["loss"], rel=1e-4)
    attacks = {one.attack for one in found.measurements if one.measure == "input attack"}
    for attack in attacks - {"none"}:
        own = per_row(found, "input attack", "test_forget", "unlearned", attack)["loss"]
        other = per_row(alone["other"], "input attack", "test_forget", "unlearned", attack)["loss"]
        assert own == pytest.approx(other, rel=1e-4)


def test_a_column_of_names_is_what_adapter_names_are():
    model, splits = several(), make_splits()
    names = {split: names_for(len(rows)) for split, rows in splits.items()}
    columns = {split: with_adapter_names(model, rows, names[split]) for split, rows in splits.items()}
    found = measured(model, "utility", "quantized", splits=columns)
    assert "prompts of their own" in found.skipped["quantized"]
    expected = measured(model, "utility", adapter_names=names)
    for split in SPLITS:
        one, other = (per_row(each, "utility", split, "unlearned")["loss"] for each in (found, expected))
        assert one == other


def test_another_evaluation_of_other_names_is_no_resumed_one(tmp_path):
    model, splits = several(), make_splits()
    measured(model, "utility", output_dir=tmp_path, adapter_names=dict.fromkeys(splits, "other"))
    with pytest.raises(ValueError, match="differs in rows"):
        measured(model, "utility", output_dir=tmp_path, adapter_names=dict.fromkeys(splits, "default"))


def test_names_that_do_not_fit_are_refused():
    model, splits, collator = several(), make_splits(), make_collator()
    rows = splits["test_retain"]
    with pytest.raises(ValueError, match=r"expected a dict with names for each set of rows: \['test_forget'"):
        measured(model, "utility", adapter_names={"test_retain": "other"})
    with pytest.raises(ValueError, match=r"expected a dict with names"):
        measured(model, "utility", adapter_names="other")
    with pytest.raises(ValueError, match=r"holds \['joan'\].*'default', 'other', '__base__'"):
        score_completions(model, rows, collator, adapter_names=["joan"] * len(rows))
    with pytest.raises(ValueError, match="1 names for"):
        score_completions(model, rows, collator, adapter_names=["other"])
    with pytest.raises(TypeError, match="expected a SoftPromptUnlearner"):
        score_completions(trainable_model("lora"), rows, collator, adapter_names=["default"] * len(rows))
