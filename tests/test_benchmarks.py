"""The benchmarks compare like with like, and run."""

import contextlib
import dataclasses
import io
import json
import re
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from helpers import build, make_collator, make_tokenizer
from transformers import LlamaConfig

import spul
from spul import forget_retain_dataset
from spul.models.noise import zero_dropout

FOLDER = Path(__file__).parents[1] / "examples" / "benchmarks"


@pytest.fixture(autouse=True)
def on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))


def run(monkeypatch, script, *options):
    """Run a script in this process."""
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", [str(script), *map(str, options)])
        runpy.run_path(str(FOLDER / script), run_name="__main__")


@pytest.fixture
def in_this_process(monkeypatch):
    """Measurements of memory are made here, not in a process for each: they need no true values."""
    import common

    def again(script, arguments, **environment):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            run(monkeypatch, script, *arguments)
        return json.loads(printed.getvalue().splitlines()[-1])

    monkeypatch.setattr(common, "in_fresh_process", again)


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("prompt", ["prompt-tuning", "p-tuning"])
def test_spul_and_the_plain_algorithm_take_the_same_steps(family, prompt):
    import common
    import steps

    shape = common.Shape(batch_size=6, max_tokens=20, response_tokens=3, forget_rows=2)
    losses = {}
    for name in ("spul", "plain", "spul, live reference", "spul, concatenated", "spul, one pass", "spul, two passes"):
        base = build(family)
        zero_dropout(base)
        torch.manual_seed(1)
        step = steps.STEPS[name](base, common.prompt_config(prompt, 4), shape)
        losses[name] = [step() for _ in range(3)]
    assert losses["spul"] == pytest.approx(losses["plain"], rel=1e-4)
    assert losses["spul"] == pytest.approx(losses["spul, live reference"], rel=1e-5)
    assert losses["spul"] == pytest.approx(losses["spul, concatenated"], rel=1e-4)
    assert losses["spul"] == pytest.approx(losses["spul, one pass"], rel=1e-4)
    assert losses["spul"] == losses["spul, two passes"]
    assert losses["spul"][0] != losses["spul"][2]


@pytest.mark.parametrize("vocab_size", [200, 24000, 32000, 50272, 64000])
@pytest.mark.parametrize("name", ["sst2", "long"])
def test_a_batch_has_the_response_tokens_of_its_shape(name, vocab_size):
    import common

    shape = common.SHAPES[name]
    batch = common.make_collator(shape, vocab_size)(common.make_rows(shape, vocab_size))
    assert batch["input_ids"].shape == (shape.batch_size, shape.max_tokens)
    assert set((batch["labels"] != -100).sum(dim=1).tolist()) == {shape.response_tokens}
    assert set(batch["input_ids"][batch["attention_mask"] == 0].tolist()) <= {1}
    assert batch["input_ids"][batch["attention_mask"] == 1].min() >= 4


def test_the_floor_sends_a_gradient_to_the_embeddings():
    import common
    import steps

    base = build("llama")
    step = steps.floor_step(base, None, common.Shape(4, 20, 1, 1))
    assert (step().abs().sum(dim=-1) > 0).sum() > 20  # of the 4 rows' tokens
    assert all(parameter.grad is None for parameter in base.parameters())


