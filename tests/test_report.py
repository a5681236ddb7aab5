"""The report of an evaluation, and what of it goes onto a model card."""

from __future__ import annotations

import base64
import dataclasses
import json
import re
from datetime import datetime, timezone
from html.parser import HTMLParser
from importlib.metadata import version

import pytest
import torch
from evaluations import input_attacks, measurement, membership, utility, whole
from huggingface_hub import ModelCard

from spul import SpulConfig, UnlearningLayers, UnlearningLayersConfig
from spul.evaluation.measures import MEASURES
from spul.evaluation.report import add_to_card, card_metrics, evaluation_markdown, write_report
from spul.evaluation.report.document import Section, to_html, to_markdown
from spul.evaluation.results import Evaluation, join
from spul.records.card import THREAT_MODEL, model_card


class Page(HTMLParser):
    """The tags of a page that opens and closes them in order, its text, its tables' rows and its images."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.rows: list[list[str]] = []
        self.images: list[dict] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag == "img":
            self.images.append(dict(attrs))
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def section(markdown: str, title: str) -> str:
    found = re.search(rf"^## {re.escape(title)}\n\n(.*?)(?=\n## |\Z)", markdown, flags=re.MULTILINE | re.DOTALL)
    assert found is not None, title
    return found[1].strip()


def cells(text: str) -> list[list[str]]:
    return [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]


# ---- what was measured ----


FACTS = {
    "adapter": "<b>me</b>/a|b",
    "weights_sha256": None,
    "base": "`x` *y*",
    "base_fingerprint": "ab" * 32,
    "rows": {"test_forget": {"rows": 1234, "digest": "cd" * 32}, "neighbors: <i>": {"rows": 2, "digest": None}},
}


def test_adapter_base_rows_date_and_versions_are_named_and_escaped():
    found = Evaluation({}, utility({"unlearned": {"test_forget": 2}}), {}, facts=FACTS)
    before, text, after = datetime.now(timezone.utc), evaluation_markdown(found), datetime.now(timezone.utc)
    assert text.startswith("# Evaluation of &lt;b&gt;me&lt;/b&gt;/a\\|b on \\`x\\` \\*y\\*\n")
    said = section(text, "What was measured")
    assert f"by spul {version('spul')}, torch {version('torch')}, " in said
    assert any(f"Written on {one.date().isoformat()} (UTC)" in said for one in (before, after))
    assert cells(said)[2:] == [
        ["adapter", r"&lt;b&gt;me&lt;/b&gt;/a\|b"],
        ["SHA-256 of the adapter's weights", "not known"],
        ["base", r"\`x\` \*y\*"],
        ["fingerprint of the base's weights", "ab" * 32],
        ["test forget", f"1,234 rows, HMAC-SHA256 {'cd' * 32}"],
        ["neighbors: &lt;i&gt;", "2 rows"],
    ]


def test_joined_seeds_each_name_their_own():
    one = Evaluation({}, utility(), {}, facts=FACTS)
    other = Evaluation({}, utility(), {}, facts={**FACTS, "adapter": "second", "rows": {}})
    head, _, *rows = cells(section(evaluation_markdown(join([one, other])), "What was measured"))
    assert head == ["what", "seed 0", "seed 1"]
    assert rows[0] == ["adapter", r"&lt;b&gt;me&lt;/b&gt;/a\|b", "second"]
    assert rows[4] == ["test forget", f"1,234 rows, HMAC-SHA256 {'cd' * 32}"]


# ---- in short ----


FIRST_SCREEN = """\
# Evaluation

## Is it forgotten?

Test forget accuracy: 20.0 % [...] (2 of 10 rows); before: 80.0 % [...] (8 of 10 rows); a model retrained without the \
forget rows: 40.0 % [...] (4 of 10 rows).

Train forget accuracy: 10.0 % [...] (1 of 10 rows); before: 90.0 % [...] (9 of 10 rows); a model retrained without \
the forget rows: 50.0 % [...] (5 of 10 rows).

Of the 10 test forget rows the base itself got 2 wrong; what it did not know cannot be forgotten. Of the 8 that it \
knew, 2 are still answered right.

Of the 10 train forget rows the base itself got 1 wrong; what it did not know cannot be forgotten. Of the 9 that it \
knew, 1 is still answered right.

## What did it cost?

