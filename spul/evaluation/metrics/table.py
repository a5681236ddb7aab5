"""The table of metrics: name, wording, unit, bounds and direction of each, in one place."""

from __future__ import annotations

import math
from dataclasses import dataclass

NONNEGATIVE, SHARE = (0.0, math.inf), (0.0, 1.0)


@dataclass(frozen=True)
class Metric:
    """A metric that an evaluation reports.

    Attributes:
        name: its key in measurements and metric values.
        wording: its name in the report; the key with spaces unless given.
        unit: `"%"` for shares, which are stored as fractions and shown times 100; `"nats"`, ...; empty for none.
        bounds: the smallest and the largest value; a confidence interval is cut there.
        on_forget: the better direction on forget rows: `"low"`, `"high"`, `"0"`, `"as retrained"`, or `""` for none.
        on_retain: the same on all other rows.
        counts_rows: whether it is a share of the rows, so that the share and the number of rows have an interval.
        on_card: whether it stands on the model card.
        is_count: whether it is a whole number.
    """

    name: str
    wording: str = ""
    unit: str = ""
    bounds: tuple[float, float] = (-math.inf, math.inf)
    on_forget: str = ""
    on_retain: str = ""
    counts_rows: bool = False
    on_card: bool = False
    is_count: bool = False

    @property
    def label(self) -> str:
        """The name in the report."""
        return self.wording or self.name.replace("_", " ")

    @property
    def axis_label(self) -> str:
        """The name with its unit."""
        return f"{self.label}, {self.unit}" if self.unit else self.label

    @property
    def scale(self) -> int:
        """The factor from a stored to a shown value."""
        return 100 if self.unit == "%" else 1

    def digits(self, value: float) -> str:
        """A value as shown, without its unit."""
        if self.is_count and math.isfinite(value):
            return f"{value:,.0f}"
        if self.unit == "%":
            return f"{100 * value:.1f}"
        return f"{value:.3g}" if not abs(value) >= 100 else f"{value:,.1f}"


def _knowledge(name: str, wording: str = "", unit: str = "", **flags: bool) -> Metric:
    """A metric of knowledge, in 0..1."""
    return Metric(name, wording, unit, SHARE, on_forget="low", on_retain="high", **flags)


METRICS = {
    metric.name: metric
    for metric in (
        # Answers
        _knowledge("accuracy", unit="%", counts_rows=True, on_card=True),
        _knowledge("f1", "F1", "%", on_card=True),
        Metric("generic", "generic answers", "%", SHARE, "high", "low", counts_rows=True, on_card=True),
        Metric("loss", "", "nats", NONNEGATIVE, "", "low"),
        _knowledge("probability", on_card=True),
        _knowledge("choice_probability", "probability among the choices"),
        _knowledge("rouge_l_recall", "ROUGE-L recall"),
        _knowledge("rouge_l_f1", "ROUGE-L F1"),
        _knowledge("extraction_strength", unit="%"),
        _knowledge("exact_memorization", unit="%"),
        # Distance from the base, running text
        Metric("reverse_kl", "reverse KL", "nats", NONNEGATIVE, "low", "low"),
        Metric("forward_kl", "forward KL", "nats", NONNEGATIVE, "low", "low"),
        Metric("perplexity", "", "", NONNEGATIVE, "low", "low"),
        Metric("tokens", "tokens, mean of a row"),
        # TOFU's questions
        Metric("truth_ratio"),
        Metric("truth_ratio_geometric", "truth ratio, geometric mean"),
        Metric("truth_ratio_on_forget", "", "", SHARE, "high", "high"),
        Metric("truth_ratio_on_retain", "", "", SHARE, "high", "high"),
        Metric("model_utility", "", "", SHARE, "high", "high"),
        Metric("forget_quality", "", "", SHARE, "high", "high"),
        Metric("forget_quality_geometric", "forget quality, geometric mean", "", SHARE, "high", "high"),
        # Membership inference
        Metric("auc", "AUC", "", SHARE, "as retrained", "as retrained"),
        Metric(
            "true_positive_rate", "true positives at 1 % false positives", "%", SHARE, "as retrained", "as retrained"
        ),
        Metric(
            *("reversed_true_positive_rate", "true positives at 1 % false positives, by low scores", "%", SHARE),
            *("as retrained", "as retrained"),
        ),
        Metric("auc_difference", "AUC, less the retrained model's", "", (-1.0, 1.0), "0", "0"),
        Metric("priv_leak", "PrivLeak, in %", "", on_forget="0", on_retain="0"),
        # Attacks
        Metric("tokens_lost", "tokens lost, mean of a row"),
        Metric("changed", "rows that the attack changes", "%", SHARE, counts_rows=True),
        Metric("trained_parameters", is_count=True),
        _knowledge("success", unit="%"),
        Metric("flagged", "flagged by the gate", "%", SHARE, "high", "low", counts_rows=True),
        Metric("past_gate", "right, past the gate", "%", SHARE, "low", counts_rows=True),
        Metric("past_prompt", "right, though flagged", "%", SHARE, "low", counts_rows=True),
        Metric("majority", "accuracy of the most frequent class", "%", SHARE),
        Metric("shuffled", "accuracy on shuffled labels", "%", SHARE),
    )
}


def metric_of(name: str) -> Metric:
    """The metric of a name; one without unit, bounds and direction if the table has none of that name."""
    return METRICS.get(name, Metric(name))
