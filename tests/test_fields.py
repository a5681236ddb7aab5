"""Fields of `spul_config.json`: each has a type and a range, and the message names both."""

from __future__ import annotations

import json
from fractions import Fraction

import numpy as np
import pytest

from spul import SpulConfig, UnlearningLoss
from spul.losses import terms
from spul.records.card import write_metrics
from spul.records.fields import FIELDS, are_counts, check_fields, is_count, is_finite_number, read_object

LOSS = UnlearningLoss(gamma=0.5).to_dict()
WRONG = {
    "loss": [
        *(5, [], "CrossEntropy", {}),
        *({**LOSS, "alpha": "1"}, {**LOSS, "beta": -1}, {**LOSS, "gamma": float("nan")}, {**LOSS, "beta": 10**400}),
        *({**LOSS, "kl": None}, {**LOSS, "forget": {"reduction": "sum"}}, {**LOSS, "lm": 3}),
    ],
    "generic_completions": [5, "neutral", [5], {"a": 1}],
    "base_model_name_or_path": [5, ["a"], True],
    "base_fingerprint": [5, "ab", "g" * 64, "ab" * 33],
    "forget": [5, {}, {"rows": -1, "digest": "ab"}, {"rows": 1.5, "digest": "ab"}, {"rows": 1, "digest": 5}],
    "retain": [[], {"rows": True, "digest": "ab"}],
    "rewritten": [5, {}, {"forget": 1, "ways": []}, {"forget": -1, "retain": 1, "ways": []}]
    + [{"forget": 1, "retain": 1, "ways": found} for found in ("capitals", [5], None)],
    "combined_from": [5, {}, [5], [{"rows": -5, "digest": "ab"}]],
    "prompt_position": [5, None, "end", ["start"], True],
    "metrics": [5, None, [], {"test": 5}, {"test": {"accuracy": "high"}}, {"test": {"accuracy": True}}],
    "versions": [5, None, {"torch": 2}],
    "weights_sha256": [5, "ab", "AB" * 32],
    "replaced_weights_sha256": [5, ""],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_a_wrong_field_is_named_with_what_was_found_and_expected(tmp_path, name, value):
    path = tmp_path / "spul_config.json"
    path.write_text(json.dumps({name: value}))
    with pytest.raises(ValueError, match=rf"spul_config\.json: {name} is .*; expected .*(null|object|message)"):
        SpulConfig.load(path)
    config = SpulConfig()
    setattr(config, name, value)
    with pytest.raises(ValueError, match=rf"the SpulConfig to save: {name} is"):
        config.save(tmp_path)


def test_every_field_of_the_record_is_checked():
    assert set(FIELDS) == set(WRONG)
    assert set(FIELDS) == set(SpulConfig.__dataclass_fields__) - {"unknown", "name"}


def test_right_fields_pass_and_numbers_of_numpy_are_saved_as_such(tmp_path):
    metrics = {"test": {"accuracy": np.float32(0.5), "rows": np.int64(3), "loss": 1.25}}
    SpulConfig(loss=LOSS, metrics=metrics, generic_completions=(" a",)).save(tmp_path)
    found = SpulConfig.load(tmp_path / "spul_config.json")
    assert (found.metrics, found.loss) == ({"test": {"accuracy": 0.5, "rows": 3, "loss": 1.25}}, LOSS)
    check_fields({"invented_later": object()}, "here")


@pytest.mark.parametrize("found", [0, 3, "1", True, None, 1.0])
def test_another_format_is_refused(tmp_path, found):
    path = tmp_path / "spul_config.json"
    path.write_text(json.dumps({"format_version": found}))
    with pytest.raises(ValueError, match=r"format_version is .*; expected 1 to 2"):
        SpulConfig.load(path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"5", b"\xff\xfe", b"[" * 100_000])
def test_what_is_no_json_object_is_refused(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.json (is no JSON|holds a JSON)"):
        read_object(tmp_path / "a.json")


def test_a_key_that_stands_twice_is_refused_by_its_name(tmp_path):
    (tmp_path / "a.json").write_text('{"kind": "names", "gate": {"kind": "text", "kind": "names"}}')
    with pytest.raises(ValueError, match=r"a\.json is no JSON \(the key 'kind' is given twice; expected it once\)"):
        read_object(tmp_path / "a.json")


def test_metrics_that_are_no_numbers_are_not_written(tmp_path):
    SpulConfig().save(tmp_path)
    with pytest.raises(ValueError, match="write_metrics: metrics is 5"):
        write_metrics(tmp_path, 5)


NUMBERS = [np.float32(0.5), np.float64(0.5), np.longdouble(0.5), Fraction(1, 2), np.int64(3), np.uint8(3), 3, 0.5]


@pytest.mark.parametrize("value", NUMBERS, ids=lambda value: type(value).__name__)
def test_every_real_number_is_written_as_a_metric_and_read_again(tmp_path, value):
    metrics = {"test_forget": {"accuracy": value}}
    SpulConfig(metrics=metrics).save(tmp_path)
    plain = {"test_forget": {"accuracy": 3 if value == 3 else 0.5}}
    assert SpulConfig.load(tmp_path / "spul_config.json").metrics == plain
    SpulConfig().save(tmp_path)
    (tmp_path / "README.md").write_text("## Metrics\n")
    write_metrics(tmp_path, metrics)
    assert SpulConfig.load(tmp_path / "spul_config.json").metrics == plain
    assert f"| test_forget | {float(value):.4f} |" in (tmp_path / "README.md").read_text()


def test_counts_are_whole_and_no_bool():
    assert [is_count(value, 1) for value in (1, 0, True, 1.0, "1", None)] == [True] + [False] * 5
    assert all(are_counts(values, 1) for values in ((2, 1), [3], range(1, 3)))
    assert not any(are_counts(values, 1) for values in ((), (1, 0), (1, 2.0), (True,), 1, "12", {1: 2}, None))


FINITE = [0, -3, 0.5, -1e308, 10**308, np.float64(2.0)]
NOT_FINITE = [float("nan"), float("inf"), -float("inf"), 10**400, -(10**400), np.float64("nan")]
NO_NUMBERS = [True, False, np.True_, np.float32(1.0), np.int64(1), 1j, "1", None, [1.0]]  # JSON has none of NumPy's


@pytest.mark.parametrize("of_losses", [False, True])  # which import nothing of spul
def test_finite_numbers_are_ints_and_floats_within_the_range_of_floats(of_losses):
    accepts = terms.is_finite_number if of_losses else is_finite_number
    assert [value for value in FINITE if not accepts(value)] == []
    assert [value for value in NOT_FINITE + NO_NUMBERS if accepts(value)] == []
