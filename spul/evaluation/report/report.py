"""An evaluation as a report: first in short and in words, then every number, what was left out, and the settings."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...data.unlearning_data import SPLITS
from ...records.card import THREAT_MODEL
from .document import Section, to_html, to_markdown
from .figures import MEMBERS, UNSEEN, evaluation_figures
from .plotting import save_figure
from .wording import (
    AS_THEY_ARE,
    BETTER,
    MODELS,
    PERCENT,
    first,
    knowledge_name,
    name_in_words,
    scale,
    steps,
    value_in_words,
    where,
    worst_input_attack,
)

# For types alone: at run time `spul.evaluation` imports models, whose saving imports this package.
if TYPE_CHECKING:
    from ..aggregation import Number
    from ..results import Evaluation


TITLE = "Evaluation"
NOT_MEASURED = "not measured"
MODEL_WORDS = {
    "unlearned": "unlearned: what was trained is in place",
    "detached": "detached: it is taken off, which leaves the base as it was before",
    "retrained": "retrained: a model that never saw the forget rows",
}
# By measure: heading, figure, and what is to be known in order to read the table.
MEASURES = {
    "utility": (
        "The four splits",
        "splits",
        "Accuracy is the share of rows that greedy decoding answers with their own completion, generic answers the "
        "share that it answers with a generic one. Loss is the negative log-likelihood of the completion, in nats a "
        "row.",
    ),
    "kl": (
        "Distance from the base on retain rows",
        "",
        "KL divergence to what the base says with nothing in front, in nats.",
    ),
    "neighbors": ("Near neighbors of the forget rows", "", "Rows that are to be kept and are like the forget rows."),
    "unrelated text": ("Unrelated text", "", "Perplexity of text that has nothing to do with the task."),
    "membership": (
        "Membership inference",
        "roc",
        "How well an attack tells forget rows that were trained on from unseen rows of the same kind. An AUC of 0.5 "
        "is chance; best is what the retrained model has, since an AUC far below 0.5 also shows that these rows were "
        "treated in a special way.",
    ),
    "input attack": (
        "Attacks on the input",
        "input_attacks",
        "The same rows in another form or among other text; 'none' are the rows as they are. Tokens lost are those "
        "that did not fit in the model's input.",
    ),
    "relearning": (
        "Relearning",
        "relearning",
        "Training on a few of the forget rows, scored on the others. What the retrained model gains in as many steps "
        "is learned anew, not remembered. The unlearned model trains what it was unlearned by, a prompt, layers, LoRA "
        "or all weights, the retrained one all of its weights; how many parameters that is stands with them.",
    ),
    "quantized": ("A quantized base", "", "The same with the base's weights in fewer bits."),
    "sampling": ("Sampled answers", "", "Success: at least one of so many sampled answers is right; share of rows."),
    "soft suffix": (
        "A trained suffix",
        "",
        "Vectors behind the question, trained to bring the answer back: other rows before and after, and the rows "
        "that they were trained on.",
    ),
    "linear probe": (
        "A linear probe",
        "",
        "What a linear classifier reads off the last layer, beside the most frequent class and shuffled labels.",
    ),
    "questions": (
        "TOFU's questions",
        "",
        "Forget quality is the p-value of a test that the truth ratios are the retrained model's: higher is better, "
        "and it is high the more easily, the fewer questions there are.",
    ),
}


def evaluation_markdown(evaluation: Evaluation) -> str:
    """An evaluation as Markdown: a summary, every number with its interval, what was left out, the settings."""
    return to_markdown(TITLE, _sections(evaluation), {})


def write_report(evaluation: Evaluation, folder: str | os.PathLike) -> list[Path]:
    """Write `report.md`, `report.html`, which holds its figures in itself, and `figures/` as PNG and SVG.

    Args:
        evaluation: one, or several joined.
        folder: where; it is made if it is not there.

    Returns:
        The paths that were written.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    path = Path(folder)
    sections = _sections(evaluation)
    figures = evaluation_figures(evaluation)
    path.mkdir(parents=True, exist_ok=True)
    written = {name: save_figure(figure, path / "figures" / name) for name, figure in figures.items()}
    links = {name: f"figures/{png.name}" for name, (png, _) in written.items()}
    markdown, html = path / "report.md", path / "report.html"
    markdown.write_text(to_markdown(TITLE, sections, links), encoding="utf-8")
    images = {name: png.read_bytes() for name, (png, _) in written.items()}
    html.write_text(to_html(TITLE, sections, images), encoding="utf-8")
    return [markdown, html, *(one for both in written.values() for one in both)]