Test retain accuracy: 80.0 % [...] (8 of 10 rows); before: 90.0 % [...] (9 of 10 rows); a model retrained without the \
forget rows: 90.0 % [...] (9 of 10 rows).

Generic answers, which retain rows should not get: 20.0 % [...] (2 of 10 rows).

## What brings it back?

Most is brought back by relearning (4 steps): train forget accuracy 60.0 % [...] (6 of 10 rows), +50.0 percentage \
points against 10.0 % [...] (1 of 10 rows) without.

Tried: attacks on the input, relearning, a trained suffix.
"""


def test_the_first_screen_answers_three_questions_in_words_and_whole_numbers():
    text = re.sub(r"\[\d[\d.]*, [\d.]+\]", "[...]", evaluation_markdown(whole()))
    assert text.startswith(FIRST_SCREEN)


def test_an_attack_that_raises_nothing_is_not_said_to_bring_anything_back():
    rows = {"unlearned": {"test_forget": 2}, "detached": {"test_forget": 10}}
    attacked = [one for one in input_attacks() if one.attack == "none"]
    found = [*utility(rows), *attacked, dataclasses.replace(attacked[0], attack="capitals")]
    text = evaluation_markdown(Evaluation({}, found, {}))
    assert "No attack raised what is answered. Tried: attacks on the input." in text
    assert "Of the 10 test forget rows the base itself got all right. Of the 10 that it knew, 2 are still" in text


def test_rows_that_the_base_did_not_know_are_counted_over_joined_seeds_and_not_for_free_form_answers():
    one = Evaluation({}, utility(), {})
    text = evaluation_markdown(join([one, one]))
    assert "Of the 20 test forget rows of 2 seeds the base itself got 4 wrong" in text
    assert "(2 of 10 rows)" not in text
    free = [dataclasses.replace(m, per_row={**m.per_row, "probability": m.per_row["accuracy"]}) for m in utility()]
    assert "the base itself" not in evaluation_markdown(Evaluation({}, free, {}))


def test_counts_are_whole_numbers():
    found = [measurement("relearning", "train_forget", "unlearned", level=1, overall={"trained_parameters": 1234567})]
    found += [dataclasses.replace(found[0], level=4, num_rows=1234)]
    rows = cells(section(evaluation_markdown(Evaluation({}, found, {})), "Relearning"))
    assert [row[3] for row in rows[2:]] == ["1,234,567"] * 2
    assert rows[3][-1] == "1,234"


def test_what_each_attack_asks_is_shown_short_and_on_one_line():
    examples = {"capitals": "<B>X</B>", "diluted, 1 turn": "one\ntwo", "long": "a" * 300 + "b" * 300}
    found = Evaluation({}, input_attacks(), {}, facts={"attack_examples": examples})
    text = section(evaluation_markdown(found), "What the attacks on the input ask")
    assert cells(text)[2:] == [
        ["capitals", "&lt;B&gt;X&lt;/B&gt;"],
        ["diluted, 1 turn", "one \u21b5 two"],
        ["long", "a" * 180 + " [...] " + "b" * 180],
    ]
    assert "What the attacks on the input ask" not in evaluation_markdown(Evaluation({}, input_attacks(), {}))


def test_changed_weights_are_not_said_to_be_a_prompt():
    found = Evaluation({}, utility(), {}, facts={"weights_changed": True})
    said = section(evaluation_markdown(found), "What it does and does not protect against")
    assert said.startswith("The weights were changed, which is no proof that anything was deleted")
    assert THREAT_MODEL not in said


def test_the_table_of_splits_has_all_four_before_and_after():
    head, _, *rows = cells(section(evaluation_markdown(whole()), "Before and after"))
    assert head == ["rows", "metric", "before (detached)", "after (unlearned)", "retrained", "better"]
    values = [[re.sub(r" \[.*\]", "", cell) for cell in row] for row in rows]
    assert values[0] == ["train retain", "accuracy", "100.0 %", "90.0 %", "90.0 %", "higher"]
    assert values[6] == ["test forget", "accuracy", "80.0 %", "20.0 %", "40.0 %", "lower"]
    assert values[7] == ["test forget", "generic answers", "0.0 %", "80.0 %", "0.0 %", "higher"]
    one = whole().metric("utility", "test_forget", "accuracy")
    assert rows[6][3] == f"20.0 % [{100 * one.low:.1f}, {100 * one.high:.1f}]"


def test_what_comes_back_is_said_with_its_controls():
    _, _, *rows = cells(section(evaluation_markdown(whole()), "What brings it back?"))
    found = {what: re.sub(r" \[[-\d., ]*\]", "", said) for what, said in rows}
    assert list(found.values()) == [
        "test forget accuracy 80.0 %, against 20.0 % with it in place",
        "'capitals', of 2: test forget accuracy 50.0 %, +30.0 percentage points against the unchanged rows (20.0 %)"
        "; the retrained model under it: 40.0 %",
        "'loss', of 2: AUC 0.3; the difference from the retrained model's is -0.3, " + verdict(),
        "accuracy on the other forget rows is highest after 4 steps, 60.0 %, +50.0 percentage points against none "
        "(10.0 %); the retrained model after 4 steps: 50.0 %, after none 40.0 %",
        "train forget accuracy 70.0 % (after); the retrained model: 40.0 %",
    ]


def verdict() -> str:
    return whole().metric("membership", "train_forget", "auc_difference", attack="loss").note


def test_a_prompt_is_said_to_delete_nothing_before_any_table_of_all_numbers():
    text = evaluation_markdown(whole())
    assert text.index(THREAT_MODEL) < text.index("## The four splits")


def test_what_was_not_measured_is_said_not_to_be():
    bare = Evaluation({}, utility({"unlearned": {"test_forget": 2}}), {})
    text = evaluation_markdown(bare)
    assert [said for _, said in cells(section(text, "What brings it back?"))[2:]] == ["not measured"] * 4
    assert "No retrained model was measured" in text
    assert section(text, "What was skipped") == "Nothing was skipped."
    assert section(text, "Settings") == "None were recorded."


def test_without_a_retrained_model_the_attack_farthest_from_chance_is_named_without_a_verdict():
    text = evaluation_markdown(Evaluation({}, membership(("unlearned",)), {}))
    said = cells(section(text, "What brings it back?"))[4][1]
    assert said.startswith("no retrained model to compare with; farthest from chance, of 2: 'loss', AUC 0.3")
    assert "forgotten" not in said


def test_an_attack_under_which_less_is_answered_has_a_minus():
    fewer = [one for one in input_attacks() if one.attack != "capitals" and one.model == "unlearned"]
    fewer[0] = dataclasses.replace(fewer[0], per_row={"accuracy": [1.0] * 5 + [0.0] * 5})
    text = section(evaluation_markdown(Evaluation({}, fewer, {})), "What brings it back?")
    assert "-10.0 percentage points against the unchanged rows (50.0 %" in text


# ---- all metrics ----


def test_every_metric_stands_in_its_measures_table():
    text, found = evaluation_markdown(whole()), whole()
    head, _, *rows = cells(section(text, "Membership inference"))
    assert head == [
        *("rows", "attack", "metric", "unlearned", "detached", "retrained"),
        *("better", "rows counted", "interval over"),
    ]
    assert len(rows) == len({(n.attack, n.name) for n in found.metrics if n.measure == "membership"})
    assert rows[0][:3] == ["train forget", "loss", "AUC"]
    assert [cell.split()[0] for cell in rows[0][3:6]] == ["0.3", "0.9", "0.6"]
    assert rows[0][6:] == ["as retrained", "10", "rows"]
    difference = next(row for row in rows if row[1:3] == ["loss", "AUC, less the retrained model's"])
    assert difference[6] == "near 0"
    assert difference[3].endswith(f", {verdict()}")
    assert "unseen rows: 10. With fewer than 100 of them" in text


def test_shares_are_in_percent_and_other_numbers_plain():
    rows = cells(section(evaluation_markdown(whole()), "The four splits"))
    of_forget = {row[1]: row for row in rows if row[0] == "test forget"}
    assert of_forget["loss"][2].startswith("2.1 [")  # (2 * 0.5 + 8 * 2.5) / 10
    assert of_forget["loss"][5] == ""  # whether a high loss on forget rows is good depends
    assert of_forget["accuracy"][2].startswith("20.0 % [")


def test_numbers_of_joined_seeds_say_what_their_intervals_are_over():
    one = Evaluation({"seed": 0, "lr": 0.1}, [*membership(), *input_attacks()], {})
    other = dataclasses.replace(one, settings={"seed": 1})
    text = evaluation_markdown(join([one, other]))
    assert "Joined of 2 seeds" in text
    assert cells(section(text, "Attacks on the input"))[2][-1] == "rows and seeds"
    assert cells(section(text, "Settings")) == [
        ["setting", "seed 0", "seed 1"],
        ["---", "---", "---"],
        ["seed", "0", "1"],
        ["lr", "0.1"],
    ]


def test_a_measure_has_its_heading_and_explanation_and_a_level_its_unit():
    found = [
        measurement(measure, "test_forget", "unlearned", attack, level=level, overall={"loss": 1.0})
        for measure, attack, level in (
            *(("input attack", "diluted", 1), ("relearning", "", 1), ("quantized", "", 8), ("sampling", "", 10)),
            ("linear probe", "", None),
        )
    ]
    text = evaluation_markdown(Evaluation({}, found, {}))
    variants = {}
    for one in found:
        measure = MEASURES[one.measure]
        assert measure.explanation in section(text, measure.title)
        variants[one.measure] = cells(section(text, measure.title))[2][1]
    assert list(variants.values()) == ["diluted, 1 turn", "1 step", "8 bit", "10 tries", "loss"]


def test_a_measure_that_is_not_known_is_shown_all_the_same():
    found = Evaluation({}, [measurement("my own", "test_forget", "unlearned", overall={"score": 12345.678})], {})
    assert cells(section(evaluation_markdown(found), "my own"))[2][:3] == ["test forget", "score", "12,345.7"]


# ---- files ----


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("report")
    return folder, write_report(whole(), folder)


def test_the_files_are_there_and_the_markdown_shows_the_figures(report):
    folder, paths = report
    figures = [f"figures/{name}.{end}" for name in ("splits", "roc", "input_attacks", "relearning") for end in
               ("png", "svg")]  # fmt: skip
    assert [str(path.relative_to(folder)) for path in paths] == ["report.md", "report.html", *figures]
    assert all(path.stat().st_size > 0 for path in paths)
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert re.findall(r"!\[.*\]\((.*)\)", text) == figures[::2]
    assert re.sub(r"!\[.*\n\n", "", text) == evaluation_markdown(whole())


def test_the_page_parses_and_needs_nothing_else(report):
    folder, _ = report
    text = (folder / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert not {"script", "link", "iframe", "object", "a"} & set(page.tags)
    assert not re.search(r"https?:|url\(|@import", text)
    for image, name in zip(page.images, ("splits", "roc", "input_attacks", "relearning"), strict=True):
        kind, data = image["src"].split(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(data) == (folder / "figures" / f"{name}.png").read_bytes()


def test_text_of_others_is_text_in_the_page_and_in_the_markdown(report):
    folder, _ = report
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    assert ["name", "<script>alert('x')</script>"] in page.rows
    assert ["kl", "the model has no <base> of its own"] in page.rows
    assert any("prefix: <b>Say|it</b>" in row for row in page.rows)
    assert not {"b", "base", "script"} & set(page.tags)
    markdown = (folder / "report.md").read_text(encoding="utf-8")
    assert "| name | &lt;script&gt;alert('x')&lt;/script&gt; |" in markdown
    assert r"prefix: &lt;b&gt;Say\|it&lt;/b&gt;" in markdown
    assert not re.search(r"<[a-z]", markdown)


def test_the_page_and_the_markdown_have_the_same_tables(report):
    folder, _ = report
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    lines = (folder / "report.md").read_text(encoding="utf-8").splitlines()
    assert len(page.rows) == sum(line.startswith("|") and not line.startswith("| ---") for line in lines)


def test_markup_in_a_cell_breaks_neither_table_nor_link():
    odd = Section("a *b*", ["x\n\n## y", "[z](http://z)"], ["c|d"], [['`"e" & \\']])
    text = to_markdown("t", [odd], {})
    assert text == ('# t\n\n## a \\*b\\*\n\nx ## y\n\n[z]\\(http://z)\n\n| c\\|d |\n| --- |\n| \\`"e" &amp; \\\\ |\n')
    assert Page(to_html("t", [odd], {})).rows == [["c|d"], ['`"e" & \\']]


def test_quotes_in_a_title_do_not_end_the_attribute_of_its_image():
    title = 'a" onload="x'
    page = Page(to_html(title, [Section(title, figure="f")], {"f": b"png"}))
    assert page.images == [{"src": "data:image/png;base64,cG5n", "alt": title}]


# ---- the card ----


def test_the_cards_metrics_are_the_splits_the_detached_and_the_worst_attacked():
    metrics = card_metrics(whole())
    assert list(metrics) == [
        *("train_retain", "train_forget", "test_retain", "test_forget"),
        *("test_forget, detached", "test_forget, worst input attack (capitals)"),
        *("train_retain, retrained", "train_forget, retrained", "test_retain, retrained", "test_forget, retrained"),
    ]
    # F1 by hand: of either class (five rows) one is found and none is wrongly given, 2 * 1 / (2 * 1 + 4) = 1/3.
    assert metrics["test_forget"] == pytest.approx({"accuracy": 0.2, "f1": 1 / 3, "generic": 0.8})
    assert metrics["test_forget, detached"] == {"accuracy": 0.8, "generic": 0.0}
    assert metrics["test_forget, worst input attack (capitals)"] == {"accuracy": 0.5, "generic": 0.5}
    assert metrics["train_forget, retrained"] == {"accuracy": 0.5, "generic": 0.0}


def test_what_was_not_measured_is_not_among_the_cards_metrics():
    found = Evaluation({}, utility({"unlearned": {"train_retain": 9, "train_forget": 1}}), {})
    assert list(card_metrics(found)) == ["train_retain", "train_forget"]
    with pytest.raises(ValueError, match="no measure 'utility' of the unlearned model"):
        card_metrics(Evaluation({}, membership(("unlearned",)), {}))


@pytest.fixture
def adapter(tmp_path):
    """The record and the card of a prompt, with something that a later version may know."""
    config = SpulConfig(base_model_name_or_path="some/base", metrics={"old": {"accuracy": 0.123}})
    config.save(tmp_path)
    path = tmp_path / "spul_config.json"
    record = {**json.loads(path.read_text()), "of_a_later_version": 1}
    path.write_text(json.dumps(record))
    model_card(config, prompt_type="P_TUNING", num_virtual_tokens=3, num_parameters=5).save(tmp_path / "README.md")
    return tmp_path


def test_an_adapters_record_and_card_get_the_metrics_and_keep_all_else(adapter):
    before = (adapter / "README.md").read_text(encoding="utf-8")
    add_to_card(whole(), adapter)
    after = (adapter / "README.md").read_text(encoding="utf-8")
    assert SpulConfig.load(adapter / "spul_config.json").metrics == card_metrics(whole())
    record = json.loads((adapter / "spul_config.json").read_text(encoding="utf-8"))
    assert (record["of_a_later_version"], record["base_model_name_or_path"]) == (1, "some/base")
    assert "| test_forget, worst input attack (capitals) | 0.5000 | " in section(after, "Metrics")
    assert "0.123" not in after
    (front, body), (old_front, old_body) = (text[4:].split("\n---\n", 1) for text in (after, before))
    assert body.replace(section(body, "Metrics"), section(old_body, "Metrics")) == old_body
    assert front.startswith(old_front)  # the results are new, all else is as it was
    assert "- Of the 10 test forget rows the base itself got 2 wrong" in section(after, "Metrics")
    results = ModelCard(after).data.eval_results
    assert {(one.dataset_split, one.dataset_config, one.metric_type): one.metric_value for one in results} == {
        (split.split(",")[0], "worst input attack (capitals)" if "," in split else None, name): round(value, 6)
        for split, values in card_metrics(whole()).items()
        if "detached" not in split and "retrained" not in split
        for name, value in values.items()
    }
    accuracy = whole().metric("utility", "test_forget", "accuracy")
    (one,) = [r for r in results if (r.dataset_name, r.metric_type) == ("test forget", "accuracy")]
    assert one.metric_args == {"low": round(accuracy.low, 6), "high": round(accuracy.high, 6), "rows": 10}
    add_to_card(whole(), adapter)
    assert (adapter / "README.md").read_text(encoding="utf-8") == after
    assert sorted(path.name for path in adapter.iterdir()) == ["README.md", "spul_config.json"]


def test_saved_unlearning_layers_get_the_metrics_and_load_with_them(tmp_path):
    from helpers import build_llama

    torch.manual_seed(0)
    UnlearningLayers(build_llama(), UnlearningLayersConfig()).save_pretrained(tmp_path)
    assert "Not evaluated." in (tmp_path / "README.md").read_text(encoding="utf-8")
    add_to_card(whole(), tmp_path)
    assert "| test_forget, detached | 0.8000 |" in (tmp_path / "README.md").read_text(encoding="utf-8")
    torch.manual_seed(0)
    assert UnlearningLayers.from_pretrained(build_llama(), tmp_path).spul_config.metrics == card_metrics(whole())


@pytest.mark.parametrize("name", ["spul_config.json", "README.md"])
def test_a_folder_that_is_no_saved_adapter_is_refused(adapter, name):
    (adapter / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"has no {name}; pass a folder that save_pretrained"):
        add_to_card(whole(), adapter)


def test_a_card_without_metrics_is_refused_before_anything_is_written(adapter):
    record = (adapter / "spul_config.json").read_bytes()
    (adapter / "README.md").write_text("# My own card\n")
    with pytest.raises(ValueError, match="has no section '## Metrics'"):
        add_to_card(whole(), adapter)
    assert (adapter / "spul_config.json").read_bytes() == record


def test_what_else_comes_back_stands_beside_its_control():
    def of(measure, rows, model, variant, name, values):
        attack, level = (variant, None) if isinstance(variant, str) else ("", variant)
        return measurement(measure, rows, model, attack, level=level, per_row={name: values})

    found = [
        of("input attack", "test_retain", "unlearned", "none", "accuracy", [1.0] * 4),
        of("input attack", "test_retain", "unlearned", "capitals", "accuracy", [1.0, 1.0, 0.0, 0.0]),
        of("input attack", "test_retain", "unlearned", "dilution", "accuracy", [1.0, 0.0, 0.0, 0.0]),
        of("input attack", "test_retain", "detached", "none", "accuracy", [1.0] * 4),
        of("input attack", "test_retain", "detached", "capitals", "accuracy", [1.0, 1.0, 1.0, 0.0]),
        of("input attack", "test_retain", "detached", "dilution", "accuracy", [1.0, 0.0, 0.0, 0.0]),
        of("quantized", "test_forget", "unlearned", 8, "accuracy", [1.0, 0.0, 1.0, 1.0]),
        of("quantized", "test_forget", "unlearned", 4, "accuracy", [1.0, 0.0, 0.0, 0.0]),
        of("quantized", "test_forget", "retrained", 4, "accuracy", [1.0, 0.0, 1.0, 0.0]),
    ]
    rows = cells(section(evaluation_markdown(Evaluation({}, found, {})), "What brings it back?"))[6:]
    said = {what: re.sub(r" \[[-\d., ]*\]", "", text) for what, text in rows}
    assert said == {
        # Dilution leaves fewer answers, of the detached model as well.
        "The input attack under which the prompt costs most on retain rows": "'capitals', of 2: test retain accuracy "
        "50.0 %, -25.0 percentage points against the detached model under it (75.0 %), which without it has 100.0 %",
        "The base in fewer bits": "test forget accuracy 25.0 % (4 bit); the retrained model: 50.0 %",
    }


@pytest.mark.parametrize(
    ("detached", "expected"),
    [
        (
            {"none": 4, "capitals": 2, "dilution": 1},
            "'dilution', of 2: test retain accuracy 25.0 %, +0.0 percentage points against the detached model under "
            "it (25.0 %), which without it has 100.0 %; what is lost is the attack's doing, not the prompt's",
        ),
        (
            {"none": 2, "capitals": 2},
            "'capitals', of 2: test retain accuracy 50.0 %, +0.0 percentage points against the detached model under "
            "it (50.0 %), which without it has 50.0 %; nothing is lost",
        ),
        (
            {"capitals": 3},
            "'capitals', of 2: test retain accuracy 50.0 %, -25.0 percentage points against the detached model under "
            "it (75.0 %)",
        ),
        (
            {},
            "'dilution', of 2: test retain accuracy 25.0 %; the detached model was not measured, so whether the "
            "attack or the prompt costs it is not known",
        ),
    ],
)
def test_what_an_attack_takes_from_the_detached_model_too_is_not_said_to_be_the_prompts_doing(detached, expected):
    rights = {"unlearned": {"none": 4, "capitals": 2, "dilution": 1}, "detached": detached}
    found = [
        measurement(
            "input attack", "test_retain", model, attack, per_row={"accuracy": [1.0] * right + [0.0] * (4 - right)}
        )
        for model, of in rights.items()
        for attack, right in of.items()
    ]
    text = section(evaluation_markdown(Evaluation({}, found, {})), "What brings it back?")
    (said,) = [cell for what, cell in cells(text)[2:] if what.endswith("costs most on retain rows")]
    assert re.sub(r" \[[-\d., ]*\]", "", said) == expected
