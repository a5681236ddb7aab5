"""Tables and figures of the evidence, of records made by hand."""

import pytest


def test_a_refusal_behind_a_gate_is_right_where_the_base_is_and_nothing_is_flagged(examples):
    from evidence import tables

    base = [{"seed": 1, "side": "forget", "attack": "none", "accuracy": [1, 1, 0]}]
    inputs = [{"side": "forget", "attack": "none", "flagged": [1, 0, 0]}]
    gates = [{"gate": "g", "seed": seed, "inputs": inputs} for seed in (1, 2)]
    (found,) = tables.refusals_attacked(gates, base)
    assert found["inputs"][0]["accuracy"] == [0, 1, 0]


def test_the_figure_of_sizes_has_a_point_for_each_seed_at_its_models_size(examples):
    from evidence import tables

    def record(system, model, seed, forget, retain):
        scores = {"test_forget": {"accuracy": forget}, "test_retain": {"accuracy": retain}}
        return {"system": system, "model": model, "seed": seed, "scores": scores}

    both = [1, 1, 1, 0], [1, 1, 1, 1]
    records = [record("base", model, seed, *both) for model, seed in (("smollm2", 1), ("smollm2", 2), ("gemma3", 1))]
    records += [record("mine", "smollm2", seed, [0, 0, 0, seed - 1], [1, 1, 1, 0]) for seed in (1, 2)]
    records.append(record("mine", "gemma3", 1, [1, 1, 0, 0], [1, 1, 0, 0]))
    forget, retain = tables.scales(records, ["mine"]).axes
    for axes, means, points in ((forget, [12.5, 50], [0, 25, 50]), (retain, [-25, -50], [-25, -25, -50])):
        assert axes.lines[0].get_xdata().tolist() == [134.5, 268.1]
        assert axes.lines[0].get_ydata().tolist() == means
        assert [float(y) for one in axes.collections for y in one.get_offsets()[:, 1]] == points
    with pytest.raises(ValueError, match="another"):
        tables.scales([record("mine", "another", 1, *both)], ["mine"])


def test_retain_is_compared_on_the_same_rows_with_an_interval_over_rows_for_one_seed(examples):
    from evidence import tables

    def record(seed, values):
        return {"system": "mine", "seed": seed, "scores": {"test_retain": {"accuracy": values}}}

    base = {1: record(1, [1, 1, 1, 0] * 25), 2: record(2, [1, 0, 1, 0] * 25)}
    one, by_seed = tables.paired([record(1, [1, 1, 0, 0] * 25)], base)
    assert by_seed == [-0.25]
    assert one.low < -0.25 < one.high < 0
    two, by_seed = tables.paired([record(1, [1, 1, 0, 0] * 25), record(2, [1, 1, 1, 0] * 25)], base)
    assert by_seed == [-0.25, 0.25]
    assert two.estimate == 0
    assert two.low < -0.25  # two seeds that disagree say little
    with pytest.raises(ValueError, match=r"scored on seeds \[3\], the base was not"):
        tables.paired([record(3, [1])], base)
