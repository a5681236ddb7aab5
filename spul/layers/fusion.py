"""Fusion of unlearning layers: one set for several requests, without training (EUL, arXiv 2310.20150)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from datasets import Dataset
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..data.batching import by_length
from ..data.checks import check_rows
from ..data.collator import ForgetRetainCollator
from ..data.rows import read_rows, rows_at
from ..losses.terms import check_not_negative
from ..models.causal_lm import evaluation_mode
from ..models.loading import load_base
from ..records.fields import is_finite_number
from ..records.spul_config import SpulConfig, requests_of
from . import checkpoint as files
from .bottleneck import UnlearningLayersConfig
from .unlearning_layers import UnlearningLayers


@torch.no_grad()
def gather_inputs(
    layers: UnlearningLayers,
    forget: Dataset,
    collator: ForgetRetainCollator,
    batch_size: int = 32,
    progress: bool = True,
    retain: Dataset | None = None,
    retain_weight: float = 1.0,
) -> None:
    """Compute the Gram matrices that `fuse` needs of a request, in one pass over its forget set after training.

    They are those of the projections' inputs over all tokens of the rows, in float64: (d + 1) x (d + 1) and
    (r + 1) x (r + 1) values a layer, d the base's width and r the bottleneck's, for any number of rows. They replace
    earlier ones in `layers.gram_matrices`; the rows are not needed again.

    The published fusion uses the forget set alone, and nothing constrains the fused layers on other inputs. With
    `retain`, they are fitted there too to the outputs of each request's own layers, which are close to the identity.

    Args:
        layers: trained layers of one request, attached and enabled.
        forget: its forget set, rows with `prompt` and `completion`.
        collator: for tokenizing and padding.
        batch_size: rows per forward.
        progress: whether to show a progress bar.
        retain: rows that every request must leave unchanged, without those of requests that may still come; a
            hundred are a start.
        retain_weight: the total weight of their tokens, relative to that of the forget rows' tokens; above 0.

    Raises:
        ValueError: if there are no rows, the layers are disabled or not attached, or `retain_weight` is out of range.
    """
    check_rows(forget, columns=(), name="forget")
    if not is_finite_number(retain_weight) or retain_weight <= 0 or (retain is not None and len(retain) == 0):
        raise ValueError(
            f"retain has {'no' if retain is None else len(retain)} rows, retain_weight={retain_weight!r}: expected at "
            "least one row, or None, and a finite number above 0."
        )
    if not layers.enabled:
        raise ValueError("the layers are disabled, so that nothing passes through them; set layers.enabled = True.")
    if not layers.attached:
        raise ValueError("the layers are not attached, so that nothing passes through them; call layers.attach().")
    decoder: Any = cast(Any, layers.get_base_model()).get_decoder()  # logits are not needed

    def gathered(rows: Dataset, name: str) -> tuple[dict[str, Tensor], int]:
        """The Gram matrices over all tokens of the rows, and the number of tokens."""
        grams: dict[str, Tensor] = {}
        num_tokens = 0
        encoded = [collator.encoder.encode(row) for row in read_rows(rows)]
        batches = list(by_length([len(one) for one in encoded], batch_size))
        for indices in tqdm(batches, name, disable=not progress, leave=False):
            batch = collator.encoder.pad(rows_at(rows, indices), [encoded[i] for i in indices])
            ids, mask = batch["input_ids"].to(layers.device), batch["attention_mask"].to(layers.device)
            num_tokens += int(mask.sum())
            with _recording(layers, mask.bool(), grams):
                decoder(input_ids=ids, attention_mask=mask, use_cache=False)
        return grams, num_tokens

    with evaluation_mode(layers):
        grams, num_tokens = gathered(forget, "Gram matrices")
        if unused := [name for name in layers.block_names if f"{name}.up" not in grams]:
            raise ValueError(
                f"nothing passed through {len(unused)} of {len(layers.block_names)} layers, such as {unused[0]!r}."
            )
        if retain is not None:
            others, num_others = gathered(retain, "Gram matrices, retain")
            weight = retain_weight * num_tokens / num_others
            grams = {name: gram + weight * others[name] for name, gram in grams.items()}
    layers.gram_matrices = grams


@contextmanager
def _recording(layers: UnlearningLayers, token_mask: Tensor, grams: dict[str, Tensor]) -> Iterator[None]:
    """Context manager: Gram matrices of the projections' inputs at the masked tokens are added to `grams`."""
    is_token = token_mask.flatten()

    def recorder(name: str) -> Any:
        def record(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
            # Some families flatten (B, n, d) before their feed-forward block.
            rows = inputs[0].detach().flatten(0, -2)[is_token.to(inputs[0].device)].double()
            rows = torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)  # the bias, as an input of one
            gram = rows.T @ rows
            grams[name] = gram if name not in grams else grams[name] + gram

        return record

    handles = [
        getattr(layer, projection).register_forward_pre_hook(recorder(f"{name}.{projection}"))
        for name, layer in zip(layers.block_names, layers.layers, strict=True)
        for projection in _projections(layers)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _projections(layers: UnlearningLayers) -> tuple[str, ...]:
    """The trained projections, which differ between requests."""
    return ("down", "up") if layers.layers_config.train_down else ("up",)


def fuse(
    layers: Sequence[UnlearningLayers | str | os.PathLike],
    model: PreTrainedModel | str | os.PathLike | None = None,
    ridge: float = 1e-6,
) -> UnlearningLayers:
    """Fuse the layers of several requests into one set, without training (EUL, arXiv 2310.20150).

    On each request's inputs, the fused layers approximate that request's own layers. With `W_i` the weights and bias
    of a projection of request i and `X_i` its inputs on forget set i, the fused projection is the solution of least
    squares over all requests:

        W = (sum_i X_i' X_i + rho I)^-1 (sum_i X_i' X_i W_i + rho mean_i W_i)

    The ridge `rho` pulls directions without inputs to the mean of the layers, so that fusing one set returns that set.
    Fused layers can be fused again; the mean is weighted by the number of requests.

    A bottleneck is not a linear map, so each projection is fused by itself. This is approximate, and needs hidden
    units with the same meaning in all layers, which a common initialization favors
    (`UnlearningLayersConfig.init_seed`). With `UnlearningLayersConfig(train_down=False)` the hidden units are
    identical, and the layers are linear in the trained weights.

    Args:
        layers: sets of layers, each after `gather_inputs`, or the folders that they were saved in. Detach them from
            the base first (`remove`).
        model: the base, or its name or folder; the base of the layers unless given.
        ridge: rho divided by the mean diagonal entry of `sum_i X_i' X_i`, at least 0.

    Returns:
        New layers, attached to the base, with the summed Gram matrices.

    Raises:
        ValueError: if `layers` is empty, configs differ, Gram matrices or `model` are missing, or a matrix is
            singular without a ridge.

    Example:
        ```python
        fused = fuse(["request-1", "request-2", "request-3"], model)
        without_second = fuse(["request-1", "request-3"], fused.remove())
        ```
    """
    if isinstance(layers, (str, os.PathLike, UnlearningLayers)):
        raise TypeError(f"layers is one {type(layers).__name__}; expected a list of layers or of their folders.")
    if not layers:
        raise ValueError("layers is empty; pass the layers of at least one request.")
    check_not_negative("ridge", ridge)
    if model is None:
        model = next((one.get_base_model() for one in layers if isinstance(one, UnlearningLayers)), None)
        if model is None:
            raise ValueError("layers are folders only; pass the model that they are for.")
    parts = [_saved(one) for one in layers]
    _check_fusable(parts)
    base = load_base(model, {})
    for i, part in enumerate(parts):
        files.check_base(base, part.spul_config, f"layers[{i}]")
    fused = files.SavedLayers(
        config=parts[0].config,
        state=_fused_state(parts, ridge),
        gram_matrices={
            name: torch.stack([part.gram_matrices[name] for part in parts]).sum(0) for name in parts[0].gram_matrices
        },
        num_requests=sum(part.num_requests for part in parts),
        spul_config=SpulConfig(
            loss=parts[0].spul_config.loss, combined_from=requests_of(part.spul_config for part in parts)
        ),
    )
    return UnlearningLayers.from_saved(base, fused).requires_grad_(False).eval()


def _check_fusable(parts: Sequence[files.SavedLayers]) -> None:
    """Raise unless sets of layers are of one shape and start, different, and have their Gram matrices."""
    configs = [UnlearningLayersConfig(**part.config) for part in parts]
    trained = parts[0].gram_matrices
    fixed = [name for name in parts[0].state if trained and name.rpartition(".")[0] not in trained]
    for i, part in enumerate(parts):
        if configs[i] != configs[0] or part.state.keys() != parts[0].state.keys():
            raise ValueError(
                f"layers[{i}] have the config {configs[i]}, and layers[0] {configs[0]}, on modules of "
                f"{'other names' if part.state.keys() != parts[0].state.keys() else 'the same names'}; only layers of "
                "one shape and start can be fused."
            )
        for j in range(i):
            if all(torch.equal(value, parts[j].state[name]) for name, value in part.state.items()):
                raise ValueError(f"layers[{j}] and layers[{i}] are the same; give each request once.")
        if other := [name for name in fixed if not torch.equal(part.state[name], parts[0].state[name])]:
            raise ValueError(
                f"layers[{i}] and layers[0] differ in {other[0]}, which is not trained (train_down=False)."
            )
        if not part.gram_matrices:
            raise ValueError(
                f"layers[{i}] have no Gram matrices; call gather_inputs(layers, forget, collator) after training, "
                "before they are saved."
            )


def _saved(layers: UnlearningLayers | str | os.PathLike) -> files.SavedLayers:
    """The content of layers, on the CPU also if they are in memory elsewhere."""
    if not isinstance(layers, UnlearningLayers):
        return files.read(layers)
    return files.SavedLayers(
        layers.layers_config.to_dict(),
        files.on_cpu(layers.layers_state()),
        files.on_cpu(layers.gram_matrices),
        layers.num_requests,
        layers.spul_config,
    )


def _fused_state(parts: Sequence[files.SavedLayers], ridge: float) -> dict[str, Tensor]:
    state = dict(parts[0].state)  # weights that are not trained are the same in all parts
    requests = torch.tensor([part.num_requests for part in parts], dtype=torch.float64)
    for name in parts[0].gram_matrices:
        grams = torch.stack([part.gram_matrices[name].double() for part in parts])
        maps = torch.stack([_matrix(part.state, name) for part in parts])
        total = grams.sum(0)
        rho = ridge * total.diagonal().mean()
        mean = torch.einsum("i,iab->ab", requests / requests.sum(), maps)
        left = total + rho * torch.eye(len(total), dtype=torch.float64)
        if ridge == 0 and torch.linalg.matrix_rank(left, hermitian=True) < len(left):
            raise ValueError(
                f"the inputs of {name} do not span its {len(left)} dimensions, so that the solution is not unique; "
                "pass a ridge above 0."
            )
        # Solved for the differences to the mean: weights that are the same in all layers stay bit-equal.
        solution = mean + torch.linalg.solve(left, (grams @ (maps - mean)).sum(0))
        dtype = parts[0].state[f"{name}.weight"].dtype
        state[f"{name}.weight"] = solution[:-1].T.to(dtype)
        state[f"{name}.bias"] = solution[-1].to(dtype)
    return state


def _matrix(state: dict[str, Tensor], name: str) -> Tensor:
    """A projection with its bias as one matrix (inputs + 1, outputs)."""
    weight, bias = (state[f"{name}.{kind}"].double() for kind in ("weight", "bias"))
    return torch.cat([weight.T, bias[None]])
