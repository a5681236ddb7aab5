"""The table of measures and attacks: what each requires, its tasks, and its words in the report."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from ..data.conversations import comparable
from ..data.rows import column_values
from ..data.unlearning_data import SPLITS
from ..models.unlearner import unlearner_of
from . import attack_tasks, tasks
from .aggregation import MEMBERS, MEMBERSHIP, Key, Measurement, MetricValue, in_words
from .attacks.inputs import WITHOUT
from .attacks.usual import TURN_UNIT
from .suite import Suite, Task


def _nothing(suite: Suite) -> str:
    return ""


@dataclass(frozen=True)
class Measure:
    """A measure or attack of an evaluation.

    Attributes:
        name: its name in `measures=`, measurements and metric values.
        title: its heading in the report.
        explanation: what the table in the report shows.
        tasks: from a suite to its tasks.
        why_skipped: from a suite to the reason why the measure is skipped as a whole; empty if it is not.
        figure: the name of its figure; empty without one.
        unit: the unit of `Measurement.level`, singular and plural.
        generates: whether it compares generated texts with the true ones, which requires `rouge-score`: `"always"`,
            `"free-form"` (of free-form answers only) or `"never"`.
        by_row: whether it runs rows under prompts of their own; else it is skipped where rows name them.
        rows: the sets of rows that it has metrics of; empty where the caller names them.
        metrics: the metrics that it may have.
    """

    name: str
    title: str
    explanation: str
    tasks: Callable[[Suite], Iterable[Task]]
    why_skipped: Callable[[Suite], str] = _nothing
    figure: str = ""
    unit: tuple[str, str] = ("", "")
    generates: Literal["always", "free-form", "never"] = "never"
    by_row: bool = True
    rows: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ()


def _requires(field: str, what: str) -> Callable[[Suite], str]:
    """Skipped unless a field of the suite is given."""
    return lambda suite: "" if getattr(suite, field) else f"give {field}=, {what}"


def _requires_likelihoods(suite: Suite) -> str:
    if any(model is not None and unlearner_of(model).answers_fixed for model in (suite.model, suite.retrained)):
        return "a fixed text has no likelihoods to compare"
    return ""


def _requires_base(suite: Suite) -> str:
    if why := _requires_likelihoods(suite):
        return why
    if "detached" in suite.models:
        return ""
    return "it compares with the model before unlearning, which is missing; give base="


def _requires_unseen(suite: Suite) -> str:
    if why := _requires_likelihoods(suite):
        return why
    members, unseen = suite.splits["train_forget"], tasks.unseen_rows(suite)
    # Free-form answers are facts: the same fact in other words is not unseen.
    name = "test_forget" if suite.unseen is None else "unseen"
    for column in ("prompt", *(["completion"] if suite.is_free_form else [])):
        seen = set(map(comparable, column_values(members, column)))
        if num := sum(comparable(value) in seen for value in column_values(unseen, column)):
            return (
                f"{num} of {len(unseen)} rows of {name} have the {column} of a row of train_forget; give unseen= "
                "without any of them"
            )
    return ""


def _requires_halves(suite: Suite) -> str:
    few, _ = suite.halves()
    return "" if len(few) else "one half of train_forget attacks the other, and there is one prompt only"


def _requires_questions(suite: Suite) -> str:
    return _requires("questions", "TOFU's perturbed files")(suite) or _requires_likelihoods(suite)


def _requires_trained(suite: Suite) -> str:
    if not unlearner_of(suite.model).is_trained:
        return "the model was unlearned without training, so there is nothing to train further"
    if not suite.is_in_place and (suite.retrained is not None or not unlearner_of(suite.model).has_adapter):
        return (
            "it trains all weights of a model, and some are sharded or offloaded; leave out retrained=, or load whole "
            "models"
        )
    return _requires_halves(suite)


def _requires_whole(suite: Suite) -> str:
    if suite.is_in_place:
        return ""
    return "a sharded or offloaded base is not quantized; evaluate with the whole model in each process"


def _requires_embeddings(suite: Suite) -> str:
    if any(model is not None and unlearner_of(model).reads_tokens for model in (suite.model, suite.retrained)):
        return "the model reads text, and trained vectors are none"
    return _requires_halves(suite)


def _requires_classes(suite: Suite) -> str:
    few, _ = suite.halves()
    if not suite.is_free_form and len(set(map(str, column_values(few, "completion")))) > 1:
        return ""
    return "it predicts classes, and the completions are free-form or all the same"


TEST_SETS = ("test_forget", "test_retain")  # that are attacked
ROUGE = ("rouge_l_recall", "rouge_l_f1")
ANSWERS = (
    *("accuracy", "f1", "generic", "loss", "flagged", "past_gate", "past_prompt"),
    *("probability", "extraction_strength", "exact_memorization", *ROUGE),
)

MEASURES = {
    measure.name: measure
    for measure in (
        Measure(
            "utility",
            "The four splits",
            "Accuracy is the share of rows whose completion greedy decoding generates, generic answers the share for "
            "which it generates a generic completion. Loss is the negative log-likelihood of the completion, in nats "
            "per row. Behind gates: the share of rows that they flag; a right answer past the gate is the base's own, "
            "one though flagged came in spite of what flagged rows get.",
            tasks.utility,
            figure="splits",
            generates="free-form",
            rows=SPLITS,
            metrics=ANSWERS,
        ),
        Measure(
            "kl",
            "Distance from the base on retain rows",
            "KL divergence from the predictions of the base without anything in front, in nats.",
            tasks.kl,
            _requires_base,
            rows=("train_retain", "test_retain"),
            metrics=("reverse_kl", "forward_kl"),
        ),
        Measure(
            "membership",
            "Membership inference",
            "How well an attack distinguishes trained forget rows from unseen rows of the same kind. An AUC of 0.5 "
            "is chance; best is the retrained model's, since an AUC far below 0.5 also shows that these rows were "
            "treated in a special way.",
            tasks.membership,
            _requires_unseen,
            figure="roc",
            rows=(MEMBERS,),
            metrics=(*(name for name, *_ in MEMBERSHIP), "auc_difference", "priv_leak"),
        ),
        Measure(
            "neighbors",
            "Near neighbors of the forget rows",
            "Retain rows that are like the forget rows.",
            tasks.near,
            _requires("neighbors", "sets of retain rows near the forget rows"),
            generates="free-form",
            metrics=ANSWERS,
        ),
        Measure(
            "unrelated text",
            "Unrelated text",
            "Perplexity of text that is unrelated to the task.",
            tasks.unrelated,
            _requires("unrelated_texts", "running text that is unrelated to the task"),
            by_row=False,
            rows=("unrelated text",),
            metrics=("perplexity", "tokens"),
        ),
        Measure(
            "questions",
            "TOFU's questions",
            "Forget quality is the p-value of a test that the truth ratios are the retrained model's: higher is "
            "better. The fewer questions there are, the more easily it is high.",
            tasks.tofu,
            _requires_questions,
            generates="always",
            by_row=False,
            rows=("forget", "retain", "real_authors", "world_facts"),
            metrics=(
                *("probability", "choice_probability", *ROUGE, "truth_ratio", "truth_ratio_geometric"),
                *("truth_ratio_on_forget", "truth_ratio_on_retain", "model_utility"),
                *("forget_quality", "forget_quality_geometric"),
            ),
        ),
        Measure(
            "input attack",
            "Attacks on the input",
            "The same rows in another form or among other text; 'none' are the unchanged rows. Tokens lost are those "
            "that did not fit in the model's input.",
            attack_tasks.inputs,
            figure="input_attacks",
            unit=TURN_UNIT,
            generates="free-form",
            rows=TEST_SETS,
            metrics=(*ANSWERS, "tokens_lost", "changed"),
        ),
        Measure(
            "relearning",
            "Relearning",
            "Training on a few of the forget rows, scored on the others. What the retrained model gains in the same "
            "number of steps is learned anew, not remembered. The unlearned model trains what it was unlearned by, "
            "a prompt, layers, LoRA or all weights, the retrained one all of its weights; the number of trained "
            "parameters is listed.",
            attack_tasks.relearning,
            _requires_trained,
            figure="relearning",
            unit=("step", "steps"),
            generates="free-form",
            by_row=False,
            rows=(MEMBERS,),
            metrics=(*ANSWERS, "trained_parameters"),
        ),
        Measure(
            "quantized",
            "A quantized base",
            "The same method over the base's weights in fewer bits.",
            attack_tasks.quantized,
            _requires_whole,
            unit=("bit", "bit"),
            generates="free-form",
            by_row=False,
            rows=TEST_SETS,
            metrics=ANSWERS,
        ),
        Measure(
            "sampling",
            "Sampled answers",
            "Success is the probability that at least one of several sampled answers begins with the true completion; "
            "ROUGE-L recall, of free-form answers, is that of the best one.",
            attack_tasks.sampling,
            unit=("try", "tries"),
            generates="free-form",
            rows=("test_forget",),
            metrics=("success", "rouge_l_recall"),
        ),
        Measure(
            "soft suffix",
            "A trained suffix",
            "Vectors behind the question, trained to bring the answer back: other rows before and after, and the rows "
            "that they were trained on.",
            attack_tasks.suffix,
            _requires_embeddings,
            by_row=False,
            rows=(MEMBERS,),
            metrics=("accuracy", "loss", "probability"),
        ),
        Measure(
            "linear probe",
            "A linear probe",
            "Accuracy of a linear classifier on the last layer, beside the most frequent class and shuffled labels.",
            attack_tasks.probe,
            _requires_classes,
            rows=(MEMBERS,),
            metrics=("accuracy", "majority", "shuffled"),
        ),
    )
}
"""The measures by name, in the order in which they are taken."""


def variant_in_words(one: Key | Measurement | MetricValue) -> str:
    """The attack and its level: `"diluted, 4 turns"`, `"8 bit"`."""
    return in_words(one.attack, one.level, MEASURES[one.measure].unit if one.measure in MEASURES else ("", ""))


def key_in_words(key: Key) -> str:
    """A measurement's key, as in `Evaluation.skipped`: `"relearning train_forget unlearned 4 steps"`."""
    return " ".join(filter(None, (key.measure, key.rows, key.model, variant_in_words(key))))


def is_attacked(one: Key | MetricValue) -> bool:
    """Whether a value was taken under its measure's attack: not without or before it, nor on rows it learned from."""
    if one.measure == "soft suffix":
        return one.attack == "after"
    return one.level != 0 if one.measure == "relearning" else one.attack != WITHOUT
