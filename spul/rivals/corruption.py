"""ECO: a gate and corrupted embeddings, so that the base answers flagged requests as if it did not know them."""

from __future__ import annotations

import bisect
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.characters import whole_words
from ..data.checks import checked_names
from ..gates.files import is_texts
from ..gates.gate import Gate
from ..models.causal_lm import logits_at
from ..records.fields import Checks, is_count, is_finite_number
from .files import GATE_CHECK
from .gated import GatedRival

KINDS = ("noise", "zero", "flip")


@dataclass(frozen=True)
class Corruption:
    """A change of token embeddings e of width d.

    | kind | change |
    |---|---|
    | `"noise"` | `e_1..e_dims + strength * N(0, 1)`: the first dimensions |
    | `"zero"` | the `dims` entries that are largest in absolute value are 0 |
    | `"flip"` | the `dims` entries that are largest in absolute value change their sign |

    Args:
        kind: the change.
        strength: standard deviation of the noise, in units of the embeddings; the other kinds have none.
        dims: number of entries of each embedding, at most d. One for noise, as in most of the published settings.

    Raises:
        ValueError: for another kind, a strength that is no finite number above 0, and `dims` below 1.
    """

    kind: Literal["noise", "zero", "flip"] = "noise"
    strength: float = 1.0
    dims: int = 1

    def __post_init__(self) -> None:
        is_strength = is_finite_number(self.strength) and self.strength > 0
        if self.kind not in KINDS or not is_strength or not is_count(self.dims, least=1):
            raise ValueError(f"{self!r}; expected a kind of {KINDS}, a finite strength above 0, and dims from 1 on.")

    def of(self, embeddings: Tensor, seed: Sequence[int]) -> Tensor:
        """Corrupted embeddings.

        Args:
            embeddings: (n, d).
            seed: whole numbers of 0 or more that determine the noise.

        Raises:
            ValueError: if embeddings have fewer entries than `dims`, or noise is beyond the range of their type.
        """
        if self.dims > embeddings.shape[1]:
            raise ValueError(f"dims={self.dims}, and embeddings have {embeddings.shape[1]} entries; lower dims.")
        if self.kind == "noise":
            noise = np.random.default_rng(list(seed)).standard_normal((len(embeddings), self.dims))
            changed = embeddings.clone()
            changed[:, : self.dims] += (self.strength * torch.from_numpy(noise)).to(embeddings)
            if not bool(changed.isfinite().all()):
                raise ValueError(f"strength={self.strength} is beyond the range of {embeddings.dtype}; lower it.")
            return changed
        largest = embeddings.abs().topk(self.dims, dim=1).indices
        values = embeddings.gather(1, largest)
        return embeddings.scatter(1, largest, -values if self.kind == "flip" else torch.zeros_like(values))


def _is_corruption(value: Any) -> bool:
    if not isinstance(value, dict) or set(value) != {"kind", "strength", "dims"}:
        return False
    try:
        Corruption(**value)
    except ValueError:
        return False
    return True


@dataclass
class _Plan:
    """Changes of the next pass through the embedding: for each flagged row its columns and its noise's seed."""

    width: int
    columns: dict[int, list[int]]
    seeds: dict[int, list[int]]
    batch_size: int
    done: bool = False


_plan: ContextVar[_Plan | None] = ContextVar("spul_corruption", default=None)


