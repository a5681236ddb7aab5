"""Weights on disk: only whole, floating, finite ones are read."""

from __future__ import annotations

import hashlib

import pytest
import torch
from safetensors.torch import save_file

from spul.records.weights import file_digest, read_weights, weight_shapes


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_floating_weights_come_back_as_saved(tmp_path, dtype):
    tensors = {"a": torch.arange(6.0).reshape(2, 3).to(dtype), "b": torch.ones((), dtype=dtype)}
    save_file(tensors, tmp_path / "w.safetensors")
    assert weight_shapes(tmp_path / "w.safetensors") == {"a": (2, 3), "b": ()}
    found = read_weights(tmp_path / "w.safetensors")
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.int64])
def test_other_types_are_refused_by_name(tmp_path, dtype):
    save_file({"a": torch.zeros(2, dtype=dtype)}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"'a' has the type .*expected floating point.*Save the adapter again"):
        weight_shapes(tmp_path / "w.safetensors")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused_by_name(tmp_path, value):
    save_file({"a": torch.tensor([0.0, value])}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"1 of 2 values of 'a' are NaN or infinite.*earlier checkpoint"):
        read_weights(tmp_path / "w.safetensors")


@pytest.mark.parametrize("kept", [0, 5, 50, -1])
def test_a_part_of_a_file_is_refused(tmp_path, kept):
    path = tmp_path / "w.safetensors"
    save_file({"a": torch.zeros(20)}, path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match="is no whole safetensors file"):
        read_weights(path)


def test_the_digest_of_a_file_is_that_of_its_bytes(tmp_path):
    content = bytes(range(256)) * 9000  # longer than one read
    (tmp_path / "f").write_bytes(content)
    assert file_digest(tmp_path / "f") == hashlib.sha256(content).hexdigest()
