"""Fusion: the closed form against least squares on the stacked data, and what it must be exact in."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers import SMALL_LAYERS, build, make_tokenizer, stirred
from torch._subclasses.fake_tensor import FakeTensorMode

from spul import ForgetRetainCollator, UnlearningLayers, UnlearningLayersConfig, fuse
from spul.layers import fusion, gather_inputs
from spul.records.digests import DataSummary

WORDS = ["the", "review", "is", "of", "film", "good", "bad", "plot", "about", "jane", "doe", "text"]


def request(seed: int, num_rows: int = 24) -> Dataset:
    """Rows of different lengths, other ones for each seed."""
    draw = np.random.default_rng(seed)
    rows = [
        {"prompt": " ".join(draw.choice(WORDS, size=draw.integers(2, 9))), "completion": " positive"}
        for _ in range(num_rows)
    ]
    return Dataset.from_list(rows)


def collator(padding_side="right"):
    tokenizer = make_tokenizer()
    tokenizer.padding_side = padding_side
    return ForgetRetainCollator(tokenizer, None, max_length=64)


def trained(seed: int, family: str = "llama", gather: bool = True, **kwargs) -> UnlearningLayers:
    """Layers of one request, gathered and removed from the base."""
    layers = stirred(build(family, torch.float64), seed=seed)
    if gather:
        gather_inputs(layers, request(seed), collator(), progress=False, **kwargs)
    layers.remove()
    return layers


def stacked_inputs(layers: UnlearningLayers, rows: Dataset) -> dict[str, np.ndarray]:
    """The inputs of the projections, row by row without padding, all kept."""
    layers.attach()
    seen: dict[str, list] = {}
    handles = []
    for name, layer in zip(layers.block_names, layers.layers, strict=True):
        for projection in ("down", "up"):
            key = f"{name}.{projection}"

            def keep(module, inputs, key=key):
                x = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).numpy()
                seen.setdefault(key, []).append(np.concatenate([x, np.ones((len(x), 1))], axis=1))

            handles.append(getattr(layer, projection).register_forward_pre_hook(keep))
    for row in rows:
        with torch.no_grad():
            layers(input_ids=collator().encoder.batch([row])["input_ids"])
    for handle in handles:
        handle.remove()
    layers.remove()
    return {key: np.concatenate(blocks) for key, blocks in seen.items()}


def matrix(layers: UnlearningLayers, name: str) -> np.ndarray:
    state = layers.layers_state()
    return np.concatenate([state[f"{name}.weight"].detach().numpy().T, state[f"{name}.bias"].detach().numpy()[None]])


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_gathering_in_padded_batches_is_the_gram_matrix_of_all_rows(family):
    layers = trained(1, family, batch_size=5)
    for name, inputs in stacked_inputs(layers, request(1)).items():
        np.testing.assert_allclose(layers.gram_matrices[name].numpy(), inputs.T @ inputs, rtol=1e-9, atol=1e-9)


def test_the_fused_projections_solve_least_squares_on_the_stacked_data():
    parts = [trained(seed) for seed in (1, 2, 3)]
    inputs = [stacked_inputs(part, request(seed)) for part, seed in zip(parts, (1, 2, 3), strict=True)]
    fused = fuse(parts, ridge=0.0)
    checked = 0
    for name in parts[0].gram_matrices:
        xs = [some[name] for some in inputs]
        stacked = np.concatenate(xs)
        if np.linalg.matrix_rank(stacked) < stacked.shape[1]:
            continue  # a dead unit of the bottleneck, of which the data say nothing
        targets = np.concatenate([x @ matrix(part, name) for x, part in zip(xs, parts, strict=True)])
        expected, *_ = np.linalg.lstsq(stacked, targets, rcond=None)
        np.testing.assert_allclose(matrix(fused, name), expected, rtol=1e-6, atol=1e-8)
        checked += 1
    assert checked >= 2


def test_retain_rows_count_together_what_they_are_given_beside_the_forget_rows():
    layers, retain = trained(1, gather=False), request(9, num_rows=7)
    layers.attach()
    gather_inputs(layers, request(1), collator(), 5, progress=False, retain=retain, retain_weight=0.5)
    layers.remove()
    kept = stacked_inputs(layers, retain)
    for name, inputs in stacked_inputs(layers, request(1)).items():
        expected = inputs.T @ inputs + 0.5 * len(inputs) / len(kept[name]) * kept[name].T @ kept[name]
        np.testing.assert_allclose(layers.gram_matrices[name].numpy(), expected, rtol=1e-9, atol=1e-9)


def test_with_one_fixed_down_projection_fused_layers_say_what_each_said_where_the_data_leave_room():
    """Wider than there are tokens, and behind the last block only, so that every layer gets the base's own states."""
    config = UnlearningLayersConfig(reduction=0.25, train_down=False)
    rows = [request(seed, num_rows=1) for seed in (1, 2, 3)]
    parts, said = [], []
    for seed, some in enumerate(rows):
        layers = UnlearningLayers(build("llama", torch.float64), config)
        torch.manual_seed(seed)
        with torch.no_grad():
            layers.layers[-1].up.weight.normal_()
            said.append(layers(input_ids=collator().encoder.batch(list(some))["input_ids"]).logits)
        gather_inputs(layers, some, collator(), progress=False)
        layers.remove()
        parts.append(layers)
    fused = fuse(parts, ridge=1e-12)
    assert fused.layers[-1].down.out_features == 128
    for own, one in zip(parts[0].layers, fused.layers, strict=True):
        torch.testing.assert_close(one.down.weight, own.down.weight, rtol=1e-12, atol=1e-15)
    for some, expected in zip(rows, said, strict=True):
        with torch.no_grad():
            ids = collator().encoder.batch(list(some))["input_ids"]
            found = fused(input_ids=ids).logits
            with fused.disable_adapter():
                before = fused(input_ids=ids).logits
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
        assert (expected - before).abs().max() > 0.1


