"""Verdicts on a base: earned by a comparison, and held until a hook or setting of the base changes."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..models.causal_lm import autocast_dtype, evaluation_mode
from ..models.compat import is_quantized
from ..models.compat_checkpointing import switching
from ..models.compat_devices import device_of
from ..models.compat_modules import settings_of
from ..models.sharding import check_gathered

logger = logging.getLogger(__name__)

MOST_PROBES = 100  # of a kind: a base that keeps changing would be probed at every call
# What a family raises that takes no cache, no embeddings, or keys of another shape.
ERRORS = (RuntimeError, AttributeError, ValueError, TypeError, IndexError, KeyError)
# Settings, verdict and number of probes, by base and kind.
_verdicts: weakref.WeakKeyDictionary[nn.Module, dict[tuple, tuple[Any, bool, int]]] = weakref.WeakKeyDictionary()


@torch.compiler.disable
def earned(
    base: Any, kind: tuple, compare: Callable[[], bool], otherwise: str = "", in_evaluation: bool = True
) -> bool:
    """The verdict on a base, by the comparison the first time.

    No other thread changes the base's mode meanwhile, or asks: it would find the base changed, or a verdict on
    something else.

    Args:
        base: the base.
        kind: what is compared.
        compare: the comparison, which runs without gradients; a base that raises in it has lost.
        otherwise: logged if it is lost.
        in_evaluation: whether the comparison runs in evaluation mode.
    """
    embeddings = base.get_input_embeddings()
    device_type = device_of(embeddings).type
    key = (*kind, embeddings.weight.dtype, device_type, autocast_dtype(device_type))
    with switching:
        verdicts = _verdicts.setdefault(base, {})
        before, verdict, num_probes = verdicts.get(key, (None, True, 0))
        if num_probes == MOST_PROBES:
            return verdict
        settings = settings_of(base)
        if before == settings:
            return verdict
        check_gathered(base)
        was_told = not verdict
        try:
            with torch.no_grad(), evaluation_mode(base) if in_evaluation else nullcontext():
                verdict = compare()
        except torch.OutOfMemoryError:
            raise
        except ERRORS as error:
            verdict = False
            otherwise = otherwise and f"{otherwise} It raised {type(error).__name__}: {error}"
        if not verdict and otherwise and not was_told:
            logger.warning(otherwise)
        verdicts[key] = settings, verdict, num_probes + 1
        if num_probes + 1 == MOST_PROBES:
            logger.warning(
                "Settings or hooks of %s changed before %d calls; whether it may share a prompt is not asked again, "
                "and the last verdict stands.",
                type(base).__name__,
                MOST_PROBES,
            )
        return verdict


def close(base: Any, found: Tensor, expected: Tensor, without: Tensor) -> bool:
    """Whether logits differ by rounding, which is little beside the difference that a lost prompt would make."""
    eps = max(torch.finfo(dtype).eps for dtype in _dtypes(base, found))
    found, expected, without = (t.double() for t in (found, expected, without))
    error, effect = ((t - expected).square().mean().sqrt() for t in (found, without))
    return bool(error <= eps**0.5 * effect + 8 * eps * expected.abs().max())


def _dtypes(base: Any, logits: Tensor) -> set[torch.dtype]:
    """The floating types that the base may compute in."""
    dtypes = {logits.dtype} | {p.dtype for p in base.parameters() if p.is_floating_point()}
    if (autocast := autocast_dtype(logits.device.type)) is not None:
        dtypes.add(autocast)
    if is_quantized(base) or (logits.is_cuda and torch.backends.cuda.matmul.allow_tf32):
        dtypes.add(torch.bfloat16)
    return dtypes
