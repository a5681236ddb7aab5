"""The example that evaluates a saved adapter, and the rows that it finds beside the four splits."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from datasets import Dataset
from helpers import build, make_tokenizer
from known_data import write_jsonl
from small_evaluations import make_model

from spul.data import SENTIMENT
from spul.evaluation.results import Evaluation

EXAMPLES = Path(__file__).parents[1] / "examples"
NUM_RETAIN = 24


@pytest.fixture
def example(monkeypatch, few_resamples) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    sys.modules.pop("evaluate", None)  # a library has that name, too
    import evaluation_rows

    return evaluation_rows


def question(name: str, i: int, asked: str = "Who wrote") -> dict[str, str]:
    return {"question": f"{asked} {name} {i}?", "answer": f"{name} is by author {i}."}


def perturbed(name: str, i: int) -> dict[str, Any]:
    """The same asked in other words, with other answers."""
    other = {"paraphrased_question": f"Who wrote the {name} {i}?", "paraphrased_answer": f"Author {i} wrote {name}."}
    return question(name, i) | other | {"perturbed_answer": [f"{name} is by author {i + 1}.", "It is by nobody."]}


@pytest.fixture
def tofu(tmp_path) -> Path:
    """TOFU's files in small: of the 24 retain questions six are asked again."""
    folder = tmp_path / "tofu"
    folder.mkdir()
    sets = {
        "forget05": [question("film", i) for i in range(8)],
        "retain95": [question("plot", i) for i in range(NUM_RETAIN)],
        "forget05_perturbed": [perturbed("film", i) for i in range(8)],
        "retain_perturbed": [perturbed("plot", i) for i in range(6)],
    }
    for name in ("real_authors", "world_facts"):
        rows = [perturbed(name, i) for i in range(7)]
        sets[f"{name}_perturbed"] = [{k: v for k, v in row.items() if "paraphrased" not in k} for row in rows]
    for name, rows in sets.items():
        write_jsonl(folder / f"{name}.json", rows)
    return folder


def options(example: ModuleType, *given: object, **more: Any) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    example.add_options(parser)
    args = parser.parse_args([str(one) for one in given])
    return argparse.Namespace(**vars(args), **more)


def of_tofu(example: ModuleType, folder: Path, **setup: Any) -> Any:
    shared = {"dataset": "tofu", "model": "none", "data_dir": str(folder), "forget_set": "forget05"}
    return example.Experiment(sys.modules["paper.runs"].Setup(**shared | setup), folder / "models")


class Reviews:
    """An experiment on made-up reviews."""

    def __init__(self) -> None:
        self.setup = argparse.Namespace(dataset="mine", seed=0)
        self.data = argparse.Namespace(format=SENTIMENT)
        texts = ["john doe sings", "ann doe sings songs", "the doe sings again", "songs by max roe", "a storm film"]
        self.rows = {
            "train_forget": reviews("jane doe made a storm film", "a storm by jane doe"),
            "test_retain": reviews(*texts, "jane doe again", "gardens", "gardens and gates"),
        }


def reviews(*texts: str) -> Dataset:
    return SENTIMENT.apply(Dataset.from_list([{"text": text, "label_text": "positive"} for text in texts]))


# ---- rows ----


def test_what_a_limit_left_out_of_tofu_is_unseen_and_nothing_else_is(example, tofu):
    args = options(example)
    experiment = of_tofu(example, tofu, limit=10)
    unseen = example.unseen_rows(args, experiment)
    learned = {*experiment.rows["train_retain"]["completion"], *experiment.rows["train_forget"]["completion"]}
    assert len(unseen) == 8  # as many as forget rows
    assert len(experiment.rows["train_retain"]) == 10
    assert not learned & set(unseen["completion"])
    assert set(unseen["completion"]) < {f" plot is by author {i}." for i in range(NUM_RETAIN)}
    # what is tested on is learned first, so none of it is unseen
    assert not {f" plot is by author {i}." for i in range(6)} & set(unseen["completion"])
    assert set(unseen.column_names) == {"prompt", "completion", "question"}
    few = example.unseen_rows(args, of_tofu(example, tofu, limit=NUM_RETAIN - 3))
    assert len(few) == 3


@pytest.mark.parametrize("setup", [{}, {"limit": NUM_RETAIN}, {"limit": 10, "memorize": "none"}])
def test_rows_that_some_model_may_have_learned_are_not_unseen(example, tofu, setup):
    assert example.unseen_rows(options(example), of_tofu(example, tofu, **setup)) is None


def test_unseen_rows_of_a_file_are_in_the_format_of_the_data_or_in_prompts_already(example, tmp_path):
    (tmp_path / "raw.csv").write_text("text,label_text\ngood plot,positive\n")
    write_jsonl(tmp_path / "done.jsonl", [{"prompt": "a good plot :", "completion": " positive", "text": "good plot"}])
    raw = example.unseen_rows(options(example, "--unseen", tmp_path / "raw.csv"), Reviews())
    assert raw.to_list() == [SENTIMENT.row({"text": "good plot", "label_text": "positive"})]
    done = example.unseen_rows(options(example, "--unseen", tmp_path / "done.jsonl"), Reviews())
    assert done[0]["prompt"] == "a good plot :"


def test_neighbors_are_of_the_topic_the_surname_and_the_cluster(example):
    found = example.neighbors(options(example, "--names", "Jane Doe", "--clusters", 3), Reviews())
    assert list(found) == ["same topic", "same surname", "same cluster"]
    assert len(found["same topic"]) == 2
    assert sorted(found["same surname"]["text"]) == ["ann doe sings songs", "john doe sings", "the doe sings again"]
    assert "a storm film" in found["same cluster"]["text"]
    assert 0 < len(found["same cluster"]) < 8
    few = example.neighbors(options(example, "--names", "Jane Doe", "--attack-rows", 1), Reviews())
    assert {name: len(rows) for name, rows in few.items()} == {"same topic": 1, "same surname": 1}
    assert list(example.neighbors(options(example), Reviews())) == ["same topic"]