@pytest.mark.parametrize(
    ("script", "options", "expected"),
    [
        ("step_time.py", ["--shapes", "sst2", "--steps", "spul", "plain", "floor"], {"spul", "plain", "floor"}),
        ("step_time.py", ["--shapes", "sst2", "--steps", "spul", "spul, one pass"], {"spul", "spul, one pass"}),
        ("step_time.py", ["--shapes", "sst2", "--steps", "spul, at the message"], {"spul, at the message"}),
        ("step_time.py", ["--shapes", "sst2", "--prompt", "prefix-tuning"], {"spul", "plain", "floor"}),
        ("prompt_length.py", ["--lengths", "5", "10", "--steps", "spul"], {5, 10}),
        ("inference.py", ["--new-tokens", "2"], {"base", "PEFT", "PEFT, last logits", "spul", "spul, at the message"}),
        ("row_prompts.py", ["--new-tokens", "2"], {"one prompt", "four prompts", "four lengths", "three and none"}),
        ("checkpointing.py", [], {"spul", "spul, concatenated", "floor"}),
        (
            "checkpointing.py",
            ["--steps", "spul, two passes", "spul, one pass"],
            {"spul, two passes", "spul, one pass"},
        ),
        ("checkpointing.py", ["--prompt", "prefix-tuning", "--reentrant"], {"spul", "floor"}),
        ("reference.py", ["--rows", "40"], {"hidden states (spul)", "logits"}),
        ("prepare_rows.py", ["--rows", "2000", "--tasks", "join", "split", "trainer"], {"spul", "plain"}),
    ],
)
@pytest.mark.usefixtures("in_this_process")
def test_the_scripts_run_and_write_what_they_measured(script, options, expected, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out.json"
    run(monkeypatch, script, "--model", "tiny", "--device", "cpu", "--rounds", 1, "--json", out, *options)
    written = json.loads(out.read_text())
    keys = ("step", "model", "reference", "rows")
    found = {next((record[key] for key in keys if key in record), None) for record in written["records"]}
    found |= {record["p"] for record in written["records"] if "p" in record}
    assert expected <= found
    assert written["where"]["model"] == "tiny"
    assert "| " in capsys.readouterr().out


@pytest.mark.usefixtures("in_this_process")
def test_a_step_and_its_estimate_hold_about_the_same_tensors(tmp_path, monkeypatch):
    out = tmp_path / "out.json"
    options = ("--models", "tiny", "--shapes", "sst2", "--gradient-checkpointing", "--json", out)
    run(monkeypatch, "live_tensors.py", *options)
    found = {record["step"]: record["peak_bytes"] for record in json.loads(out.read_text())["records"]}
    assert found["estimate"] == pytest.approx(found["spul"], rel=0.15)
    assert found["floor"] < found["spul"] < found["spul, concatenated"]


@pytest.mark.usefixtures("in_this_process")
def test_rows_are_scored_by_each_measure_in_the_type_that_is_reported(tmp_path, monkeypatch):
    import common

    out = tmp_path / "out.json"
    built, really = [], common.build_model
    monkeypatch.setattr(common, "build_model", lambda *args: built.append(args[-1]) or really(*args))
    run(monkeypatch, "evaluate_rows.py", "--rows", 50, "--dtype", "bfloat16", "--json", out)
    assert set(built) == {torch.bfloat16}
    records = json.loads(out.read_text())["records"]
    assert [record["measure"] for record in records] == ["answers", "kl", "membership"]
    assert all(record["seconds"] > 0 and record["rows"] == 50 for record in records)


def test_imports_are_timed_in_processes_of_their_own(monkeypatch):
    import import_time

    assert 0.2 < import_time.seconds("import time; time.sleep(0.2)") < 20
    with pytest.raises(import_time.subprocess.CalledProcessError):
        import_time.seconds("import spul; spul.no_such_name")
    names = [
        part.split(".")[1] for text in import_time.IMPORTS.values() for part in text.split(";") if " spul." in part
    ]
    assert names
    for name in names:
        assert hasattr(spul, name)


def test_two_processes_tell_the_tokens_that_both_train_on():
    import two_processes

    found = two_processes.measured(SimpleNamespace(model="tiny", shape="sst2", steps=3), 2)
    tokens = found["seconds"] * found["tokens_per_second"]  # of the one step that is counted
    assert 0.7 < tokens / (2 * 32 * 46) <= 1


@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("two_processes.py", ("--dtype", "bfloat16")),
        ("two_processes.py", ("--device", "cuda")),
        ("length_grouping.py", ("--rows", "r", "--tokenizer", "t", "--dtype", "bfloat16")),
        ("length_grouping.py", ("--rows", "r", "--tokenizer", "t", "--device", "cuda")),
        ("evaluate_rows.py", ("--rounds", "3")),
    ],
)
def test_options_that_a_script_would_report_and_not_follow_are_refused(script, options, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, script, *options)
    assert re.search(
        r"error: --(device|rounds).*: (measured in float32|each measure runs once)", capsys.readouterr().err
    )


def test_tokens_per_second_are_those_of_the_rows_whatever_their_batches(tmp_path, monkeypatch):
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    rows, out = tmp_path / "rows.tsv", tmp_path / "out.json"
    rows.write_text("sentence\tlabel\n" + "".join(f"{'good ' * (1 + i % 9)}\t1\n" for i in range(40)))
    options = ("--model", "tiny", "--tokenizer", tmp_path / "tokenizer", "--rows", rows, "--batch-size", 4)
    run(monkeypatch, "length_grouping.py", *options, "--steps", 10, "--num-virtual-tokens", 4, "--json", out)
    written = json.loads(out.read_text())
    random, grouped = written["records"]
    for one in (random, grouped):
        tokens = one["all"][0]["seconds"] * one["tokens_per_second"]
        assert tokens == pytest.approx(8 / 10 * 40 * written["where"]["tokens"], rel=0.1)  # two steps are not counted
    assert 0 <= grouped["padding"] < random["padding"]
    assert 0 <= grouped["padding_of_file"] < random["padding_of_file"]