def test_fusing_one_gives_that_one():
    one = trained(1)
    fused = fuse([one])
    for name, value in one.layers_state().items():
        torch.testing.assert_close(fused.layers_state()[name], value, rtol=1e-7, atol=1e-9)


def test_fusing_does_not_depend_on_the_order():
    states = []
    for order in itertools.permutations([1, 2, 3]):
        fused = fuse([trained(seed) for seed in order])
        states.append(fused.layers_state())
    for state in states[1:]:
        for name, value in states[0].items():
            torch.testing.assert_close(state[name], value, rtol=1e-6, atol=1e-9)


def test_fusing_what_was_fused_with_the_next_request_is_fusing_all():
    together = fuse([trained(seed) for seed in (1, 2, 3)], ridge=1e-12)
    first = fuse([trained(1), trained(2)], ridge=1e-12)
    first.remove()
    assert first.num_requests == 2
    in_turn = fuse([first, trained(3)], ridge=1e-12)
    assert in_turn.num_requests == 3
    for name, value in together.layers_state().items():
        torch.testing.assert_close(in_turn.layers_state()[name], value, rtol=1e-5, atol=1e-8)
    for name, gram in together.gram_matrices.items():
        torch.testing.assert_close(in_turn.gram_matrices[name], gram)


def test_folders_fuse_as_the_layers_that_were_saved(tmp_path):
    parts = [trained(seed) for seed in (1, 2)]
    for i, part in enumerate(parts):
        part.save_pretrained(tmp_path / str(i))
    expected = fuse(parts).layers_state()
    fused = fuse([tmp_path / "0", tmp_path / "1"], build("llama", torch.float64))
    for name, value in expected.items():
        torch.testing.assert_close(fused.layers_state()[name], value, rtol=1e-6, atol=1e-9)
    assert not any(parameter.requires_grad for parameter in fused.parameters())
    fused.save_pretrained(tmp_path / "fused")
    assert "fused from the layers of 2 requests" in (tmp_path / "fused" / "README.md").read_text()


def test_the_model_is_left_in_the_mode_it_was_in():
    layers = stirred(build("llama")).train()
    gather_inputs(layers, request(1), collator(), progress=False)
    assert layers.training
    assert layers.base_model.training


