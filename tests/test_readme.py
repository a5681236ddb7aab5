"""README.md's figures are those of the stored measurements, and of pages whose tables tests hold to theirs."""

import json
import re

import pytest
from scipy.stats import binomtest
from stored_evidence import DATA, DOCS, tables_of

TEXT = " ".join((DOCS.parent / "README.md").read_text().split())
(RESULTS,) = tables_of("../README.md", "spul: Soft Prompting for UnLearning")
(COSTS,) = tables_of("../README.md", "What it costs")
# The rows of the first table, by the names of results.md: in short, and of all systems.
ROWS = [
    ("the base, attacked on one seed", "base"),
    ("**text gate and fixed refusal**, no training", "**text gate and fixed refusal**"),
    ("SPUL, prefix with fitted keys", "**SPUL, prefix with fitted keys, no gate**"),
    ("SPUL, prefix with fitted keys, rewritten rows", "**the same, rewritten rows**, 600 steps"),
    ("SPUL, prompt tuning", "SPUL, prompt tuning, no gate"),
    ("SPUL, P-tuning, the paper's", "SPUL, P-tuning, no gate"),
    ("SPUL's loss on LoRA", "**SPUL's loss on LoRA (IDK)**"),
    ("SPUL's loss on LoRA, rewritten rows", "the same, rewritten rows, 400 steps"),
]


def table(page, heading, index=0):
    """The cells of a table's rows by the first one."""
    return {name: cells for name, *cells in tables_of(page, heading)[index][1:]}


def said(pattern):
    """The groups of the one place of the text where the pattern is."""
    (match,) = re.finditer(pattern, TEXT)
    return match.groups()


def records(name):
    """The records of the first measurement in a file of `docs/data/performance/`."""
    found, _ = json.JSONDecoder().raw_decode((DATA.parent / "performance" / name).read_text())
    return found["records"]


def test_the_first_table_has_the_numbers_of_the_results_page():
    short, whole = table("results.md", "In short"), table("results.md", "On SmolLM2")
    assert len(RESULTS) == 1 + len(ROWS)
    for (name, *shown), (in_short, in_full) in zip(RESULTS[1:], ROWS, strict=True):
        forget, change, disguised, _, turns = short[in_short]
        assert shown == [forget, whole[in_full][3], change.split(" (")[0], disguised, turns], name
        assert whole[in_full][1].split(" (")[0] == forget


def test_what_gets_past_the_gate_is_the_most_of_a_seed_on_the_results_page():
    (share,) = said(r"Disguises get past the gate in ([\d.]+) % of rows at most")
    page = (DOCS / "results.md").read_text()
    assert re.findall(r"at most ([\d.]+) % are answered with names misspelled", page) == [share]


def test_the_sizes_of_adapters_follow_from_the_models():
    def megabytes(num):
        return 4 * num / 1e6  # float32

    opt = {"width": 2048, "layers": 24}
    small, large = said(r"30 virtual tokens for OPT-1.3B are (\d+) kilobytes, as a prefix (\d+) megabytes")
    assert float(small) == pytest.approx(1000 * megabytes(30 * opt["width"]), rel=0.02)
    assert round(megabytes(30 * opt["layers"] * 2 * opt["width"])) == int(large)
    # SmolLM2-135M: 30 layers of width 576, keys and values of 192, an inner width of 1,536; LoRA of rank 16
    ends = [576 + 576, 576 + 192, 576 + 192, 576 + 576, 576 + 1536, 576 + 1536, 1536 + 576]
    lora = megabytes(30 * 16 * sum(ends))
    least, most = said(r"LoRA, an adapter (\d+) to (\d+) times larger")
    assert int(least) == round(lora / megabytes(30 * 30 * 2 * 192))
    assert int(most) == pytest.approx(lora / megabytes(30 * 576), rel=0.02)


def test_ten_requests_have_the_numbers_of_the_results_page():
    found = table("results.md", "Ten requests")
    behind_gates, anew, costs, merged = said(
        r"each behind its gate: ([\d.]+) % of their rows are answered, .* "
        r"LoRA trained anew at each change leaves ([\d.]+) % and costs the others ([\d.]+) points; "
        r"merged ten times it leaves ([\d.]+) %"
    )
    first = {name: [cell.split(" (")[0] for cell in cells] for name, cells in found.items()}
    assert first["prompts, 10"][0] == first["refusals, 10"][0] == behind_gates
    assert [first["LoRA anew, 10"][0], first["LoRA merged, 10"][0]] == [anew, merged]
    assert float(costs) == pytest.approx(float(first["base"][3]) - float(first["LoRA anew, 10"][3]))


def test_tofu_has_the_numbers_of_the_results_page():
    found = table("results.md", "TOFU on SmolLM2", 1)  # the first is of the columns
    rouge = {name: cells[4] for name, cells in found.items()}
    base, prefix, lora = said(
        r"of the base's ([\d.]+) of ROUGE-L on other questions the prefix keeps ([\d.]+), LoRA ([\d.]+), "
        r"a gate of recall 95 % with a refusal all"
    )
    assert [base, prefix, lora] == [
        rouge["base"],
        rouge["**SPUL, prefix with fitted keys, no gate**"],
        rouge["SPUL's loss on LoRA (IDK)"],
    ]
    assert rouge["**the same, recall 95 %**"] == base


def test_the_costs_are_those_that_were_measured():
    steps = {(one["shape"], one["step"]): one["seconds"] for one in records("step.json") if "step" in one}
    made = [[f"{steps[shape, step]:.1f} s" for shape in ("sst2", "yelp")] for step in ("spul", "plain", "floor")]
    assert [cells for _, *cells in COSTS[1:]] == made
    large = {one["step"]: one["seconds"] for one in records("llama-2-7b.json") if "step" in one}
    shown = said(r"LLaMA-2-7B's shape takes ([\d.]+) s, ([\d.]+) plainly and ([\d.]+) without a prompt")
    assert list(shown) == [f"{large[step]:.3f}" for step in ("spul", "plain", "floor")]
    slower = said(r"makes classification (\d+) % slower than the base alone on a CPU, (\d+) % on that GPU")
    for share, name in zip(slower, ("inference.json", "inference-7b.json"), strict=True):
        (over,) = (one["over_base"] for one in records(name) if (one["task"], one["model"]) == ("classify", "spul"))
        assert round(100 * (over - 1)) == int(share)


def test_an_interval_that_ends_below_5_percent_takes_the_rows_that_are_said():
    (rows,) = map(int, said(r"An interval that ends below 5 % takes (\d+) rows or more"))
    least, fewer = (binomtest(0, num).proportion_ci(method="wilson").high for num in (rows, rows - 1))
    assert least <= 0.05 < fewer


def test_the_time_of_an_evaluation_is_that_which_was_measured():
    utility, attacked, rest = (one["cpu_seconds"] for one in records("evaluate-small-lm.json"))
    made = [f"{seconds:.0f}" for seconds in (utility, attacked - utility, rest)]
    shown = r"took (\d+) seconds of one CPU core, .*? (\d+)[^.]*? measures (\d+) "
    assert list(said(shown)) == made
    page = " ".join((DOCS / "evaluation.md").read_text().split())
    assert re.findall(shown, page) == [tuple(made)]