class EmbeddingCorruption(GatedRival):
    """A gate, and corrupted token embeddings for the requests that it flags (ECO).

    For a flagged request x the base reads `corrupt(E(x_i))` in place of `E(x_i)` at the chosen tokens: all but the
    last, or those of given names, where the request holds one. Only the request is corrupted, never the answer so far
    (the authors' program also corrupts the answer where it scores one). A request on which the gate fails is
    corrupted, too. Noise is determined by `seed` and the request's tokens, so that its answer depends on no other row,
    and scoring and generation see the same noise; the authors draw it anew.

    The strength is chosen on training rows by `search_strength` or `search_corruption`.

    Args:
        model: a causal LM of transformers, without an adapter.
        tokenizer: its tokenizer, by which requests are read.
        gate: a gate of `spul.gates`, or a function from a list of texts to a bool for each. The authors fine-tune
            RoBERTa, with thresholds from 0.99 to 0.9999.
        corruption: the change of embeddings.
        names: corrupt the tokens of these names alone, as whole words in any letter case; all but the last token of a
            request that holds none. The authors find names by a recognizer on TOFU, and take all tokens elsewhere.
        seed: of the noise.

    Raises:
        TypeError: if `model` or `gate` is of another type.
        ValueError: if `names` is empty, or `seed` is negative.

    Source: Liu et al., *Large Language Model Unlearning via Embedding-Corrupted Prompts*,
    https://arxiv.org/abs/2406.07933; chosen tokens as in its program, https://github.com/chrisliu298/llm-unlearn-eco
    """

    kind = "embedding corruption"
    in_words = "the gate and its corruption"
    fields_saved: ClassVar[Checks] = {
        **GATE_CHECK,
        "corruption": (_is_corruption, f"an object of kind (one of {KINDS}), strength above 0 and dims from 1 on"),
        "names": (lambda value: value is None or is_texts(value), "different names, or null"),
        "seed": (is_count, "a whole number of 0 or more"),
    }

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        gate: Gate | Callable[[list[str]], Any],
        corruption: Corruption,
        names: Sequence[str] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(model, tokenizer, gate)
        if not isinstance(corruption, Corruption):
            raise TypeError(f"corruption is a {type(corruption).__name__}; expected a Corruption.")
        if seed < 0:
            raise ValueError(f"seed={seed}; expected 0 or more.")
        self.corruption, self.seed = corruption, seed
        self.names = None if names is None else checked_names("names", names)
        self._pattern = None if self.names is None else re.compile(whole_words(self.names), re.IGNORECASE)

    def chosen(self, request: list[int]) -> list[int]:
        """Indices of the tokens of a flagged request that are corrupted."""
        if self._pattern is not None and (found := self._tokens_of_names(request, self._pattern)):
            return found
        return list(range(max(len(request) - 1, 1)))  # a request of one token has no other

    def _tokens_of_names(self, request: list[int], pattern: re.Pattern[str]) -> list[int]:
        def length(num: int) -> int:
            return len(str(self.tokenizer.decode(request[:num], clean_up_tokenization_spaces=False)))

        text = str(self.tokenizer.decode(request, clean_up_tokenization_spaces=False))
        nums = range(len(request) + 1)
        found: set[int] = set()
        for match in pattern.finditer(text):
            first = bisect.bisect_right(nums, match.start(), key=length) - 1  # tokens that end before the name
            last = bisect.bisect_left(nums, match.end(), key=length)
            found.update(range(first, last))
        return sorted(found)

    def changed_logits(self, rows: Sequence[list[int]], ends: Sequence[int], positions: Tensor) -> Tensor:
        """The base's logits behind corrupted requests."""
        inputs = self.padded(rows)
        requests = [row[:end] for row, end in zip(rows, ends, strict=True)]
        with self._corrupted(requests, [0] * len(rows), inputs["input_ids"].shape[1]):
            return logits_at(self.base_model, positions, **inputs, use_cache=False)

    def changed_answers(self, requests: Sequence[list[int]], **settings: Any) -> Tensor:
        """The base's answers to corrupted requests."""
        width = max(map(len, requests))
        with self._corrupted(requests, [width - len(request) for request in requests], width):
            return self.base_answers(requests, **settings)

    @contextmanager
    def _corrupted(self, requests: Sequence[list[int]], starts: Sequence[int], width: int) -> Iterator[None]:
        """Context manager: the next pass through the base's embedding, in this thread, is that of these requests."""
        flagged = [i for i, is_flagged in enumerate(self.flags(requests)) if is_flagged]
        columns = {i: [starts[i] + k for k in self.chosen(requests[i])] for i in flagged}
        plan = _Plan(width, columns, {i: [self.seed, *requests[i]] for i in flagged}, len(requests))

        def hook(module: nn.Module, args: tuple, embeddings: Tensor) -> Tensor | None:
            # Of other threads, which share the base, and of later steps of generation nothing is changed.
            if _plan.get() is not plan:
                return None
            if plan.done and embeddings.shape[1] > plan.width:
                raise ValueError(
                    f"{type(self.base_model).__name__} reads the request again at every step; a corrupted one is read "
                    "once, from a key/value cache: leave out use_cache=False, or take a model that has a cache."
                )
            return None if plan.done else self._changed(plan, embeddings)

        handle = cast(Any, self.base_model).get_input_embeddings().register_forward_hook(hook)
        token = _plan.set(plan)
        try:
            yield
        finally:
            _plan.reset(token)
            handle.remove()
        if not plan.done:
            raise ValueError(
                f"{type(self.base_model).__name__} did not use the embedding of get_input_embeddings(), so that "
                "nothing was corrupted."
            )

    def _changed(self, plan: _Plan, embeddings: Tensor) -> Tensor:
        times, rest = divmod(embeddings.shape[0], plan.batch_size)  # beams and samples of a request follow each other
        if rest or embeddings.shape[1] != plan.width:
            raise ValueError(
                f"embeddings of the shape {tuple(embeddings.shape)} were computed for {plan.batch_size} requests of "
                f"{plan.width} tokens; expected them in one pass."
            )
        plan.done = True
        changed = embeddings.clone()
        for i, columns in plan.columns.items():
            for row in range(i * times, (i + 1) * times):
                changed[row, columns] = self.corruption.of(embeddings[row, columns], plan.seeds[i])
        return changed

    def saved_fields(self) -> dict[str, Any]:
        """Change of embeddings, names and seed."""
        corruption = {"kind": self.corruption.kind, "strength": self.corruption.strength, "dims": self.corruption.dims}
        return {"corruption": corruption, "names": self.names, "seed": self.seed}

    @classmethod
    def restored(
        cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, fields: dict[str, Any], gate: Any
    ) -> EmbeddingCorruption:
        """Change of embeddings, names and seed of saved fields."""
        return cls(model, tokenizer, gate, Corruption(**fields["corruption"]), fields["names"], fields["seed"])
