"""Published results, for comparison."""

from __future__ import annotations

from dataclasses import dataclass

SPUL_PAPER = "arXiv 2406.12038"


@dataclass(frozen=True)
class PublishedRow:
    """One row of a published table.

    Args:
        source: where it was published.
        dataset: name of the data set, as in the runs: sst2, yelp, wmdp.
        model: name of the model, as published.
        method: name of the method, as in the runs.
        accuracy: in %: train retain, train forget, test retain, test forget.
    """

    source: str
    dataset: str
    model: str
    method: str
    accuracy: tuple[float, float, float, float]


PUBLISHED = (
    PublishedRow(SPUL_PAPER, "sst2", "LLaMA-2-7B", "base", (99.89, 99.72, 95.57, 96.07)),
    PublishedRow(SPUL_PAPER, "sst2", "LLaMA-2-7B", "GA", (55.66, 53.93, 55.96, 56.89)),
    PublishedRow(SPUL_PAPER, "sst2", "LLaMA-2-7B", "RL", (33.31, 13.82, 31.00, 14.26)),
    PublishedRow(SPUL_PAPER, "sst2", "LLaMA-2-7B", "GA+KL", (55.64, 53.96, 55.94, 56.89)),
    PublishedRow(SPUL_PAPER, "sst2", "LLaMA-2-7B", "GA+GD", (97.17, 13.75, 94.43, 11.31)),
    PublishedRow(SPUL_PAPER, "sst2", "LLaMA-2-7B", "SPUL", (99.15, 12.98, 94.93, 16.07)),
    PublishedRow(SPUL_PAPER, "sst2", "OPT-1.3B", "SPUL", (94.87, 16.84, 91.65, 17.87)),
    PublishedRow(SPUL_PAPER, "sst2", "LLaMA-2-13B", "SPUL", (98.87, 5.97, 95.50, 7.38)),
    PublishedRow(SPUL_PAPER, "yelp", "LLaMA-2-7B", "base", (99.31, 99.49, 98.42, 98.76)),
    PublishedRow(SPUL_PAPER, "yelp", "LLaMA-2-7B", "GA+GD", (99.23, 79.69, 97.76, 80.90)),
    PublishedRow(SPUL_PAPER, "yelp", "LLaMA-2-7B", "SPUL", (89.74, 55.03, 89.63, 60.23)),
    PublishedRow(SPUL_PAPER, "wmdp", "LLaMA-2-7B", "base", (99.74, 98.11, 91.80, 62.73)),
    PublishedRow(SPUL_PAPER, "wmdp", "LLaMA-2-7B", "GA+GD", (99.42, 27.22, 90.00, 22.25)),
    PublishedRow(SPUL_PAPER, "wmdp", "LLaMA-2-7B", "SPUL", (99.38, 5.44, 89.70, 3.22)),
)


def published_rows(dataset: str, model: str | None = None) -> list[PublishedRow]:
    """The published rows of a data set; an empty list if there are none.

    Args:
        dataset: sst2, yelp or wmdp (WMDP-bio to be forgotten, SciQ retained).
        model: only the rows of this model, such as `LLaMA-2-7B`; all models unless given.
    """
    return [row for row in PUBLISHED if row.dataset == dataset and model in (None, row.model)]
