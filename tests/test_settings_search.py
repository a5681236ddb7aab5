"""The search finds the front and the point within the bound, and trains no combination twice."""

import itertools

import pytest

from spul import UnlearningLoss
from spul.evaluation.metrics.scoring import DivergedError
from spul.training.settings_search import Candidate, search

pytest.importorskip("optuna")

ALPHAS, BETAS, LENGTHS = (0.1, 0.5, 1.0), (0.0, 0.5), (10, 30)


def score(candidate):
    """More alpha keeps more and forgets less; a longer prompt forgets more; beta costs and gives nothing."""
    retain = 0.7 + 0.25 * candidate.alpha - 0.05 * candidate.beta
    forget = 0.3 + 0.4 * candidate.alpha - 0.01 * candidate.num_virtual_tokens + 0.1 * candidate.beta
    return retain, max(0.0, forget)


class Counting:
    def __init__(self, scores=score):
        self.seen, self.scores = [], scores

    def __call__(self, candidate):
        self.seen.append(candidate)
        return self.scores(candidate)


def run(scores=score, trials=50, bound=0.8, **kwargs):
    space = {"alphas": ALPHAS, "betas": BETAS, "num_virtual_tokens": LENGTHS}
    return search(scores, bound, trials, progress=False, **{**space, **kwargs})


def test_all_combinations_are_tried_once_where_there_are_trials_enough():
    counting = Counting()
    found = run(counting)
    everything = {Candidate(*values) for values in itertools.product(ALPHAS, BETAS, LENGTHS)}
    assert len(counting.seen) == len(set(counting.seen)) == len(everything)
    assert {trial.candidate for trial in found.trials} == everything


def test_front_and_best_are_those_of_a_plain_look_at_all():
    found = run()
    trials = found.trials

    def beaten(one):
        return any(
            o.retain >= one.retain and o.forget <= one.forget and (o.retain, o.forget) != (one.retain, one.forget)
            for o in trials
        )

    assert set(found.front) == {trial for trial in trials if not beaten(trial)}
    assert [t.retain for t in found.front] == sorted((t.retain for t in found.front), reverse=True)
    assert found.best == min((t for t in trials if t.retain >= 0.8), key=lambda t: t.forget)
    assert found.best.candidate == Candidate(0.5, 0.0, 30)


@pytest.mark.parametrize("error", [DivergedError, FloatingPointError])
def test_a_candidate_whose_model_diverges_is_the_worst_and_ends_no_search(tmp_path, error):
    def scores(candidate):
        if candidate.alpha == 1.0:
            raise error("NaN")
        return score(candidate)

    found = run(scores, storage=tmp_path / "search.journal")
    assert {(t.retain, t.forget) for t in found.trials if t.candidate.alpha == 1.0} == {(0.0, 1.0)}
    assert len(found.trials) == 12
    assert found.best.candidate == Candidate(0.5, 0.0, 30)
    assert run(scores, storage=tmp_path / "search.journal").trials == found.trials
    with pytest.raises(ValueError, match="no rows"):
        run(lambda candidate: (_ for _ in ()).throw(ValueError("no rows")))


def test_no_point_within_the_bound_is_none():
    assert run(bound=0.99).best is None


def test_no_more_trials_than_asked():
    counting = Counting()
    assert len(run(counting, trials=5).trials) == len(counting.seen) == 5


def test_a_search_goes_on_from_its_journal(tmp_path):
    first, second = Counting(), Counting()
    run(first, trials=4, storage=tmp_path / "journal")
    found = run(second, trials=7, storage=tmp_path / "journal")
    assert (len(first.seen), len(second.seen), len(found.trials)) == (4, 3, 7)
    assert not set(first.seen) & set(second.seen)


def test_a_journal_of_other_values_is_refused(tmp_path):
    run(trials=2, storage=tmp_path / "journal")
    with pytest.raises(ValueError, match=r"holds a search over .* use another"):
        run(trials=3, storage=tmp_path / "journal", betas=(0.0, 1.0))


def test_a_trial_that_fails_is_not_lost_silently(tmp_path):
    def fails(candidate):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        run(fails, storage=tmp_path / "journal")
    assert len(run(trials=3, storage=tmp_path / "journal").trials) == 3


def test_a_candidate_has_the_loss_of_its_weights():
    assert Candidate(0.1, 0.5, 20).loss() == UnlearningLoss(alpha=0.1, beta=0.5)


def test_bad_input_says_what_was_expected():
    with pytest.raises(ValueError, match="nothing to choose from for beta"):
        run(betas=())
    with pytest.raises(ValueError, match=r"alpha=-1\.0: expected a finite number"):
        run(alphas=(-1.0,))
    for lengths in ((10, 0), (2.5,), (-3,)):
        with pytest.raises(ValueError, match="expected whole numbers from 1"):
            run(num_virtual_tokens=lengths)
    with pytest.raises(ValueError, match=r"min_retain=90, num_trials=50; expected an accuracy in 0\.\.1"):
        run(bound=90)
    with pytest.raises(ValueError, match=r"expected two accuracies in 0\.\.1"):
        run(lambda candidate: (90.0, 10.0))