def test_merged_attention_is_the_copied_one(tmp_path, monkeypatch):
    import common
    import merged_attention

    given = merged_attention.inputs(common.Shape(4, 11, 1, 1), 5, torch.float64)
    tensors = [given["query"], given["key"], given["value"], *given["prompt"]]
    found, expected = (call(**given) for call in (merged_attention.merged, merged_attention.copied))
    torch.testing.assert_close(found, expected)
    weights = torch.randn(found.shape, dtype=found.dtype)
    for one, other in zip(*(torch.autograd.grad(out, tensors, weights) for out in (found, expected)), strict=True):
        torch.testing.assert_close(one, other)
    out = tmp_path / "out.json"
    options = ("--shapes", "sst2", "--num-virtual-tokens", 5, "--rounds", 1, "--device", "cpu", "--json", out)
    run(monkeypatch, "merged_attention.py", *options)
    assert {"own tokens", "copied", "merged", "merged / copied"} <= set(json.loads(out.read_text())["records"][0])


def test_distances_of_starts_are_those_of_their_prompts(tmp_path, monkeypatch):
    build("llama").save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    rows, out = tmp_path / "rows.tsv", tmp_path / "out.json"
    rows.write_text("sentence\tlabel\ngood film\t1\na bad plot\t0\na film\t1\n")
    options = ("--base", tmp_path / "base", "--rows", rows, "--num-rows", 2, "--num-virtual-tokens", 4, "--json", out)
    starts = ("near", "random", "instruction", "peft")
    run(monkeypatch, "starts.py", *options, "--kinds", "prompt tuning", "prefix tuning", "--starts", *starts)
    found = {
        (one["kind"], one["start"]): one["KL(prompted || base)"] for one in json.loads(out.read_text())["records"]
    }
    assert len(found) == 8
    # An instruction is the same prompt in both kinds.
    assert found["prompt tuning", "instruction"] == pytest.approx(found["prefix tuning", "instruction"], rel=1e-3)
    run(monkeypatch, "starts.py", *options, "--kinds", "P-tuning", "--starts", "near", "--positions", "message")
    (at_message,) = json.loads(out.read_text())["records"]
    assert (at_message["kind"], at_message["position"]) == ("P-tuning", "message")
    found["message"] = at_message["KL(prompted || base)"]
    assert all(distance > 0 for distance in found.values())


def test_rows_are_prepared_alike_by_spul_and_plainly(tmp_path):
    import prepare_rows

    args = SimpleNamespace(model="tiny", device="cpu", dtype=None)
    tasks = prepare_rows.make_tasks(args, 2_000, str(tmp_path))
    results = {task: [call() for call in variants.values()] for task, variants in tasks.items()}
    spul, plain = results["join"]
    assert spul.to_dict() == plain.to_dict()
    for spul, plain in zip(*results["split"], strict=True):
        assert spul.to_dict() == plain.to_dict()
    assert len(results["split"][0][0]) == 100
    assert results["trainer"][0] == results["trainer"][1]


def test_a_fresh_process_gets_arguments_and_environment_and_returns_its_last_line(tmp_path):
    import common

    script = tmp_path / "script.py"
    script.write_text("import json, os, sys\nprint('first')\nprint(json.dumps([sys.argv[1:], os.environ['MINE']]))\n")
    assert common.in_fresh_process(str(script), ["a", "b"], MINE="c") == [["a", "b"], "c"]
    script.write_text("raise SystemExit('not today')")
    with pytest.raises(RuntimeError, match=r"script\.py a failed:\nnot today"):
        common.in_fresh_process(str(script), ["a"])


def test_a_4_bit_base_of_random_weights_trains():
    pytest.importorskip("bitsandbytes")
    import common
    import steps

    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    config = LlamaConfig(**shape, vocab_size=200)
    base = common.build_nf4(config, "cpu")
    assert {type(base.model.layers[0].mlp.up_proj).__name__, type(base.lm_head).__name__} == {"Linear4bit", "Linear"}
    step = steps.spul_step(base, common.prompt_config("p-tuning", 4), common.Shape(4, 20, 1, 1))
    losses = [step() for _ in range(2)]
    assert losses[0] != losses[1]
    assert all(torch.isfinite(torch.tensor(losses)))


