"""The metrics of an evaluation on a model card, and in the record beside it."""

from __future__ import annotations

import json

import pytest
import torch
from evaluations import membership, utility, whole
from huggingface_hub import ModelCard
from reports import section

from spul import SpulConfig, UnlearningLayers, UnlearningLayersConfig
from spul.evaluation.report import add_to_card, card_metrics
from spul.evaluation.results import Evaluation
from spul.records.card import model_card


def test_the_cards_metrics_are_the_splits_the_detached_and_the_worst_attacked():
    metrics = card_metrics(whole())
    assert list(metrics) == [
        *("train_retain", "train_forget", "test_retain", "test_forget"),
        *("test_forget, detached", "test_forget, worst input attack (capitals)"),
        *("train_retain, retrained", "train_forget, retrained", "test_retain, retrained", "test_forget, retrained"),
    ]
    # F1 by hand: of either class (five rows) one is found and none is wrongly given, 2 * 1 / (2 * 1 + 4) = 1/3.
    assert metrics["test_forget"] == pytest.approx({"accuracy": 0.2, "f1": 1 / 3, "generic": 0.8})
    assert metrics["test_forget, detached"] == {"accuracy": 0.8, "generic": 0.0}
    assert metrics["test_forget, worst input attack (capitals)"] == {"accuracy": 0.5, "generic": 0.5}
    assert metrics["train_forget, retrained"] == {"accuracy": 0.5, "generic": 0.0}


def test_what_was_not_measured_is_not_among_the_cards_metrics():
    found = Evaluation({}, utility({"unlearned": {"train_retain": 9, "train_forget": 1}}), {})
    assert list(card_metrics(found)) == ["train_retain", "train_forget"]
    with pytest.raises(ValueError, match="no measure 'utility' of the unlearned model"):
        card_metrics(Evaluation({}, membership(("unlearned",)), {}))


@pytest.fixture
def adapter(tmp_path):
    """The record and the card of a prompt, with something that a later version may know."""
    config = SpulConfig(base_model_name_or_path="some/base", metrics={"old": {"accuracy": 0.123}})
    config.save(tmp_path)
    path = tmp_path / "spul_config.json"
    record = {**json.loads(path.read_text()), "of_a_later_version": 1}
    path.write_text(json.dumps(record))
    model_card(config, prompt_type="P_TUNING", num_virtual_tokens=3, num_parameters=5).save(tmp_path / "README.md")
    return tmp_path


def test_an_adapters_record_and_card_get_the_metrics_and_keep_all_else(adapter):
    before = (adapter / "README.md").read_text(encoding="utf-8")
    add_to_card(whole(), adapter)
    after = (adapter / "README.md").read_text(encoding="utf-8")
    assert SpulConfig.load(adapter / "spul_config.json").metrics == card_metrics(whole())
    record = json.loads((adapter / "spul_config.json").read_text(encoding="utf-8"))
    assert (record["of_a_later_version"], record["base_model_name_or_path"]) == (1, "some/base")
    assert "| test_forget, worst input attack (capitals) | 0.5000 | " in section(after, "Metrics")
    assert "0.123" not in after
    (front, body), (old_front, old_body) = (text[4:].split("\n---\n", 1) for text in (after, before))
    assert body.replace(section(body, "Metrics"), section(old_body, "Metrics")) == old_body
    assert front.startswith(old_front)  # the results are new, all else is as it was
    assert "- Of the 10 test forget rows the base itself got 2 wrong" in section(after, "Metrics")
    results = ModelCard(after).data.eval_results
    assert {(one.dataset_split, one.dataset_config, one.metric_type): one.metric_value for one in results} == {
        (split.split(",")[0], "worst input attack (capitals)" if "," in split else None, name): round(value, 6)
        for split, values in card_metrics(whole()).items()
        if "detached" not in split and "retrained" not in split
        for name, value in values.items()
    }
    accuracy = whole().metric("utility", "test_forget", "accuracy")
    (one,) = [r for r in results if (r.dataset_name, r.metric_type) == ("test forget", "accuracy")]
    assert one.metric_args == {"low": round(accuracy.low, 6), "high": round(accuracy.high, 6), "rows": 10}
    add_to_card(whole(), adapter)
    assert (adapter / "README.md").read_text(encoding="utf-8") == after
    assert sorted(path.name for path in adapter.iterdir()) == ["README.md", "spul_config.json"]


def test_saved_unlearning_layers_get_the_metrics_and_load_with_them(tmp_path):
    from helpers import build_llama

    torch.manual_seed(0)
    UnlearningLayers(build_llama(), UnlearningLayersConfig()).save_pretrained(tmp_path)
    assert "Not evaluated." in (tmp_path / "README.md").read_text(encoding="utf-8")
    add_to_card(whole(), tmp_path)
    assert "| test_forget, detached | 0.8000 |" in (tmp_path / "README.md").read_text(encoding="utf-8")
    torch.manual_seed(0)
    assert UnlearningLayers.from_pretrained(build_llama(), tmp_path).spul_config.metrics == card_metrics(whole())


@pytest.mark.parametrize("name", ["spul_config.json", "README.md"])
def test_a_folder_that_is_no_saved_adapter_is_refused(adapter, name):
    (adapter / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"has no {name}; pass a folder that save_pretrained"):
        add_to_card(whole(), adapter)


def test_a_card_without_metrics_is_refused_before_anything_is_written(adapter):
    record = (adapter / "spul_config.json").read_bytes()
    (adapter / "README.md").write_text("# My own card\n")
    with pytest.raises(ValueError, match="has no section '## Metrics'"):
        add_to_card(whole(), adapter)
    assert (adapter / "spul_config.json").read_bytes() == record
