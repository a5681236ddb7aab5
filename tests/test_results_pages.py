"""The pages of results on small models, and of performance: tables have the numbers of stored runs, rounded."""

import json

import pytest
from stored_evidence import DOCS, tables_of

from spul.data import SPLITS


@pytest.fixture
def groups(examples):
    """Means over seeds of a file of runs, by method."""
    from paper.tables import aggregate, read_runs

    return lambda name: {one.key["method"]: one for one in aggregate(read_runs(DOCS / f"data/results/{name}.jsonl"))}


@pytest.mark.parametrize(
    ("name", "page", "heading"),
    [
        ("reviews", "results-appendix.md", "Reviews"),
        ("quiz", "results-appendix.md", "Quiz"),
        ("sst2", "results-appendix.md", "SST-2"),
        ("sst2", "results.md", "SST-2"),
    ],
)
def test_the_tables_of_methods_have_the_means_and_deviations_of_their_runs(groups, name, page, heading):
    found, rows = groups(name), tables_of(page, heading)[0][1:]
    assert {len(one.seeds) for one in found.values()} == {3}
    assert len(rows) >= 6
    for method, *cells in rows:
        scores = found[method.split(" (")[0]].scores
        values = [*(scores[split]["accuracy"] for split in SPLITS), scores["test_forget"]["generic"]]
        assert cells == [f"{100 * one.mean:.1f} ± {100 * one.sd:.1f}" for one in values], method


def test_the_table_of_costs_has_the_means_of_its_runs(groups):
    found = groups("sst2")
    for method, parameters, seconds, memory, passes in tables_of("results-appendix.md", "SST-2")[1][1:]:
        cost = {name: one.mean for name, one in found[method].cost.items()}
        shown = [f"{cost['trainable_parameters']:,.0f}", f"{cost['seconds']:,.1f}"]
        shown += [f"{cost['peak_memory_bytes'] / 1e6:,.0f}", f"{cost['forward_passes']:,.0f}"]
        assert [parameters, seconds, memory, passes] == shown, method


# ---- performance ----


def records(name):
    return json.loads((DOCS / f"data/performance/{name}.json").read_text())["records"]


def test_ratios_of_attention_are_those_of_the_file():
    shown = tables_of("performance.md", "Keys of the prompt: copied or merged")[0][1:]
    found = [[one["shape"], str(one["p"]), f"{one['merged / copied']:.2f}"] for one in records("merged-attention")]
    assert shown == found


def test_tensors_of_a_step_are_those_of_the_file():
    found = {}
    for one in records("live-tensors"):
        found.setdefault((one["model"], one["shape"]), {})[one["step"]] = one
    steps, lines = ("spul", "spul, concatenated", "floor"), []
    for key, one in found.items():
        sizes = [f"{one[step]['peak_bytes'] / 1e6:.0f}" for step in steps]
        lines.append([*key, *sizes, *(f"{one[step]['memory / floor']:.2f}" for step in steps[:2])])
    assert tables_of("performance.md", "Gradient checkpointing")[1][1:] == lines


def test_tokens_of_two_processes_are_those_of_the_file():
    one, two = (f"{line['tokens_per_second']:,.0f}" for line in records("two-processes"))
    assert f"{one} with one and {two} with two" in (DOCS / "performance.md").read_text()