def _sections(evaluation: Evaluation) -> list[Section]:
    measures = dict.fromkeys(one.measure for one in evaluation.numbers)
    order = [*(measure for measure in MEASURES if measure in measures), *(m for m in measures if m not in MEASURES)]
    left_out = [[name, why] for name, why in evaluation.left_out.items()]
    return [
        _in_short(evaluation),
        _what_attacks_find(evaluation),
        Section("What it does and does not protect against", [_protection()]),
        Section("How to read the tables", _reading(evaluation)),
        *(_measure(evaluation, measure) for measure in order),
        Section("What was left out", [] if left_out else ["Nothing was left out."], ["what", "why"], left_out),
        _settings(evaluation.settings),
    ]


# ---- in short ----


def _in_short(evaluation: Evaluation) -> Section:
    """The four splits before and after."""
    rows = []
    for split in SPLITS:
        for name in (knowledge_name(evaluation), "generic"):
            found = {
                model: first(evaluation, measure="utility", rows=split, name=name, model=model) for model in MODELS
            }
            after = found["unlearned"]
            if after is not None:
                cells = ["" if one is None else value_in_words(one) for one in found.values()]
                rows.append([_words(split), name_in_words(name), *cells, _better(after)])
    columns = ["rows", "number", "before (detached)", "after (unlearned)", "retrained", "better"]
    columns, rows = _without_empty_columns(columns, rows)
    return Section("In short", [] if rows else [f"The four splits: {NOT_MEASURED}."], columns, rows)


def _what_attacks_find(evaluation: Evaluation) -> Section:
    in_few_bits, in_suffix = (knowledge_name(evaluation, measure) for measure in ("quantized", "soft suffix"))
    rows = [
        ["What was trained is taken off", _detached(evaluation)],
        ["The input attack that finds most", _worst_input(evaluation)],
        ["The membership attack that is farthest from the retrained model", _membership(evaluation)],
        ["Training on a few forget rows", _relearned(evaluation)],
        ["The input attack that costs most on retain rows", _worst_on_retain(evaluation)],
        ["The base in fewer bits", _beside(evaluation, "quantized", "test_forget", in_few_bits)],
        ["Sampling", _beside(evaluation, "sampling", "test_forget", "success", "rouge_l_recall")],
        ["A soft suffix", _beside(evaluation, "soft suffix", MEMBERS, in_suffix, variant="after")],
        ["A linear probe on hidden states", _beside(evaluation, "linear probe", MEMBERS, "accuracy")],
    ]
    rows = rows[:4] + [row for row in rows[4:] if row[1] != NOT_MEASURED]
    text = "Where one of several attacks is named, it was picked by its number, which chance alone makes too high."
    return Section("What comes back", [text], ["what is done", "what it finds"], rows)


def _detached(evaluation: Evaluation) -> str:
    fields = {"measure": "utility", "rows": "test_forget", "name": knowledge_name(evaluation)}
    before, after = (first(evaluation, **fields, model=model) for model in ("detached", "unlearned"))
    if before is None or after is None:
        return NOT_MEASURED
    name = name_in_words(before.name)
    return f"test forget {name} {value_in_words(before)}, against {value_in_words(after)} with it in place"


