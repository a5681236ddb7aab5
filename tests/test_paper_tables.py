"""Tables of stored runs, published rows and the Pareto front."""

from __future__ import annotations

import json
import math
import random

import pytest
from paper.published import PUBLISHED, PublishedRow, published_rows
from paper.tables import Summary, aggregate, cost_table, generic_table, main_table, read_runs, score_table
from stored_runs import run

from spul.data.unlearning_data import SPLITS
from spul.training.settings_search import pareto_front

# ---- reading ----


def test_runs_are_read_as_they_were_written(tmp_path):
    runs = [run(seed=0), run(seed=1, model="\u2028 naïve")]
    path = tmp_path / "runs.jsonl"
    path.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in runs), encoding="utf-8")
    assert read_runs(path) == runs


@pytest.mark.parametrize("rest", [b'{"method": "SP', b'{"method": "na\xc3'])
def test_a_last_line_that_breaks_off_is_skipped_with_a_warning(tmp_path, rest):
    path = tmp_path / "runs.jsonl"
    path.write_bytes(b'{"seed": 0}\n\n' + rest)
    with pytest.warns(UserWarning, match=r"runs\.jsonl, line 3 breaks off and is skipped"):
        assert read_runs(path) == [{"seed": 0}]


def test_a_last_line_that_lacks_its_end_of_line_only_is_read(tmp_path):
    path = tmp_path / "runs.jsonl"
    path.write_bytes(b'{"seed": 0}\n{"seed": 1}')
    assert read_runs(path) == [{"seed": 0}, {"seed": 1}]


@pytest.mark.parametrize("text", ['{"seed": 0}\n{"se\n{"seed": 1}\n', '{"seed": 0}\n{"se\n', '{"seed": 0}\n[1]\n'])
def test_other_broken_lines_are_refused_with_their_number(tmp_path, text):
    path = tmp_path / "runs.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"runs\.jsonl, line 2 is (not JSON|list \[1\])"):
        read_runs(path)


# ---- means over seeds ----


def test_means_and_sample_deviations_over_seeds_in_the_order_first_seen():
    groups = aggregate([run("SPUL", 3, 0.9), run("base", 0, 0.4), run("SPUL", 1, 0.7), run("SPUL", 2, 0.5)])
    assert [group.key for group in groups] == [{"method": "SPUL"}, {"method": "base"}]
    assert [group.seeds for group in groups] == [(3, 1, 2), (0,)]
    spul, base = groups
    assert tuple(spul.scores) == SPLITS
    assert spul.scores["train_retain"]["accuracy"].mean == pytest.approx(0.7)
    assert spul.scores["train_retain"]["accuracy"].sd == pytest.approx(0.2)  # 0.163 without ddof=1
    assert spul.scores["test_forget"]["accuracy"].mean == pytest.approx(0.4)
    assert spul.cost["seconds"] == Summary(12.0, 1.0)
    assert base.scores["test_forget"]["generic"] == Summary(0.375, None)


def test_groups_are_made_by_settings_too():
    runs = [run(settings={"alpha": alpha, "layers": [0, alpha]}) for alpha in (1.0, 0.1)]
    assert [group.key for group in aggregate(runs, ("alpha", "method"))] == [
        {"alpha": 1.0, "method": "SPUL"},
        {"alpha": 0.1, "method": "SPUL"},
    ]
    assert len(aggregate(runs, ("layers",))) == 2  # a list as value


def test_a_seed_that_is_there_twice_is_refused_with_what_tells_the_runs_apart():
    runs = [run(), run(trainable="p_tuning", settings={"alpha": 0.1})]
    with pytest.raises(
        ValueError, match=r"two runs of method=SPUL have seed 0\. They differ in trainable, alpha: add "
    ):
        aggregate(runs)
    with pytest.raises(ValueError, match=r"two runs of method=SPUL have seed 0\. They have the same settings"):
        aggregate([run(), run()])


def test_a_key_that_a_run_lacks_is_named_with_those_there():
    with pytest.raises(ValueError, match=r"\(sst2, small-lm, SPUL, 0\) has no 'gamma'; .*'alpha'"):
        aggregate([run()], ("gamma",))


def test_a_cost_of_some_seeds_only_is_refused_and_one_of_no_seed_left_out():
    with_none = [run(seed=seed, cost={"seconds": 1.0, "peak_memory_bytes": None}) for seed in (0, 1)]
    assert list(aggregate(with_none)[0].cost) == ["seconds"]
    with pytest.raises(ValueError, match=r"method=SPUL, cost: seconds is missing for the seed\(s\) \[1\]"):
        aggregate([with_none[0], run(seed=1, cost={})])


def test_a_loss_that_diverged_stays_visible():
    runs = [run(seed=0), run(seed=1)]
    runs[1]["scores"]["train_forget"]["loss"] = math.nan
    loss = aggregate(runs)[0].scores["train_forget"]["loss"]
    assert math.isnan(loss.mean)
    assert loss.sd is not None
    assert math.isnan(loss.sd)


