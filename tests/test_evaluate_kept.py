"""An evaluation that is interrupted and gone on with, and one that several processes share."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from typing import Any

import pytest
from conftest import run_script
from test_evaluate import measured
from test_suite import ATTACKS, learned, make, make_splits, questions
from test_trainer import make_collator, rows

import spul.evaluation.numbers as numbers
import spul.evaluation.suite as suite
from spul.evaluation.results import Evaluation


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    """Intervals have tests of their own."""
    monkeypatch.setattr(numbers, "NUM_RESAMPLES", 20)


# ---- a folder, and going on ----


MEASURES = ("utility", "relearning", "neighbours", "sampling")
OTHERS = {"neighbours": {"surname": rows("doe film", 5)}}


def counted(monkeypatch, stop_after: int | None = None) -> list[str]:
    """What is measured from now on, task by task; a task after so many raises."""
    done: list[str] = []
    really = suite.Suite.task

    def task(self, *args, **kwargs):
        made = really(self, *args, **kwargs)

        def run():
            if len(done) == stop_after:
                raise KeyboardInterrupt
            done.append(" ".join(made.produces[0]))
            return made.run()

        return dataclasses.replace(made, run=run)

    monkeypatch.setattr(suite.Suite, "task", task)
    return done


def test_an_interrupted_evaluation_goes_on_and_gives_what_one_without_a_break_gives(tmp_path, monkeypatch):
    model = make("prompt_tuning")
    whole = measured(model, *MEASURES, **OTHERS, output_dir=tmp_path / "whole")
    with monkeypatch.context() as patch:
        done = counted(patch, stop_after=9)
        with pytest.raises(KeyboardInterrupt):
            measured(model, *MEASURES, **OTHERS, output_dir=tmp_path / "broken")
        assert len(done) == 9
    path = tmp_path / "broken" / "progress-0.jsonl"
    kept = path.read_text()
    assert len(kept.splitlines()) == 9
    assert not (tmp_path / "broken" / "evaluation.json").exists()
    path.write_text(kept[:-20])  # killed while it wrote the ninth
    with monkeypatch.context() as patch:
        rest = counted(patch)
        found = measured(model, *MEASURES, **OTHERS, output_dir=tmp_path / "broken")
        assert rest[0] == done[8]
        assert len(rest) == len(set(done + rest)) - 8 == 13 - 8
    assert found.measurements == whole.measurements
    for name in ("evaluation.json", "measurements.jsonl", "settings.json"):
        assert (tmp_path / "broken" / name).read_text() == (tmp_path / "whole" / name).read_text()
    assert sorted(file.name for file in (tmp_path / "broken").iterdir()) == sorted(
        ["evaluation.json", "measurements.jsonl", "settings.json"]
    )
    with monkeypatch.context() as patch:
        assert counted(patch, stop_after=0) == []
        again = measured(make("prompt_tuning"), *MEASURES, **OTHERS, output_dir=tmp_path / "broken")
    assert again.measurements == whole.measurements
    assert Evaluation.load(tmp_path / "broken").settings == json.loads(json.dumps(whole.settings))


def test_what_two_processes_left_is_gone_on_with_but_for_a_task_cut_off_in_the_middle(tmp_path, monkeypatch):
    whole = measured(make("layers"), "relearning", "sampling", output_dir=tmp_path)
    (tmp_path / "evaluation.json").unlink()
    lines = (tmp_path / "measurements.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "measurements.jsonl").unlink()
    (tmp_path / "progress-0.jsonl").write_text("".join(lines[:2]) + lines[2][:30])  # relearning, of three
    (tmp_path / "progress-1.jsonl").write_text(lines[3])  # sampling, of two numbers of tries
    done = counted(monkeypatch)
    again = measured(make("layers"), "relearning", "sampling", output_dir=tmp_path)
    assert again.measurements == whole.measurements
    assert len(done) == 1 + 2


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"prompt_seed": 4}, "models"),
        ({"retrained": learned}, "models, names"),
        ({"splits": make_splits(test_forget=rows("doe", 6))}, "rows"),
        ({"splits": make_splits(test_forget=rows("doe", 7).select(range(6, -1, -1)))}, "rows"),
        ({"seed": 6}, "seed"),
        ({"attacks": dataclasses.replace(ATTACKS, num_rows=3)}, "attacks"),
        ({"attacks": dataclasses.replace(ATTACKS, inputs=None)}, "attacks"),
        ({"collator": make_collator(generic_completions=[" x"])}, "generic_completions"),
        ({"collator": make_collator(append_eos=True)}, "append_eos"),
        ({"unrelated_texts": ["good plot"]}, "unrelated_texts"),
        ({"questions": {"retain": questions("a")}}, "questions"),
        ({"max_new_tokens": 7}, "max_new_tokens"),
        ({"measures": ("sampling", "kl")}, "measures"),
    ],
)
def test_another_evaluation_in_the_same_folder_raises_and_says_what_differs(tmp_path, change, named):
    measured(make("prompt_tuning"), "sampling", output_dir=tmp_path)
    before = {file.name: file.read_text() for file in tmp_path.iterdir()}
    change = {name: value() if value is learned else value for name, value in change.items()}
    model, measures = make("prompt_tuning", change.pop("prompt_seed", 3)), change.pop("measures", ["sampling"])
    with pytest.raises(ValueError, match=rf"an evaluation with another {named}; give another output_dir"):
        measured(model, *measures, output_dir=tmp_path, **change)
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == before


# ---- several processes ----


def shared_out(folder: Any) -> Evaluation:
    """What one process and two are to agree on."""
    given = {"retrained": learned(0.1, 1), "output_dir": folder}
    return measured(make("prompt_tuning"), "kl", "relearning", "sampling", **given)


def test_two_processes_give_the_numbers_of_one_and_refuse_a_sharded_model(tmp_path):
    script = tmp_path / "evaluate.py"
    script.write_text(
        textwrap.dedent(
            """
            import sys
            sys.path.insert(0, sys.argv[1])
            import torch
            torch.set_num_threads(1)
            from accelerate import PartialState
            state = PartialState(cpu=True)
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard
            import test_evaluate_kept as kept
            from test_evaluate import evaluate_module as module

            kept.numbers.NUM_RESAMPLES = 20
            assert state.num_processes == 2
            sharded = fully_shard(kept.learned(), mesh=init_device_mesh("cpu", (2,)))
            try:
                kept.measured(sharded, "sampling")
            except ValueError as error:
                assert "model is sharded" in str(error), error
            else:
                raise AssertionError("a sharded model was evaluated")
            calls = []
            append = module.append_measurements
            module.append_measurements = lambda path, found: (calls.append(path.name), append(path, found))
            kept.shared_out(sys.argv[2])
            assert calls == [f"progress-{state.process_index}.jsonl"] * (5 - state.process_index), calls
            state.destroy_process_group()
            """
        )
    )
    run_script(script, tmp_path / "2", processes=2)
    assert len(shared_out(tmp_path / "1").measurements) == 16
    names = ["evaluation.json", "measurements.jsonl", "settings.json"]
    assert sorted(file.name for file in (tmp_path / "2").iterdir()) == names
    for name in names:
        assert (tmp_path / "1" / name).read_text() == (tmp_path / "2" / name).read_text(), name