def test_bad_input_is_refused_and_leaves_the_base_alone():
    base = build("llama", torch.float64)
    layers = UnlearningLayers(base)
    with pytest.raises(ValueError, match="retain_weight=0"):
        gather_inputs(layers, request(1), collator(), progress=False, retain=request(2), retain_weight=0)
    with pytest.raises(ValueError, match="retain has 0 rows"):
        gather_inputs(layers, request(1), collator(), progress=False, retain=request(2).select([]))
    layers.remove()
    with pytest.raises(ValueError, match="layers is empty"):
        fuse([])
    for ridge in (-1, True):
        with pytest.raises(ValueError, match=f"ridge={ridge}"):
            fuse([trained(1)], ridge=ridge)
    with pytest.raises(ValueError, match=r"layers\[1\] have no Gram matrices"):
        fuse([trained(1), trained(2, gather=False)], base)
    other = stirred(build("llama", torch.float64), UnlearningLayersConfig(reduction=8))
    gather_inputs(other, request(2), collator(), progress=False)
    with pytest.raises(ValueError, match="only layers of one shape and start can be fused"):
        fuse([trained(1), other], base)
    assert not any(module._forward_hooks for module in base.modules())
    with pytest.raises(ValueError, match="folders only; pass the model"):
        fuse(["somewhere"])


def test_gathering_needs_rows_and_layers_that_are_on():
    layers = stirred(build("llama"), SMALL_LAYERS)
    with pytest.raises(ValueError, match="forget is empty"):
        gather_inputs(layers, request(1).select([]), collator())
    layers.enabled = False
    with pytest.raises(ValueError, match="the layers are disabled"):
        gather_inputs(layers, request(1), collator())
    layers.enabled = True
    layers.remove()
    with pytest.raises(ValueError, match="not attached"):
        gather_inputs(layers, request(1), collator(), progress=False)


def test_what_does_not_span_its_dimensions_needs_a_ridge():
    layers = stirred(build("llama", torch.float64), UnlearningLayersConfig(reduction=4, activation="silu"))
    gather_inputs(layers, request(1).select(range(2)), collator(), progress=False)
    layers.remove()
    with pytest.raises(ValueError, match=r"do not span its 33 dimensions.*pass a ridge above 0"):
        fuse([layers], ridge=0.0)


def test_the_same_layers_twice_are_refused():
    with pytest.raises(ValueError, match=r"layers\[0\] and layers\[1\] are the same; give each request once"):
        fuse([trained(1), trained(1)])


def test_a_set_in_memory_fuses_with_a_folder_also_with_named_modules(tmp_path):
    config = UnlearningLayersConfig(reduction=4, target_modules=("down_proj",))
    parts = []
    for seed in (1, 2):
        layers = stirred(build("llama", torch.float64), config, seed=seed)
        gather_inputs(layers, request(seed), collator(), progress=False)
        layers.remove()
        parts.append(layers)
    parts[0].save_pretrained(tmp_path)
    assert fuse([tmp_path, parts[1]]).num_requests == 2


def test_sets_in_memory_elsewhere_are_compared_with_folders_on_the_cpu():
    layers = trained(1)
    with FakeTensorMode():  # of a device that need not be there
        weight = torch.nn.Parameter(torch.empty(2, device="cuda:0"))
        layers.layers_state = lambda: {"up.weight": weight}
        layers.gram_matrices = {"up": torch.empty(2, 2, device="cuda:0")}
        saved = fusion._saved(layers)
    for tensor in (*saved.state.values(), *saved.gram_matrices.values()):
        assert (tensor.device.type, tensor.requires_grad) == ("cpu", False)


def test_the_record_names_the_requests_that_fused_layers_honor(tmp_path):
    parts = [trained(1), trained(2)]
    for i, part in enumerate(parts):
        part.spul_config.forget = DataSummary(i + 3, str(i) * 64)
    fused = fuse(parts)
    assert fused.spul_config.combined_from == [DataSummary(3, "0" * 64), DataSummary(4, "1" * 64)]
    fused.save_pretrained(tmp_path)
    assert "request 2, forget set: 4 rows" in (tmp_path / "README.md").read_text()


def test_tokenized_rows_gather_as_their_texts_do():
    layers = stirred(build("llama", torch.float64))
    gather_inputs(layers, request(1), collator(), progress=False)
    texts, layers.gram_matrices = layers.gram_matrices, {}
    gather_inputs(layers, request(1).map(collator().tokenize), collator(), progress=False)
    for name, gram in texts.items():
        torch.testing.assert_close(layers.gram_matrices[name], gram)