# ---- tables ----


def test_the_main_table_to_the_letter():
    runs = [run("base", 0, 0.95), run("SPUL", 0, 0.9), run("SPUL", 1, 0.8)]
    values = (97.17, 13.75, 94.43, 11.3)
    rows = [PublishedRow("a paper", "2", "sst2", "LLaMA-2-7B", "GA+GD", values, values)]
    rows.append(PublishedRow("another", "2", "yelp", "LLaMA-2-7B", "GA+GD", values, values))
    assert main_table(runs, rows) == (
        "Accuracy in %, mean ± standard deviation; sst2; small-lm; seeds 0, 1 (but method=base: 0). "
        "Published: a paper.\n"
        "\n"
        "| method | train retain | train forget | test retain | test forget |\n"
        "| --- | ---: | ---: | ---: | ---: |\n"
        "| base | 95.00 | 85.00 | 75.00 | 65.00 |\n"
        "| SPUL | 85.00 ± 7.07 | 75.00 ± 7.07 | 65.00 ± 7.07 | 55.00 ± 7.07 |\n"
        "| *published: LLaMA-2-7B, GA+GD* | *97.17* | *13.75* | *94.43* | *11.30* |\n"
    )


def test_a_table_per_data_set_and_model_each_with_its_own_published_rows():
    runs = [run(dataset=dataset, model=model) for dataset in ("sst2", "imdb") for model in ("small", "tiny")]
    tables = main_table(runs, PUBLISHED).split("\n\nAccuracy")
    assert [table.count("*published: ") for table in tables] == [32, 32, 0, 0]  # rows of SST-2 in tables 2 to 5
    captions = [line for line in main_table(runs).splitlines() if line.startswith("Accuracy")]
    assert captions == [
        "Accuracy in %; sst2; small; seed 0.",
        "Accuracy in %; sst2; tiny; seed 0.",
        "Accuracy in %; imdb; small; seed 0.",
        "Accuracy in %; imdb; tiny; seed 0.",
    ]


def test_models_share_a_table_where_they_are_its_rows():
    table = score_table([run(model="small"), run(model="tiny")], by=("model",), published=published_rows("sst2")[-1:])
    assert table.splitlines()[0] == "Accuracy in %; sst2; seed 0. Published: arXiv 2406.12038v2."
    assert [line.split(" | ")[0] for line in table.splitlines()[4:]] == [
        "| small",
        "| tiny",
        "| *published: LLaMA-2-13B, SPUL*",
    ]


def test_an_ablation_has_a_column_per_setting():
    runs = [run(settings={"alpha": alpha, "beta": beta}) for alpha in (0.1, 1.0) for beta in (0.0, 0.5)]
    lines = score_table(runs, by=("alpha", "beta"), published=published_rows("sst2", "OPT-1.3B")).splitlines()
    assert lines[-2] == "| *published: OPT-1.3B, GA+GD* |  | *87.56* | *50.53* | *86.47* | *55.25* |"
    assert lines[2] == "| alpha | beta | train retain | train forget | test retain | test forget |"
    assert lines[5] == "| 0.1 | 0.5 | 50.00 | 40.00 | 30.00 | 20.00 |"
    assert lines[-1] == "| *published: OPT-1.3B, SPUL* |  | *94.87* | *16.84* | *91.65* | *17.87* |"


def test_other_measures_have_their_own_names_and_units():
    assert "Share of generic answers in %; sst2;" in generic_table([run()])
    assert "| SPUL | 0.00 | 12.50 | 25.00 | 37.50 |" in generic_table([run()])
    assert "| SPUL | 25.00 | 25.00 | 25.00 | 25.00 |" in score_table([run()], "f1")
    assert "| SPUL | 1.5000 | 1.5000 |" in score_table([run()], "loss")  # no share, no %


def test_scores_that_are_not_there_leave_a_dash():
    scores = {"test_forget": {"accuracy": 0.1}}
    assert "| GA | - | - | - | 10.00 |" in main_table([run(), run("GA", scores=scores)])


def test_the_cost_table_to_the_letter():
    cheap = run("base", cost={"seconds": 1234.56})
    assert cost_table([run(seed=0), run(seed=1), cheap]) == (
        "Cost, mean; sst2; small-lm; seeds 0, 1 (but method=base: 0).\n"
        "\n"
        "| method | trainable parameters | seconds | peak memory, MB | forward passes |\n"
        "| --- | ---: | ---: | ---: | ---: |\n"
        "| SPUL | 604,160 | 10.5 | 3,200 | 12,000 |\n"
        "| base | - | 1,234.6 | - | - |\n"
    )


@pytest.mark.parametrize("table", [main_table, generic_table, cost_table, aggregate])
def test_no_runs_are_refused(table):
    with pytest.raises(ValueError, match="there are no runs"):
        table([])


