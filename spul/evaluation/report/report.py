"""The report of an evaluation: a summary, all metrics by measure, what was skipped, and the settings."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ...records.card import THREAT_MODEL
from ...records.files import write_text
from ...records.spul_config import library_versions
from ..aggregation import UNSEEN, MetricValue
from ..attacks.usual import STAND_IN
from ..measures import MEASURES, variant_in_words
from ..metrics.table import metric_of
from ..results import Evaluation
from .answers import answers
from .document import Section, to_html, to_markdown
from .figures import evaluation_figures
from .plotting import save_figure
from .summary import before_and_after, without_empty_columns
from .wording import better_in_words, by_seed, method_in_words, shown, spaced, value_in_words, where

FACTS = {
    "adapter": "adapter",
    "weights_sha256": "SHA-256 of the adapter's weights",
    "base": "base",
    "base_fingerprint": "fingerprint of the base's weights",
}
FACTS_WITHOUT_TRAINING = {"adapter": "method", "base": FACTS["base"], "base_fingerprint": FACTS["base_fingerprint"]}
MODEL_WORDS = {
    "unlearned": "unlearned: the model with {method}",
    "detached": "detached: without {method}, which is the base as it was before",
    "retrained": "retrained: a model that never saw the forget rows",
}

CHANGED_WEIGHTS = """\
The weights were changed, which is no proof that anything was deleted from them: what an attack brings back was \
still there, and so may be what none of these attacks brought back. Whoever has the weights can try others, such as \
training on a few of the rows."""
BESIDE_WEIGHTS = """\
Nothing was deleted from the weights: the model is the base with {method}. Whoever runs the base alone has it as it \
was, knowledge included. This protects where the operator of the model controls what runs, as behind an API. It is no \
protection where the weights are handed out, or where users can remove or replace what stands beside them."""
BEHIND_GATES = "A request that no gate flags gets the base's own answer, so who finds a wording that passes has it."


def evaluation_markdown(evaluation: Evaluation) -> str:
    """An evaluation as Markdown: a summary, all metrics with their intervals, what was skipped, the settings."""
    return to_markdown(title_of(evaluation), _sections(evaluation), {})


def write_report(
    evaluation: Evaluation, folder: str | os.PathLike, digests: Mapping[str, str] | None = None
) -> list[Path]:
    """Write `report.md`, a self-contained `report.html`, and `figures/` as PNG and SVG.

    It names adapter, base, rows, date and library. Its digests are those of the adapter's record and card.

    Args:
        evaluation: one, or several joined.
        folder: the folder to write to; it is created if missing.
        digests: SHA-256 of files that belong to the report, by name, which it is to name.

    Returns:
        The written paths.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    path = Path(folder)
    title, sections = title_of(evaluation), _sections(evaluation, digests or {})
    figures = evaluation_figures(evaluation)
    path.mkdir(parents=True, exist_ok=True)
    written = {name: save_figure(figure, path / "figures" / name) for name, figure in figures.items()}
    links = {name: f"figures/{png.name}" for name, (png, _) in written.items()}
    markdown, html = path / "report.md", path / "report.html"
    write_text(markdown, to_markdown(title, sections, links))
    images = {name: png.read_bytes() for name, (png, _) in written.items()}
    write_text(html, to_html(title, sections, images))
    return [markdown, html, *(one for both in written.values() for one in both)]


def title_of(evaluation: Evaluation) -> str:
    """The report's title: what was evaluated, as far as it has a name."""
    facts = [one for _, one in by_seed(evaluation.facts)]
    adapters, bases = (_distinct(one.get(name) or "" for one in facts) for name in ("adapter", "base"))
    return "Evaluation" + (f" of {adapters}" if adapters else "") + (f" on {bases}" if bases else "")


def protection(evaluation: Evaluation) -> str:
    """Protection by the unlearned model, and its limits."""
    facts = [one for _, one in by_seed(evaluation.facts)]
    if any(one.get("weights_changed") for one in facts):
        return CHANGED_WEIGHTS
    method = method_in_words(evaluation)
    text = THREAT_MODEL if method.startswith("the prompt") else BESIDE_WEIGHTS.format(method=method)
    return f"{text} {BEHIND_GATES}" if any(one.get("is_gated") for one in facts) else text


def _sections(evaluation: Evaluation, digests: Mapping[str, str] | None = None) -> list[Section]:
    present = dict.fromkeys(one.measure for one in evaluation.metrics)
    order = [name for name in MEASURES if name in present] + [name for name in present if name not in MEASURES]
    skipped = [[name, why] for name, why in evaluation.skipped.items()]
    return [
        *answers(evaluation),
        before_and_after(evaluation),
        Section("What it does and does not protect against", [protection(evaluation)]),
        _facts(evaluation, digests or {}),
        Section("How to read the tables", _reading(evaluation)),
        *(section for measure in order for section in _measure(evaluation, measure)),
        Section("What was skipped", [] if skipped else ["Nothing was skipped."], ["what", "why"], skipped),
        _settings(evaluation.settings),
    ]