def _worst_input(evaluation: Evaluation) -> str:
    worst = worst_input_attack(evaluation)
    if worst is None:
        return NOT_MEASURED
    name = knowledge_name(evaluation, "input attack")
    fields = {"measure": "input attack", "rows": "test_forget", "name": name}
    plain = first(evaluation, **fields, model="unlearned", variant=AS_THEY_ARE)
    others = (("detached", "detached"), ("retrained", "the retrained model"))
    controls = [(words, first(evaluation, **fields, model=name, variant=worst.variant)) for name, words in others]
    count = sum(one.variant != AS_THEY_ARE for one in where(evaluation, **fields, model="unlearned"))
    text = f"'{worst.variant}', of {count}: test forget {name} {value_in_words(worst)}"
    if plain is not None:
        text += f", {_points(worst, plain)} against the rows as they are ({value_in_words(plain)})"
    return text + "".join(f"; {words} under it: {value_in_words(one)}" for words, one in controls if one is not None)


def _worst_on_retain(evaluation: Evaluation) -> str:
    fields = {"measure": "input attack", "rows": "test_retain", "name": knowledge_name(evaluation, "input attack")}
    found = [one for one in where(evaluation, **fields, model="unlearned") if one.variant != AS_THEY_ARE]
    if not found:
        return NOT_MEASURED
    worst = min(found, key=lambda one: one.value)
    theirs = first(evaluation, **fields, model="detached", variant=worst.variant)
    text = f"'{worst.variant}', of {len(found)}: test retain {fields['name']} {value_in_words(worst)}"
    return text + ("" if theirs is None else f"; detached, under it: {value_in_words(theirs)}")


def _beside(evaluation: Evaluation, measure: str, rows: str, *names: str, variant: str | None = None) -> str:
    """What the unlearned model gives up in the last of a measure's variants, or a given one, and the retrained one."""
    found = [one for name in names for one in where(evaluation, measure=measure, rows=rows, name=name)]
    ours = [one for one in found if one.model == "unlearned" and one.variant in (variant or one.variant,)]
    if not ours:
        return NOT_MEASURED
    last = ours[-1]
    theirs = [one for one in found if (one.model, one.variant) == ("retrained", last.variant)]
    text = f"{_words(rows)} {name_in_words(last.name)} {value_in_words(last)}"
    text += f" ({last.variant})" if last.variant else ""
    return text + "".join(f"; the retrained model: {value_in_words(one)}" for one in theirs)


def _membership(evaluation: Evaluation) -> str:
    differences = where(evaluation, measure="membership", name="auc_difference", model="unlearned")
    areas = where(evaluation, measure="membership", name="auc", model="unlearned")
    if not areas:
        return NOT_MEASURED
    if not differences:
        farthest = max(areas, key=lambda one: abs(one.value - 0.5))
        return (
            f"no retrained model to compare with; farthest from chance, of {len(areas)}: '{farthest.variant}', AUC "
            f"{value_in_words(farthest)}"
        )
    most = max(differences, key=lambda one: abs(one.value))
    area = next(one for one in areas if one.variant == most.variant)
    return (
        f"'{most.variant}', of {len(differences)}: AUC {value_in_words(area)}; the difference to the retrained "
        f"model's is {value_in_words(most)}"
    )


def _relearned(evaluation: Evaluation) -> str:
    knows = knowledge_name(evaluation, "relearning")

    def curve(model: str) -> dict[int, Number]:
        found = where(evaluation, measure="relearning", rows=MEMBERS, name=knows, model=model)
        return {steps(one.variant): one for one in found}

    ours, theirs = curve("unlearned"), curve("retrained")
    trained = [step for step in ours if step > 0]
    if not trained:
        return NOT_MEASURED
    most = max(trained, key=lambda step: ours[step].value)
    text = (
        f"{name_in_words(knows)} on the other forget rows is highest after {most} steps, {value_in_words(ours[most])}"
    )
    if 0 in ours:
        text += f", {_points(ours[most], ours[0])} against none ({value_in_words(ours[0])})"
    if most in theirs:
        text += f"; the retrained model after {most} steps: {value_in_words(theirs[most])}"
        text += f", after none {value_in_words(theirs[0])}" if 0 in theirs else ""
    return text