def test_an_unknown_measure_is_refused_with_those_there():
    with pytest.raises(
        ValueError, match=r"measure='rouge' is in no run of dataset=sst2, .* accuracy, f1, generic, loss"
    ):
        score_table([run()], "rouge")


def test_published_rows_stand_beside_accuracy_and_f1_alone():
    lines = score_table([run()], "f1", published=published_rows("sst2", "LLaMA-2-13B")).splitlines()
    assert lines[0] == "F1 in %; sst2; small-lm; seed 0. Published: arXiv 2406.12038v2."
    assert lines[-1] == "| *published: LLaMA-2-13B, SPUL* | *98.93* | *11.25* | *95.60* | *13.54* |"
    with pytest.raises(ValueError, match="measure='generic', but the published rows are of accuracy and f1"):
        score_table([run()], "generic", published=PUBLISHED)


def test_a_published_row_stands_in_the_columns_of_its_settings():
    runs = [run(settings={"alpha": 1.0, "beta": 0.5})]
    published = published_rows("sst2", table="grid")
    lines = score_table(runs, by=("method", "alpha", "beta"), published=published).splitlines()
    assert lines[4] == "| SPUL | 1.0 | 0.5 | 50.00 | 40.00 | 30.00 | 20.00 |"
    assert lines[5] == "| *published: LLaMA-2-7B, SPUL* | *0.1* | *0.0* | *90.84* | *9.12* | *89.50* | *10.33* |"
    assert len(lines) == 5 + 12


# ---- published rows ----


METHODS_OF_TABLE_2 = ("vanilla", "base", "GA", "RL", "GA+KL", "GA+GD", "SPUL")


def test_published_rows_of_a_data_set_and_of_a_model():
    for dataset in ("sst2", "yelp", "wmdp"):
        assert [row.method for row in published_rows(dataset, "LLaMA-2-7B")] == list(METHODS_OF_TABLE_2)
    assert [row.method for row in published_rows("sst2", "OPT-1.3B")] == list(METHODS_OF_TABLE_2)
    assert [row.method for row in published_rows("sst2", "LLaMA-2-13B")] == ["vanilla", "base", "SPUL"]
    assert published_rows("wmdp")[-1].accuracy == (99.38, 5.44, 89.70, 3.22)
    assert published_rows("wmdp")[-1].f1 == (99.45, 10.20, 89.75, 6.07)
    assert published_rows("yelp", "OPT-1.3B") == []
    assert published_rows("imdb") == []
    assert published_rows("sst2", table="ablation") == []


def test_published_rows_are_whole_and_agree_where_two_tables_have_the_same_run():
    assert len(PUBLISHED) == 3 * 7 + 12 + 3 + 7 + 3
    for row in PUBLISHED:
        assert len(row.accuracy) == len(row.f1) == 4, row
        assert all(0 < value < 100 for value in (*row.accuracy, *row.f1)), row
    grid = {(row.settings["alpha"], row.settings["beta"]): row for row in published_rows("sst2", table="grid")}
    assert set(grid) == {(alpha, beta) for alpha in (0.1, 0.5, 1.0) for beta in (0.0, 0.1, 0.5, 1.0)}
    main, whole = published_rows("sst2", "LLaMA-2-7B")[-1], published_rows("sst2", table="forget-size")[-1]
    assert (grid[1.0, 0.5].accuracy, grid[1.0, 0.5].f1) == (main.accuracy, main.f1)
    assert (grid[1.0, 1.0].accuracy, grid[1.0, 1.0].f1) == (whole.accuracy, whole.f1)
    assert whole.settings == {"forget_size": 1.0}


# ---- Pareto front ----


def brute_force_front(points):
    def beats(a, b):
        return a[0] >= b[0] and a[1] <= b[1] and a != b

    front = [i for i, point in enumerate(points) if not any(beats(other, point) for other in points)]
    return sorted(front, key=lambda i: (points[i][0], i))


def test_the_pareto_front_is_that_of_comparing_every_pair():
    rng = random.Random(0)
    sizes = set()
    for _ in range(300):
        # Few different values, so that ties and equal points are common.
        points = [(rng.randint(0, 6) / 6, rng.randint(0, 6) / 6) for _ in range(rng.randint(0, 12))]
        assert pareto_front(points) == brute_force_front(points)
        sizes.add(len(pareto_front(points)))
    assert {0, 1, 2, 3} <= sizes


def test_equal_points_of_the_front_all_count():
    assert pareto_front([(0.9, 0.2), (0.8, 0.1), (0.9, 0.2), (0.9, 0.3)]) == [1, 0, 2]


def test_a_point_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match=r"the point\(s\) \[1\] have a coordinate that is NaN"):
        pareto_front([(0.9, 0.2), (math.nan, 0.1)])