# ---- time to forget ----


@pytest.fixture
def tiny_task(monkeypatch):
    """A random model and a few rows in the quick start's place."""
    import time_to_forget

    def task(args, seed):
        made.append(seed)
        data = forget_retain_dataset(answered("jane", 6), answered("film", 10))
        return time_to_forget.Task(
            lambda: build("llama"), time_to_forget.held_out(args, data, seed), lambda tokens: make_collator(), {}
        )

    def answered(name, num):
        return Dataset.from_list([{"prompt": f"review {name} {i} :", "completion": " positive"} for i in range(num)])

    made: list[int] = []
    monkeypatch.setitem(time_to_forget.TASKS, "quickstart", task)
    return SimpleNamespace(module=time_to_forget, made=made)


def times(monkeypatch, task, output, *options):
    with monkeypatch.context() as patch:
        given = ["--max-steps", "3", "--every", "2", "--held-out", "0.4", "--prompt-types", "prefix_tuning"]
        patch.setattr(sys, "argv", ["time_to_forget.py", "--output", str(output), *given, *options])
        task.module.main()
    return [json.loads(line) for line in output.read_text().splitlines()]


def test_time_to_forget_is_measured_for_each_recipe_and_seed_once(monkeypatch, tiny_task, tmp_path, capsys):
    output = tmp_path / "runs.jsonl"
    some = ("--seeds", "0", "1", "--recipes", "published", "defaults")
    runs = times(monkeypatch, tiny_task, output, *some)
    assert [(run["run"]["seed"], run["run"]["recipe"]) for run in runs] == [
        (0, "published"),
        (0, "defaults"),
        (1, "published"),
        (1, "defaults"),
    ]
    assert tiny_task.made == [0, 1]
    for run in runs:
        assert run["base"]["step"] == 0
        # A random model answers nothing right, so that nothing is left to forget at the first scoring.
        assert (run["steps"], run["best"]["forget_accuracy"]) == (2, 0)
        assert run["rows"] == 2 * run["run"]["settings"]["batch_size"]
        assert run["seconds"] == pytest.approx(2 * run["seconds_per_step"])
        assert [score[0] for score in run["scores"]] == [2]
    assert "quickstart, prefix_tuning" in capsys.readouterr().out
    text = output.read_text()
    assert times(monkeypatch, tiny_task, output, *some) == runs  # known, so that nothing runs again
    assert tiny_task.made == [0, 1]
    output.write_text(text[:-9])  # cut off while it was written
    again = times(monkeypatch, tiny_task, output, *some)
    assert tiny_task.made == [0, 1, 1]
    assert [run["run"] for run in again] == [run["run"] for run in runs]


def test_a_run_that_does_not_forget_says_so(monkeypatch, tiny_task, tmp_path, capsys):
    monkeypatch.setattr(tiny_task.module.StopWhenForgotten, "is_met", False)
    (run,) = times(monkeypatch, tiny_task, tmp_path / "runs.jsonl", "--seeds", "0", "--recipes", "defaults")
    assert (run["steps"], run["rows"], run["seconds"]) == (None, None, None)
    assert [score[0] for score in run["scores"]] == [2, 3]
    assert "0 of 1" in capsys.readouterr().out


@pytest.mark.parametrize("task", ["quickstart", "sst2"])
@pytest.mark.parametrize("prompt_type", ["prefix_tuning", "prompt_tuning", "p_tuning"])
def test_a_lever_alone_is_the_published_recipe_with_that_setting_of_the_defaults(task, prompt_type):
    import recipes as module

    found = module.recipes(task, prompt_type)
    published, defaults = found["published"], found["defaults"]
    for name, settings in module.LEVERS.items():
        assert all(hasattr(published, setting) for setting in settings)
        differs = any(getattr(published, setting) != getattr(defaults, setting) for setting in settings)
        assert (f"{name} alone" in found) == differs
        if differs:
            alone = found[f"{name} alone"]
            for field in dataclasses.fields(alone):
                source = defaults if field.name in settings else published
                assert getattr(alone, field.name) == getattr(source, field.name)
    levers = {setting for settings in module.LEVERS.values() for setting in settings}
    assert levers == {field.name for field in dataclasses.fields(published)}
