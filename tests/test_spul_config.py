"""The record that is saved with a prompt: `spul_config.json`."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import build
from peft import PromptTuningConfig

from spul import SoftPromptUnlearner, SpulConfig, UnlearningLoss, fingerprint
from spul.records.digests import DataSummary, RewrittenRows
from spul.records.spul_config import SPUL_CONFIG_NAME, library_versions, read_spul_config, requests_of

CONFIG = SpulConfig(
    loss=UnlearningLoss(alpha=0.1).to_dict(),
    generic_completions=[" neutral", " ünknown"],
    base_model_name_or_path="facebook/opt-1.3b",
    base_fingerprint="ab" * 32,
    forget=DataSummary(2, "cd" * 32),
    retain=DataSummary(3, "ef" * 32),
    metrics={"test_forget": {"accuracy": 0.02}},
    versions={"torch": "2.6"},
)


@pytest.mark.parametrize("config", [CONFIG, SpulConfig()])
def test_a_config_saved_and_loaded_is_the_same(tmp_path, config):
    config.save(tmp_path)
    assert SpulConfig.load(tmp_path / "spul_config.json") == config


def test_the_saved_config_is_readable_json_in_utf8(tmp_path):
    CONFIG.save(str(tmp_path))
    text = (tmp_path / SPUL_CONFIG_NAME).read_text(encoding="utf-8")
    assert " ünknown" in text
    assert json.loads(text)["forget"] == {"rows": 2, "digest": "cd" * 32}


def test_fields_of_another_version_are_kept_and_missing_ones_unknown(tmp_path):
    data = {"format_version": 2, "loss": None, "invented_later": {"x": 1}, "retain": {"rows": 3, "digest": "ef"}}
    path = tmp_path / SPUL_CONFIG_NAME
    path.write_text(json.dumps(data), encoding="utf-8")
    config = SpulConfig.load(path)
    assert config == SpulConfig(retain=DataSummary(3, "ef"), unknown={"invented_later": {"x": 1}})
    config.save(tmp_path)
    assert json.loads(path.read_text())["invented_later"] == {"x": 1}
    assert SpulConfig.load(path) == config


def test_fields_of_a_summary_of_another_version_are_ignored(tmp_path):
    data = {"format_version": 2, "forget": {"rows": 2, "digest": "cd", "invented_later": 1}}
    path = tmp_path / SPUL_CONFIG_NAME
    path.write_text(json.dumps(data), encoding="utf-8")
    assert SpulConfig.load(path).forget == DataSummary(2, "cd")


def test_what_a_prompt_was_made_of_is_saved_and_loaded_unknown_parts_too(tmp_path):
    config = SpulConfig(combined_from=[DataSummary(2, "cd" * 32), None])
    config.save(tmp_path)
    assert SpulConfig.load(tmp_path / SPUL_CONFIG_NAME) == config


def test_rewritten_rows_are_saved_beside_the_rows_given_and_left_out_where_there_are_none(tmp_path):
    config = SpulConfig(forget=DataSummary(2), rewritten=RewrittenRows(4, 2, ["capitals", "1 turns before"]))
    config.save(tmp_path)
    assert SpulConfig.load(tmp_path / SPUL_CONFIG_NAME) == config
    SpulConfig(forget=DataSummary(2)).save(tmp_path)
    assert "rewritten" not in json.loads((tmp_path / SPUL_CONFIG_NAME).read_text())


@pytest.mark.parametrize("version", [{}, {"format_version": 1}])
def test_plain_digests_of_rows_of_format_1_are_dropped(tmp_path, version):
    one = {"rows": 2, "digest": "cd" * 32}
    path = tmp_path / SPUL_CONFIG_NAME
    path.write_text(json.dumps({**version, "forget": one, "retain": one, "combined_from": [one, None]}))
    config = SpulConfig.load(path)
    assert config == SpulConfig(forget=DataSummary(2), retain=DataSummary(2), combined_from=[DataSummary(2), None])
    config.save(tmp_path)
    assert "cd" * 32 not in path.read_text()
    assert SpulConfig.load(path) == config


def test_a_record_knows_the_last_part_of_the_folder_that_it_was_read_from_and_does_not_save_it(tmp_path):
    CONFIG.save(tmp_path)
    config = read_spul_config(tmp_path)
    assert config.name == tmp_path.name
    config.save(tmp_path)
    assert tmp_path.name not in (tmp_path / SPUL_CONFIG_NAME).read_text()


def test_metrics_are_not_shared_between_configs():
    one, other = SpulConfig(), SpulConfig()
    one.metrics["test"] = {"accuracy": 1.0}
    assert other.metrics == {}


def test_the_versions_recorded_are_the_installed_ones():
    versions = library_versions()
    assert set(versions) == {"spul", "torch", "transformers", "peft", "datasets", "accelerate"}
    assert versions["torch"].split("+")[0] == torch.__version__.split("+")[0]


def test_a_saved_prompt_records_the_fingerprint_of_the_bare_base(tmp_path):
    model = build("llama")
    before = fingerprint(model)
    unlearner = SoftPromptUnlearner(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with torch.no_grad():
        unlearner.prompt_encoder["default"].embedding.weight.add_(1.0)
    unlearner.save_pretrained(str(tmp_path))
    assert SpulConfig.load(tmp_path / SPUL_CONFIG_NAME).base_fingerprint == before


def test_a_folder_of_plain_peft_has_an_empty_record(tmp_path):
    assert read_spul_config(tmp_path) == SpulConfig()


def test_requests_of_combined_records_are_those_they_were_combined_from():
    one, two, three = (DataSummary(i, str(i) * 64) for i in range(3))
    assert requests_of([SpulConfig(forget=one), SpulConfig(forget=two, combined_from=[three, None])]) == [
        *(one, three, None)
    ]


def test_a_base_of_other_weights_is_warned_of():
    base, record = build("llama"), SpulConfig()
    record.warn_if_base_differs(base, "the prompt was", "Look.")  # nothing is known
    record.set_base(base)
    assert record.base_fingerprint == fingerprint(base)
    record.warn_if_base_differs(base, "the prompt was", "Look.")
    record.base_fingerprint = "ab" * 32
    expected = f"the prompt was trained on other weights .*abababababab, this base's {fingerprint(base)[:12]}.* Look. "
    with pytest.warns(UserWarning, match=expected) as found:
        record.warn_if_base_differs(base, "the prompt was", "Look.")
    assert found[0].filename == __file__
    record.set_base(base)  # one that is known stays
    assert record.base_fingerprint == "ab" * 32
