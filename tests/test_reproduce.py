"""The reproduction script: what it computes, that it resumes, and what it writes."""

import json
import sys
from pathlib import Path

import pytest
from helpers import build, make_tokenizer
from paper.tables import read_runs

from spul.data import PromptFormat, UnlearningData
from spul.training.methods import METHODS

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def reproduce(monkeypatch, tmp_path):
    """The script as a function of its options; tiny data, a tiny model."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import reproduce

    model, data = tmp_path / "tiny", tmp_path / "reviews"
    if not model.exists():
        build("llama").save_pretrained(model)
        make_tokenizer().save_pretrained(model)
        data.mkdir()
        for split, name in (
            ("train_retain", "film"),
            ("train_forget", "jane"),
            ("test_retain", "plot"),
            ("test_forget", "doe"),
        ):
            labels = ("negative", "positive")
            rows = [{"text": f"{name} {i}", "label": i % 2, "label_text": labels[i % 2]} for i in range(8)]
            (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(*options):
        common = ["--dataset", data, "--model", model, "--steps", "2", "SPUL=3", "--memorize-epochs", "1", "--no-bf16"]
        common += ["--memorize", "full", "--max-length", "60", "--num-virtual-tokens", "4"]
        common += ["--output-dir", tmp_path / "out"]
        monkeypatch.setattr(sys, "argv", ["reproduce.py", *map(str, [*common, *options])])
        reproduce.main()
        return tmp_path / "out"

    run.module = reproduce
    return run


def cells(table, name):
    """The row of a Markdown table that begins with a name."""
    (line,) = [line for line in table.splitlines() if line.startswith(f"| {name} |")][:1]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_main_table_has_every_method_and_every_run_is_a_line(reproduce):
    out = reproduce("--table", "main", "--figure", "pareto", "--seeds", "0", "1", "--prompt-types", "prefix_tuning")
    runs = read_runs(out / "runs.jsonl")
    compared = METHODS[: METHODS.index("EUL") + 1]
    expected = {"vanilla", "base", "retrained", *compared, "SPUL detached", "EUL detached"}
    assert {(run["method"], run["seed"]) for run in runs} == {(name, seed) for name in expected for seed in (0, 1)}
    assert len(runs) == 2 * len(expected)
    by_name = {run["method"]: run for run in runs if run["seed"] == 0}
    assert by_name["SPUL detached"]["scores"] == by_name["base"]["scores"]
    assert by_name["GA"]["cost"]["trainable_parameters"] > by_name["SPUL"]["cost"]["trainable_parameters"] > 0
    assert by_name["GA+KL"]["settings"]["beta"] == 1.0
    assert (by_name["GA+KL"]["settings"]["steps"], by_name["SPUL"]["settings"]["steps"]) == (2, 3)
    table = (out / "table-main.md").read_text()
    for name in expected:
        assert len(cells(table, name)) == 5
    accuracy = [run["scores"]["test_forget"]["accuracy"] for run in runs if run["method"] == "NPO+GD"]
    assert cells(table, "NPO+GD")[4].split(" ±")[0] == f"{100 * sum(accuracy) / 2:.2f}"
    for suffix in (".png", ".svg"):
        assert (out / f"figure-pareto{suffix}").stat().st_size > 5000


def test_a_command_given_again_computes_nothing_and_another_seed_only_its_own(reproduce, monkeypatch):
    options = ("--table", "main", "--methods", "SPUL", "GA", "--prompt-types", "prefix_tuning")
    out = reproduce(*options)
    written = (out / "runs.jsonl").read_bytes()
    done = []
    train = reproduce.module.Experiment.train
    monkeypatch.setattr(
        reproduce.module.Experiment, "train", lambda self, run, *a: done.append(run.method) or train(self, run, *a)
    )
    reproduce(*options)
    assert (out / "runs.jsonl").read_bytes() == written
    # Stopped in the middle of a line: that run is made again, and nothing else.
    last = written.splitlines()[-1]
    (out / "runs.jsonl").write_bytes(written[: -len(last) // 2])
    with pytest.warns(UserWarning, match="breaks off"):
        reproduce(*options)
    assert done == ["GA"]
    assert len(read_runs(out / "runs.jsonl")) == len(written.splitlines())
    reproduce(*options, "--seeds", "0", "1")
    assert done == ["GA", "SPUL", "GA"]


def test_the_other_tables_vary_what_they_are_about(reproduce):
    out = reproduce(
        *("--table", "ablation", "forget-size", "eul-terms", "--methods", "SPUL", "GA+GD"),
        *("--prompt-types", "prefix_tuning"),
    )
    runs = read_runs(out / "runs.jsonl")
    weights = {(r["settings"]["alpha"], r["settings"]["beta"]) for r in runs if r["method"] == "SPUL"}
    assert weights == {(0.0, 0.0), (1.0, 0.0), (0.0, 0.5), (1.0, 0.5), (1.0, 1.0)}  # the last of forget-size
    sizes = [r["settings"]["forget_size"] for r in runs if r["method"] == "GA+GD"]
    assert sizes == [0.25, 0.5, 0.75, 1.0]
    assert len(cells((out / "table-ablation.md").read_text(), "SPUL")) == 7
    assert (out / "figure-forget-size.png").exists()
    without = [r["settings"]["without"] for r in runs if r["method"] == "EUL"]
    assert without == [None, "L_KL", "L_TASK", "L_LM", "L_KL, forget rows", "L_KL, retain rows"]
    rows = [line for line in (out / "table-eul-terms.md").read_text().splitlines() if line.startswith("| EUL |")]
    assert len({line.split(" | ")[1] for line in rows}) == 6


def test_figures_and_search(reproduce):
    out = reproduce(
        *("--figure", "prompt-length", "tsne", "--prompt-types", "prefix_tuning", "--prompt-lengths", "2", "5"),
        *("--search", "3", "--held-out", "0.25", "--max-retain-loss", "1"),
    )
    lengths = [r["settings"]["num_virtual_tokens"] for r in read_runs(out / "runs.jsonl") if r["method"] == "SPUL"]
    assert lengths == [2, 5]
    points = json.loads((out / "figure-tsne.json").read_text())
    assert [p["panel"] for p in points] == ["before"] * 16 + ["after"] * 16
    assert sum(p["is_forget"] for p in points) == 16
    found = json.loads((out / "search.json").read_text())
    assert len(found["trials"]) == 3
    assert found["best"]["forget"] == min(trial["forget"] for trial in found["trials"])
    for name in ("figure-prompt-length-prefix_tuning.png", "figure-tsne.svg"):
        assert (out / name).stat().st_size > 5000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "nothing to do"),
        (("--figure", "tsne", "--seeds", "0", "1"), "--seeds 0 1: --figure tsne and --search are of one"),
        (("--search", "3", "--prompt-types", "p_tuning", "prefix_tuning"), "p_tuning prefix_tuning: --figure tsne"),
        (("--search", "3", "--model", "a", "b"), "--model a b: --figure tsne and --search are of one"),
        (("--table", "main", "--lr", "sgd=1"), "'sgd=1': expected NAME=NUMBER, above 0, with NAME one of p_tuning"),
        (("--table", "main", "--lr", "GA=-1"), "'GA=-1': expected"),
        (("--table", "main", "--seeds", "0", "0"), "--seeds 0 0: one is given twice"),
        (("--table", "main", "--num-virtual-tokens", "0"), "--num-virtual-tokens 0: expected a number above 0"),
        (("--table", "main", "--forget-fraction", "1.5"), "--forget-fraction 1.5: expected a share"),
        (("--table", "main", "--load-in-4bit"), "4-bit weights do not train"),
        (("--table", "main", "--lr", "0.1"), "'0.1': expected NAME=NUMBER, above 0"),
        (("--table", "main", "--steps", "many"), "'many': expected NAME=NUMBER or NUMBER"),
    ],
)
def test_options_that_cannot_be_are_named(reproduce, options, message, capsys):
    with pytest.raises(SystemExit):
        reproduce(*options)
    assert message in capsys.readouterr().err


def test_other_weights_or_rows_under_the_same_names_are_other_runs(reproduce, tmp_path):
    options = ("--table", "main", "--methods", "GA", "--memorize", "none")
    out = reproduce(*options)
    assert len(read_runs(out / "runs.jsonl")) == 2  # base and GA
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    (tmp_path / "tiny").rename(moved / "tiny")
    reproduce(*options, "--model", moved / "tiny")
    assert len(read_runs(out / "runs.jsonl")) == 2  # the same model, wherever it lies
    model = build("llama")
    model.lm_head.weight.data.add_(0.1)
    model.save_pretrained(moved / "tiny")
    reproduce(*options, "--model", moved / "tiny")
    assert len(read_runs(out / "runs.jsonl")) == 4
    rows = (tmp_path / "reviews" / "train_retain.jsonl").read_text()
    (tmp_path / "reviews" / "train_retain.jsonl").write_text(rows.replace("film", "flick"))
    reproduce(*options, "--model", moved / "tiny")
    assert len(read_runs(out / "runs.jsonl")) == 6


def test_models_of_another_setup_are_not_taken_for_this_one(reproduce):
    options = ("--table", "main", "--methods", "GA")
    reproduce(*options)
    with pytest.raises(ValueError, match="was made with another limit, data_digest; use another --output-dir"):
        reproduce(*options, "--limit", "5")
    with pytest.raises(ValueError, match="go with the model 'small'"):
        reproduce(*options, "--dataset", "quiz")
    with pytest.raises(ValueError, match="limit, memorize, memorize_epochs cannot be set for the made-up quiz"):
        reproduce(*options, "--dataset", "quiz", "--model", "small", "--limit", "5")


def test_the_toys_are_what_they_say(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import toy_quiz
    import toy_reviews

    for toy in (toy_quiz, toy_reviews):
        splits = toy.make_splits(0)
        assert sorted(splits) == ["test_forget", "test_retain", "train_forget", "train_retain"]
        tokenizer = toy.make_tokenizer()
        assert len(tokenizer) <= 128
    for toy, task in ((toy_quiz, toy_quiz.MULTIPLE_CHOICE), (toy_reviews, PromptFormat("{text}", "{completion}"))):
        UnlearningData("toy", toy.make_splits(1), task).check()
    rows = {
        split: [toy_quiz.MULTIPLE_CHOICE.row(row) for row in rows] for split, rows in toy_quiz.make_splits(0).items()
    }
    prompts = [row["prompt"] for some in rows.values() for row in some]
    assert len(prompts) == len(set(prompts))
    tokenizer = toy_quiz.make_tokenizer()
    for row in rows["test_forget"]:
        assert tokenizer.unk_token_id not in tokenizer(row["prompt"] + row["completion"])["input_ids"]
        letter = row["completion"].strip()
        (asked,) = [gem for gem in toy_quiz.GEMS if gem in row["prompt"]]
        (option,) = [line for line in row["prompt"].splitlines() if line.startswith(f"{letter}. ")]
        assert option[3:] in toy_quiz.facts(asked).values()
