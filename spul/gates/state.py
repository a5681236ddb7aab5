"""The gate by hidden states: a linear probe of the frozen model itself, so that no second model is needed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.metrics import roc_auc_score
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..data.checks import checked_texts
from ..models.causal_lm import bare_model
from ..records.digests import digest_of_tokenizer, fingerprint
from ..records.fields import is_count
from .files import SavedGate
from .gate import Gate
from .probes import POOLINGS, Probe, fit_probes, probe_scores
from .states import HiddenStates
from .thresholds import GateReport, checked_fit_texts, folds, lowest_flagged, report_of, threshold_for
from .windows import highest_of, is_window_size, passages, window_size

# Layers that are tried where none are named, evenly spread.
LAYERS_TRIED = 8
# Log-odds by which the threshold is lowered: a text scores a little otherwise in another batch, by its padding, and
# texts that begin alike may score exactly the threshold.
SLACK = 1e-3


class StateGate(Gate):
    """A gate that flags texts whose hidden states in the frozen base resemble those of the forget texts.

    Made by `StateGate.fit`. The score is the log-odds of a logistic regression on the base's hidden states at one
    layer, adapters disabled: at the mean state of the text's tokens, at its last token, or the highest of all tokens;
    and the highest among the text and its windows. It costs a forward pass of the base. A text with more tokens than
    the base has positions cannot be scored, so it gets the prompt.

    Args:
        states: reader of the base's hidden states.
        layer: layer, 0 (embeddings) to the number of layers.
        pooling: `"mean"`, `"last"` or `"max"`.
        probe: one probe.
        threshold: the lowest score that is flagged.
        window: characters of a window.
    """

    kind = "states"

    def __init__(
        self, states: HiddenStates, layer: int, pooling: str, probe: Probe, threshold: float, window: int
    ) -> None:
        self.states, self.layer, self.pooling, self.probe = states, layer, pooling, probe
        self.threshold, self.window = threshold, window

    @classmethod
    def fit(
        cls,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        forget_texts: Sequence[str],
        retain_texts: Sequence[str],
        layers: Sequence[int] | None = None,
        recall: float = 0.99,
        seed: int = 0,
        paraphrases: Sequence[str] | None = None,
        batch_size: int = 32,
    ) -> StateGate:
        """Fit probes, choose layer and pooling on held-out texts, and set the threshold for a recall on them.

        Held-out scores are those of probes fit without the text's fold, as in `TextGate.fit`. Chosen are the layer and
        the pooling with the fewest false alarms at the recall asked for, then those with the largest AUC, then the
        first. The report is of the scores that they were chosen by, of up to 24 candidates, so it is a little
        optimistic: `measure` takes texts that nothing was chosen by.

        Args:
            model: the base, or any unlearner on it, whose adapter is then disabled.
            tokenizer: its tokenizer.
            forget_texts: texts that get the prompt, as requests are worded.
            retain_texts: texts that do not; some thousands are enough.
            layers: layers to try, 0 (embeddings) to the number of layers; None tries 8, evenly spread.
            recall: share of held-out forget texts to flag, above 0 and at most 1.
            seed: seed of the folds and of the tokens drawn.
            paraphrases: rewordings of forget texts, only reported on: the share that the gate flags.
            batch_size: texts per forward pass, at most.

        Raises:
            TypeError: if a text is no string, or model or tokenizer is none.
            ValueError: if a group has fewer than two different texts, a text to retain is in another, the recall is
                out of range or not reached without flagging everything, there is no such layer, a text is too long, or
                weights of the base are not in memory.

        Source: Alain and Bengio, *Understanding intermediate layers using linear classifier probes*,
        https://arxiv.org/abs/1610.01644
        """
        given = checked_fit_texts(forget_texts, retain_texts, paraphrases, recall)
        states = HiddenStates(model, tokenizer, batch_size)
        _fingerprint(model)  # refused before the work, not at saving
        tried = _checked_layers(layers, states.num_layers)
        fold, window = folds(given, seed), window_size(given.forget)
        probes = fit_probes(states, given.texts, given.is_forget, fold, tried, seed)
        held_out = _held_out(states, given.texts, fold, probes, window)

        def quality(choice: tuple[int, str]) -> tuple[float, float]:
            forget, retain = held_out[choice][given.is_forget], held_out[choice][~given.is_forget]
            false_alarms = float((retain >= lowest_flagged(forget, recall)).mean())
            return false_alarms, -float(roc_auc_score(given.is_forget, held_out[choice]))

        best = min(sorted(held_out), key=quality)
        scores = held_out[best]
        threshold = threshold_for(scores[given.is_forget], scores[~given.is_forget], recall) - SLACK
        layer, pooling = best
        whole = Probe(*(each[..., -1:] for each in probes[best]))
        gate = cls(states, layer, pooling, whole, threshold, window)
        flagged = scores >= threshold
        gate.report = report_of(
            flagged[given.is_forget],
            flagged[~given.is_forget],
            None if given.paraphrases is None else gate.flags(given.paraphrases),
            f"cross-validation, {fold.max() + 1} folds, which chose one of {len(held_out)} probes, too",
            recall,
        )
        return gate

    def scores(self, texts: Sequence[str]) -> np.ndarray:
        """Log-odds of each text, the highest among it and its windows: float64 (texts,).

        Padding changes them in the last digits of float32.

        Raises:
            TypeError: if a text is no string.
            ValueError: if a text has no token, or more than the base has positions.
        """
        pieces = [passages(text, self.window, by_character=True) for text in checked_texts(texts)]
        self.states.token_ids([each[0] for each in pieces])  # the longest first, before any is computed
        flat = [piece for each in pieces for piece in each]
        found = probe_scores(self.states, flat, {self.layer: self.probe})[self.layer, self.pooling]
        return highest_of(found[:, 0], pieces)

    def settings(self) -> dict[str, Any]:
        """Layer, pooling, window, and the digests of base and tokenizer."""
        return {
            "layer": self.layer,
            "pooling": self.pooling,
            "window": self.window,
            "hidden_size": len(self.probe.weights),
            "base_fingerprint": _fingerprint(self.states.model),
            "tokenizer_digest": digest_of_tokenizer(self.states.tokenizer),
        }

    def arrays(self) -> dict[str, np.ndarray]:
        """Weights and bias of the probe."""
        return {"weights": self.probe.weights, "bias": self.probe.bias}

    @classmethod
    def restored(cls, saved: SavedGate, report: GateReport | None, model: Any, tokenizer: Any) -> StateGate:
        """The gate of a saved folder, on the base and with the tokenizer that it was fit on.

        Raises:
            FileNotFoundError: if the arrays are missing.
            TypeError: if `model` is no model or `tokenizer` no tokenizer.
            ValueError: if one is missing or another than it was fit on, or a field or an array is damaged.
        """
        if model is None or tokenizer is None:
            missing = "model" if model is None else "tokenizer"
            raise ValueError(
                f"{saved.path} is a StateGate, which reads a model's hidden states, and {missing} is None; expected "
                "load(folder, model=..., tokenizer=...), the base or an unlearner on it."
            )
        states = HiddenStates(model, tokenizer)
        saved.check(
            {
                "base_fingerprint": (lambda value: isinstance(value, str), "the base's fingerprint"),
                "tokenizer_digest": (lambda value: isinstance(value, str), "the tokenizer's digest"),
                "layer": (
                    lambda value: is_count(value) and value <= states.num_layers,
                    f"a layer, 0 to {states.num_layers}",
                ),
                "pooling": (lambda value: value in POOLINGS, f"one of {', '.join(POOLINGS)}"),
                "window": (is_window_size, "a number of characters"),
                "hidden_size": (lambda value: is_count(value, least=1), "the width of the hidden states"),
            }
        )
        fields = saved.fields
        digests = {
            "base_fingerprint": (_fingerprint(model), "model"),
            "tokenizer_digest": (digest_of_tokenizer(tokenizer), "tokenizer"),
        }
        for name, (found, argument) in digests.items():
            if found != fields[name]:
                raise ValueError(
                    f"{saved.path} was fit on another {argument}: {name} is {fields[name]}, that of the {argument} "
                    f"given is {found}. Pass the one that it was fit on, or fit it anew."
                )
        arrays = saved.arrays({"weights": (fields["hidden_size"], 1), "bias": (1,)})
        probe = Probe(arrays["weights"], arrays["bias"])
        gate = cls(states, fields["layer"], fields["pooling"], probe, fields["threshold"], fields["window"])
        gate.report = report
        return gate

    def __repr__(self) -> str:
        return f"StateGate(layer={self.layer}, pooling={self.pooling!r}, threshold={self.threshold:.3g})"


def _fingerprint(model: nn.Module) -> str:
    found = fingerprint(bare_model(model))
    if found is None:
        raise ValueError(
            "some weights of the base are not in memory (meta device, disk offload), so that a gate could not tell it "
            "from another one; load the whole base."
        )
    return found


def _checked_layers(layers: Sequence[int] | None, num_layers: int) -> list[int]:
    if layers is None:
        return sorted(set(np.linspace(1, num_layers, min(num_layers, LAYERS_TRIED)).round().astype(int).tolist()))
    wanted = list(layers) if not isinstance(layers, (int, str)) else [layers]
    if not wanted or any(not is_count(layer) or layer > num_layers for layer in wanted):
        raise ValueError(
            f"layers={layers!r}; expected a list of layers, 0 (embeddings) to {num_layers}, or None for "
            f"{LAYERS_TRIED} of them."
        )
    return sorted(set(wanted))


def _held_out(
    states: HiddenStates, texts: list[str], fold: np.ndarray, probes: dict[tuple[int, str], Probe], window: int
) -> dict[tuple[int, str], np.ndarray]:
    """By layer and pooling, the score of each text by the probe that was fit without it."""
    pieces = [passages(text, window, by_character=True) for text in texts]
    flat = [piece for each in pieces for piece in each]
    column = np.repeat(fold, [len(each) for each in pieces])
    layers = sorted({layer for layer, _ in probes})
    # All poolings of a layer in one product; each pooling's scores are those by its own probes.
    joined = {
        layer: Probe(*(np.concatenate([probes[layer, p][i] for p in POOLINGS], axis=-1) for i in range(2)))
        for layer in layers
    }
    scores = probe_scores(states, flat, joined)
    num = fold.max() + 2
    return {
        (layer, pooling): highest_of(scores[layer, pooling][np.arange(len(flat)), i * num + column], pieces)
        for layer in layers
        for i, pooling in enumerate(POOLINGS)
    }