def _reading(evaluation: Evaluation) -> list[str]:
    method = method_in_words(evaluation)
    models = [words.format(method=method) for model, words in MODEL_WORDS.items() if model in evaluation.models]
    texts = ["; ".join(models) + "."]
    texts.append(
        "A value is followed by its 95 % interval, [low, high], if there is one. The better direction is that of the "
        "unlearned model; the others are controls."
    )
    seeds = max((one.num_seeds for one in evaluation.metrics), default=1)
    if seeds > 1:
        texts.append(
            f"Joined of {seeds} seeds: values are means over them. Intervals over the seeds alone are rough with few "
            "seeds."
        )
    if "retrained" not in evaluation.models:
        texts.append("No retrained model was measured, so what such a model would answer is unknown here.")
    return texts


def _measure(evaluation: Evaluation, name: str) -> list[Section]:
    """One measure: a line for each metric, a column for each model; then the texts of attacks on the input."""
    measure = MEASURES.get(name)
    lines: dict[tuple[str, str, str], dict[str, MetricValue]] = {}
    for one in where(evaluation, measure=name):
        lines.setdefault((one.rows, variant_in_words(one), one.name), {})[one.model] = one
    models = [model for model in MODEL_WORDS if model in evaluation.models]
    rows = []
    for (of, variant, metric), found in lines.items():
        cells = [value_in_words(found[model]) if model in found else "" for model in models]
        counted = _distinct(f"{one.num_rows:,}" if one.num_rows else "" for one in found.values())
        over = _distinct(one.over for one in found.values())
        better = better_in_words(found.get("unlearned"))
        rows.append([spaced(of), variant, metric_of(metric).label, *cells, better, counted, over])
    columns = ["rows", "attack", "metric", *models, "better", "rows counted", "interval over"]
    columns, rows = without_empty_columns(columns, rows)
    if measure is None:
        return [Section(name, [], columns, rows)]
    texts = [measure.explanation, *(_unseen(evaluation) if name == "membership" else [])]
    section = Section(measure.title, texts, columns, rows, measure.figure)
    return [section, *(_attack_texts(evaluation) if name == "input attack" else [])]


def _attack_texts(evaluation: Evaluation) -> list[Section]:
    """Examples of the attacks on the input, each on a row made up for it."""
    facts = [one for _, one in by_seed(evaluation.facts)]
    examples = {name: text for one in facts for name, text in (one.get("attack_examples") or {}).items()}
    if not examples:
        return []
    as_messages = any(one.get("asks_messages") for one in facts)
    row = "conversation, whose only message is the user's" if as_messages else "row"
    text = (
        f"Each attack on a made-up {row}, {STAND_IN!r}, since no report shows rows of the data; the other texts and "
        "the answers among them are made up, too. [...] stands for what was left out, \u21b5 for a line break."
    )
    if as_messages:
        text += (
            " Each message begins with its role. Attacks change the last user message; turns are messages before it, "
            "behind the system's."
        )
    rows = [[name, shown(prompt)] for name, prompt in examples.items()]
    return [Section("What the attacks on the input ask", [text], ["attack", "prompt"], rows)]


def _unseen(evaluation: Evaluation) -> list[str]:
    """The number of unseen rows, which limits the precision of a rate of 1 %."""
    counts = {len(v) for one in evaluation.measurements if one.rows == UNSEEN for v in one.per_row.values()}
    if not counts:
        return []
    text = f"Rows counted are members; unseen rows: {_distinct(map(str, sorted(counts)))}."
    if min(counts) < 100:
        text += " With fewer than 100 of them, 1 % false positives means none at all."
    return [text]


def _facts(evaluation: Evaluation, digests: Mapping[str, str]) -> Section:
    """Adapter, base, rows and versions of an evaluation; the report's own date, since seeds may be of several."""
    versions = [f"{name} {version}" for name, version in library_versions().items()]
    written = f"Written on {datetime.now(timezone.utc).date().isoformat()} (UTC) by {', '.join(versions)}."
    shown, heads = [], []
    for head, facts in by_seed(evaluation.facts):
        heads.append(head)
        sets = {name: _summary(one) for name, one in (facts.get("rows") or {}).items()}
        words = FACTS if facts.get("is_trained", True) else FACTS_WITHOUT_TRAINING
        shown.append({words[name]: facts[name] or "not known" for name in words if name in facts} | sets)
    columns, rows = _table("what", heads, shown)
    rows += [[f"SHA-256 of {name}", digest, *[""] * (len(heads) - 1)] for name, digest in digests.items()]
    return Section("What was measured", [written], columns, rows)


def _summary(rows: Mapping[str, Any]) -> str:
    """A set of rows in the words of the model card."""
    text = f"{rows['rows']:,} rows"
    return text if rows["digest"] is None else f"{text}, HMAC-SHA256 {rows['digest']}"


def _settings(settings: dict[str, Any]) -> Section:
    heads, columns = zip(*by_seed(settings), strict=True)
    head, rows = _table("setting", heads, columns)
    return Section("Settings", [] if rows else ["None were recorded."], head, rows)


def _table(
    first: str, heads: Sequence[str], columns: Sequence[Mapping[str, Any]]
) -> tuple[list[str], list[list[str]]]:
    """A line for each name in any column."""
    names = dict.fromkeys(name for one in columns for name in one)
    rows = [[spaced(name), *(_plain(one[name]) if name in one else "" for one in columns)] for name in names]
    return [first, *heads], rows


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _distinct(texts: Iterable[str]) -> str:
    return " / ".join(dict.fromkeys(text for text in texts if text))