def test_names_that_leave_nobody_else_are_an_error_if_given_and_a_note_if_known(example, monkeypatch, capsys):
    with pytest.raises(ValueError, match="names somebody else"):
        example.neighbors(options(example, "--names", "Wilbur Nobody"), Reviews())
    monkeypatch.setitem(example.KNOWN_NAMES, "mine", ("Wilbur Nobody",))
    assert list(example.neighbors(options(example), Reviews())) == ["same topic"]
    assert "no neighbors, same surname" in capsys.readouterr().out
    monkeypatch.setitem(example.KNOWN_NAMES, "mine", ("Jane Doe",))
    assert len(example.neighbors(options(example), Reviews())["same surname"]) == 3


def test_tofus_questions_are_of_the_forget_set_and_not_more_than_are_attacked(example, tofu):
    about = {"dataset": "tofu", "forget_set": "forget05", "data_dir": str(tofu)}
    found = example.perturbed_questions(options(example, "--attack-rows", 7, **about))
    assert {name: len(rows) for name, rows in found.items()} == {
        **{"forget": 7, "retain": 6},
        **{"real_authors": 7, "world_facts": 7},
    }
    assert all(text.startswith("Who wrote film") for text in found["forget"]["question"])
    assert example.perturbed_questions(options(example, **about | {"dataset": "sst2"})) == {}


def test_the_wording_of_a_file_stands_in_for_the_known_one(example, tmp_path):
    known = example.attack_settings(options(example, dataset="reviews"), SENTIMENT)
    assert (known.wording, known.names, known.document_words) == (example.WORDINGS["text"], (), (300,))
    path = tmp_path / "wording.json"
    path.write_text(json.dumps({"### Sentiment:": "### Mood:"}))
    args = options(example, "--wording", path, "--turns", 2, 9, "--gradient-norm", dataset="reviews")
    how = example.attack_settings(args, SENTIMENT, relearn_lr=0.3)
    assert (how.wording, how.turns, how.gradient_norm) == ({"### Sentiment:": "### Mood:"}, (2, 9), True)
    assert how.relearn_lr == 0.3
    for given, names in (((), example.KNOWN_NAMES["sst2"]), (("--names", "Jane Doe"), ["Jane Doe"])):
        args.names = options(example, *given).names
        args.dataset = "sst2"
        assert example.attack_settings(args, SENTIMENT).names == tuple(names)
    path.write_text('["### Mood:"]')
    with pytest.raises(ValueError, match=r"expected \{"):
        example.attack_settings(args, SENTIMENT)


def test_options_and_files_of_other_content_are_other_evaluations(example, tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("a text")
    given = [[], ["--names", "Jane Doe"], ["--clusters", 3], ["--turns", 2], ["--gradient-norm"]]
    given += [[option, path] for option in ("--unseen", "--wording", "--unrelated-texts")]
    known = [json.dumps(example.identity(options(example, *some))) for some in given]
    assert len(set(known)) == len(known)
    path.write_text("another text")
    assert json.dumps(example.identity(options(example, *given[-1]))) not in known


def test_rows_of_no_common_topic_are_no_neighbors(example, capsys):
    experiment = Reviews()
    experiment.rows["test_retain"] = reviews("gardens", "gates")
    assert example.neighbors(options(example), experiment) == {}
    assert "no neighbors, same topic: num=1, but only 0 of 2 candidates" in capsys.readouterr().out


# ---- the command ----


def test_a_saved_adapter_gets_every_measure_on_tofu(example, tofu, tmp_path, monkeypatch):
    for name, model in (("base", make_model("prompt_tuning").get_base_model()), ("other", build("llama"))):
        model.save_pretrained(tmp_path / name)
        make_tokenizer().save_pretrained(tmp_path / name)
    make_model("prompt_tuning").save_pretrained(str(tmp_path / "adapter"))
    (tmp_path / "texts.txt").write_text("good film\nbad plot\n")
    import evaluate

    command = ["evaluate.py", "--model", tmp_path / "base", "--adapter", tmp_path / "adapter", "--dataset", "tofu"]
    command += ["--retrained", tmp_path / "other", "--reference", tmp_path / "other", "--data-dir", tofu]
    command += ["--forget-set", "forget05", "--limit", 10, "--limit-score", 4, "--attack-rows", 3, "--gradient-norm"]
    command += ["--unrelated-texts", tmp_path / "texts.txt", "--names", "a plot", "--output-dir", tmp_path / "out"]
    command += ["--measures", "membership", "neighbors", "unrelated text", "questions"]
    monkeypatch.setattr(sys, "argv", list(map(str, command)))
    evaluate.main()
    found = Evaluation.load(tmp_path / "out")
    assert found.skipped == {}
    assert found.models == ["unlearned", "detached", "retrained"]
    assert {one.name for one in found.metrics} >= {"model_utility", "forget_quality", "perplexity"}
    attacks = [one for one in found.measurements if one.measure == "membership" and one.rows == "unseen"]
    assert attacks[0].num_rows == 8
    assert {"reference", "gradient_norm"} <= set(attacks[0].per_row)
    assert [one.rows for one in found.measurements if one.measure == "neighbors"][::3] == [
        "same topic",
        "same surname",
    ]
    assert (tmp_path / "out" / "report.html").exists()