def _points(one: Number, other: Number) -> str:
    difference = scale(one.name) * (one.value - other.value)
    return f"{difference:+.1f} percentage points" if one.name in PERCENT else f"{difference:+.3g}"


def _protection() -> str:
    return THREAT_MODEL + " The same holds of unlearning layers, and of LoRA that was not merged into the weights."


# ---- every number ----


def _reading(evaluation: Evaluation) -> list[str]:
    texts = ["; ".join(MODEL_WORDS[model] for model in MODEL_WORDS if model in evaluation.models) + "."]
    texts.append(
        "Behind a number stands its 95 % interval, [low, high], where there is one. What is better is said of the "
        "unlearned model; the others are controls."
    )
    seeds = max((one.num_seeds for one in evaluation.numbers), default=1)
    if seeds > 1:
        texts.append(
            f"Joined of {seeds} seeds: numbers are means over them. Intervals over the seeds alone are rough with few "
            "seeds."
        )
    if "retrained" not in evaluation.models:
        texts.append("No retrained model was measured, so that what such a model would answer is not known here.")
    return texts


def _measure(evaluation: Evaluation, measure: str) -> Section:
    """One measure: a line for each number, a column for each model."""
    title, figure, text = MEASURES.get(measure, (measure, "", ""))
    lines: dict[tuple[str, str, str], dict[str, Number]] = {}
    for one in where(evaluation, measure=measure):
        lines.setdefault((one.rows, one.variant, one.name), {})[one.model] = one
    models = [model for model in ("unlearned", "detached", "retrained") if model in evaluation.models]
    rows = []
    for (of, variant, name), found in lines.items():
        cells = [value_in_words(found[model]) if model in found else "" for model in models]
        ours = found.get("unlearned")
        counted = _distinct(str(one.num_rows) if one.num_rows else "" for one in found.values())
        over = _distinct(one.over for one in found.values())
        rows.append([_words(of), variant, name_in_words(name), *cells, _better(ours), counted, over])
    columns = ["rows", "variant", "number", *models, "better", "rows counted", "interval over"]
    columns, rows = _without_empty_columns(columns, rows)
    texts = [text] if text else []
    if measure == "membership":
        texts += _unseen(evaluation)
    return Section(title, texts, columns, rows, figure)


def _unseen(evaluation: Evaluation) -> list[str]:
    """How many rows that are no members there were, which bounds what a rate of 1 % can mean."""
    counts = {len(v) for one in evaluation.measurements if one.rows == UNSEEN for v in one.per_row.values()}
    if not counts:
        return []
    text = f"Rows counted are members; unseen rows: {_distinct(map(str, sorted(counts)))}."
    if min(counts) < 100:
        text += " With fewer than 100 of them, 1 % false positives means none at all."
    return [text]


def _settings(settings: dict[str, Any]) -> Section:
    """One column of values, or one for each of the joined seeds."""
    seeds = settings.get("seeds")
    joined = isinstance(seeds, list) and bool(seeds) and all(isinstance(one, dict) for one in seeds)
    columns = seeds if isinstance(seeds, list) and joined else [settings]
    names = dict.fromkeys(name for one in columns for name in one)
    rows = [[_words(name), *(_plain(one[name]) if name in one else "" for one in columns)] for name in names]
    heads = [f"seed {i}" for i in range(len(columns))] if joined else ["value"]
    return Section("Settings", [] if rows else ["None were recorded."], ["setting", *heads], rows)


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _words(name: str) -> str:
    return name.replace("_", " ")


def _better(number: Number | None) -> str:
    return "" if number is None else BETTER.get(number.better, number.better)


def _distinct(texts: Iterable[str]) -> str:
    return " / ".join(dict.fromkeys(text for text in texts if text))


def _without_empty_columns(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> tuple[list[str], list[list[str]]]:
    """Columns in which no row has anything are left out."""
    kept = [i for i in range(len(columns)) if any(row[i] for row in rows)]
    return [columns[i] for i in kept], [[row[i] for i in kept] for row in rows]
