"""examples/position.py: both positions are trained and scored alike, and what is stored is not made again."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from datasets import Dataset
from helpers import arguments, make_tokenizer
from small_evaluations import learned

from spul import SpulConfig
from spul.data.formats import PromptFormat

FOLDER = Path(__file__).parents[1] / "examples"


@pytest.fixture
def position(monkeypatch, tmp_path):
    """The script, on a tiny model and a few rows in place of SST-2."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import position as script

    task = PromptFormat("text : {text} .", completion=" {label_text}", generic_completions=(" neutral",))
    labels = (" positive", " negative")
    sides = {
        side: task.apply(
            Dataset.from_list([{"text": f"{side} {i} film", "label_text": labels[i % 2].strip()} for i in range(9)])
        )
        for side in ("forget", "retain")
    }
    experiment = SimpleNamespace(
        setup=SimpleNamespace(max_length=96, seed=1),
        data=SimpleNamespace(format=task),
        tokenizer=make_tokenizer(),
        batch_size=8,
        digest="ab12",
        load=lambda name: learned(),
        training_arguments=lambda **given: arguments(tmp_path / "trainer", **given),
    )
    monkeypatch.setattr(script, "experiment_of", lambda args, seed: experiment)
    monkeypatch.setattr(script, "splits_of", lambda args, experiment: (sides, sides))
    script.experiment = experiment
    return script


def test_both_positions_are_trained_scored_and_kept(position, tmp_path, monkeypatch, capsys):
    options = ["--seeds", "1", "--steps", "1", "--rows", "3", "--turns", "1", "2", "--num-virtual-tokens", "3"]
    options += ["--data-dir", "-", "--model", "-", "--output-dir", str(tmp_path / "out"), "--train-turns", "1"]
    monkeypatch.setattr(sys, "argv", ["position.py", *options])
    position.main()
    records = [json.loads(line) for line in (tmp_path / "out" / "scores.jsonl").read_text().splitlines()]
    by_position = {name: [r for r in records if r["position"] == name] for name in ("none", "start", "message")}
    assert [len(some) for some in by_position.values()] == [14] * 3
    assert {r["around"] for r in records} > {"as asked", "1 turns before", "2 turns before", "a text after"}
    folders = (tmp_path / "out" / "prompts").iterdir()
    found = {SpulConfig.load(folder / "spul_config.json").prompt_position for folder in folders}
    assert found == {"start", "message"}
    table = capsys.readouterr().out.partition("accuracy (generic answers)")[2]
    assert "forget, as asked" in table
    monkeypatch.setattr(position, "trained", None)  # nothing is made again
    position.main()
    assert capsys.readouterr().out.partition("accuracy (generic answers)")[2] == table
    position.experiment.digest = "cd34"  # another model or other data: nothing of it is there
    with pytest.raises(TypeError, match="not callable"):
        position.main()
