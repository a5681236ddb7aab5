"""Draws of rows: from what transformers' own warpers keep, each row's by its own settings alone."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from spul.serving.requests import Sampling
from spul.serving.sampling import RowChooser, draw


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 0.9), (1.5, 0.3), (1.0, 1e-6)])
def test_draws_follow_the_distribution_of_transformers(temperature, top_p):
    scores = torch.randn(12, generator=torch.Generator().manual_seed(0)) * 2
    warped = TemperatureLogitsWarper(temperature)(None, scores[None])
    warped = TopPLogitsWarper(top_p)(None, warped) if top_p < 1 else warped
    expected = warped[0].softmax(dim=0)
    generator, num = torch.Generator().manual_seed(1), 4000
    counts = Counter(draw(scores, Sampling(temperature, top_p), generator) for _ in range(num))
    assert set(counts) <= set(expected.nonzero().flatten().tolist())
    found = torch.tensor([counts[i] / num for i in range(12)])
    torch.testing.assert_close(found, expected, atol=0.03, rtol=0)


@pytest.mark.parametrize("temperature", [0.0, 1e-300, 1e-6, 1e-5])
def test_the_smallest_temperatures_are_greedy(temperature):
    scores = torch.tensor([[1.0, 3.0, -torch.inf, 2.0]])
    assert RowChooser([Sampling(temperature)])(None, scores).argmax() == 1


def test_a_row_draws_the_same_beside_any_others():
    one, greedy = Sampling(seed=4), Sampling(temperature=0)
    scores = torch.randn(6, 3, 20, generator=torch.Generator().manual_seed(0))

    def drawn(samplings, row):
        chooser = RowChooser(samplings)
        return [int(chooser(None, step[: len(samplings)])[row].argmax()) for step in scores.roll(row, dims=1)]

    assert drawn([one], 0) == drawn([greedy, one, Sampling()], 1) == drawn([Sampling(seed=9), Sampling(), one], 2)
    assert drawn([one], 0) != drawn([Sampling(seed=5)], 0)


def test_rows_that_are_greedy_are_left_as_they_are():
    scores = torch.randn(2, 5)
    before = scores.clone()
    found = RowChooser([Sampling(temperature=0), Sampling(seed=1)])(None, scores)
    assert torch.equal(found[0], before[0])
    assert found[1].isfinite().sum() == 1
    assert torch.equal(scores, before)
