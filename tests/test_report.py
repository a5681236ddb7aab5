"""The report of an evaluation: its first screen, its tables of all numbers, and its files."""

from __future__ import annotations

import base64
import dataclasses
import re
from datetime import datetime, timezone
from html.parser import HTMLParser
from importlib.metadata import version

import pytest
from evaluations import input_attacks, measurement, membership, utility, whole
from reports import cells, section, verdict

from spul.evaluation.measures import MEASURES
from spul.evaluation.report import evaluation_markdown, write_report
from spul.evaluation.report.document import Section, to_html, to_markdown
from spul.evaluation.results import Evaluation, join
from spul.records.card import THREAT_MODEL


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

Partly forgotten: 2 of 8 test forget rows that the base knew are still answered right. With so few rows, 7 to 59 % is \
possible (95 % interval).

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
points against 10.0 % [...] (1 of 10 rows) without; under the attack, a model retrained without the forget rows: \
50.0 % [...] (5 of 10 rows).

Tried: attacks on the input, relearning, a trained suffix.
"""


def test_the_first_screen_answers_three_questions_in_words_and_whole_numbers():
    text = re.sub(r"\[\d[\d.]*, [\d.]+\]", "[...]", evaluation_markdown(whole()))
    assert text.startswith(FIRST_SCREEN)


def test_of_rows_of_which_the_base_knew_none_no_answers_are_counted():
    text = evaluation_markdown(
        Evaluation({}, utility({"unlearned": {"test_forget": 0}, "detached": {"test_forget": 0}}), {})
    )
    assert "the base itself got 10 wrong; what it did not know cannot be forgotten.\n" in text
    assert "that it knew" not in text


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
    assert "Each attack on a made-up row, " in text
    assert "message" not in text
    assert "What the attacks on the input ask" not in evaluation_markdown(Evaluation({}, input_attacks(), {}))


def test_attacks_on_conversations_are_said_to_change_messages():
    facts = {"attack_examples": {"diluted, 1 turn": "user: a\nassistant: b\nuser: c"}, "asks_messages": True}
    text = section(
        evaluation_markdown(Evaluation({}, input_attacks(), {}, facts=facts)), "What the attacks on the input ask"
    )
    assert "Each attack on a made-up conversation, whose only message is the user's, " in text
    assert "Attacks change the last user message; turns are messages before it, behind the system's." in text
    assert cells(text)[2] == ["diluted, 1 turn", "user: a \u21b5 assistant: b \u21b5 user: c"]


def test_changed_weights_are_not_said_to_be_a_prompt():
    found = Evaluation({}, utility(), {}, facts={"weights_changed": True})
    said = section(evaluation_markdown(found), "What it does and does not protect against")
    assert said.startswith("The weights were changed, which is no proof that anything was deleted")
    assert THREAT_MODEL not in said


def test_a_prompt_is_said_to_delete_nothing_before_any_table_of_all_numbers():
    text = evaluation_markdown(dataclasses.replace(whole(), facts={"method": "the prompt"}))
    assert text.index(THREAT_MODEL) < text.index("## The four splits")


def test_what_was_not_measured_is_said_not_to_be():
    bare = Evaluation({}, utility({"unlearned": {"test_forget": 2}}), {})
    text = evaluation_markdown(bare)
    assert [said for _, said in cells(section(text, "What brings it back?"))[2:]] == ["not measured"] * 4
    assert "No retrained model was measured" in text
    assert section(text, "What was skipped") == "Nothing was skipped."
    assert section(text, "Settings") == "None were recorded."


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
