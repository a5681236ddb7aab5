"""The example of TOFU on a chat model: its format, and the page beside the stored lines."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from chats import TEMPLATES, chatty

from spul.data.formats import REFUSALS

ROOT = Path(__file__).parents[1]


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import evidence_tofu

    return evidence_tofu


@pytest.fixture
def tofu(example):
    from evidence import tofu

    return tofu


def test_a_question_stands_where_the_chat_template_puts_it(tofu):
    tokenizer = chatty(next(iter(TEMPLATES)))
    row = tofu.chat_format(tokenizer).row({"question": "who is {jane} ?", "answer": "a poet ."})
    turn = [{"role": "user", "content": "who is {jane} ?"}]
    assert row["prompt"] == tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    assert row["completion"] == "a poet ."


def read(name):
    text = (ROOT / "docs" / "data" / "evidence" / name).read_text()
    return list(map(json.loads, text.splitlines()))


def test_the_table_has_the_numbers_of_its_lines(example):
    page = (ROOT / "docs" / "results.md").read_text().split("## TOFU on SmolLM2")[1].split("\n## ")[0]
    runs = [*read("tofu-smollm2-400-rows.jsonl"), *read("tofu-smollm2-400-rows-mean.jsonl")]
    runs = [one for one in runs if one["system"] != "gate and refusal"]
    runs += [one | {"system": f"gate of {one['recall']}"} for one in read("tofu-smollm2-gates.jsonl")]
    first = {(one["system"], one["seed"], one["forget_set"]): one for one in reversed(runs)}
    lines = list(first.values())
    order = [3, 5, 1, 2, 4, 7, 8, 6, 10, 11, 12]  # of the page's columns in the summary's
    shown = {"base": "base", "retrained": "retrained", "**SPUL": "SPUL, prefix, mean forget loss"}
    shown |= {"the same": "SPUL, prefix with fitted keys"}
    shown |= {"SPUL behind a text gate of recall 99 %": "SPUL behind a gate"}
    shown |= {"text gate of recall 99 % and fixed refusal": "gate of 0.99", "**the same": "gate of 0.95"}
    shown["SPUL's loss on LoRA (IDK)"] = "IDK, LoRA"
    for forget_set in ("forget01", "forget05"):
        part = page.split(f"| {forget_set} |")[1].split("\n\n")[0].splitlines()[2:]
        table = {name.split(",")[0].strip(): values for _, name, *values, _ in (line.split("|") for line in part)}
        of_set = [line for line in lines if line["forget_set"] == forget_set]
        by_system = {system: [] for system in shown.values()}
        for seed in sorted({line["seed"] for line in of_set}):
            for line in example.summary([one for one in of_set if one["seed"] == seed]).splitlines()[2:]:
                system, *cells = [cell.strip() for cell in line.split("|")[1:-1]]
                by_system[system].append([float(cells[i - 1] or "nan") for i in order])
        for row, system in shown.items():
            seeds, *values = (value.split("(")[0].strip() for value in table[row])
            assert int(seeds) == len(by_system[system])
            known = np.ma.masked_invalid(by_system[system])  # the retrained model of forget05 has one seed
            expected = known.mean(axis=0).filled(np.nan)
            assert [float(value or "nan") for value in values] == pytest.approx(expected, abs=0.011, nan_ok=True), row


def test_answers_that_are_trained_refusals_count_as_declined(example):
    line = {"system": "x", "answers": {"forget": [REFUSALS[0].strip(), "no"], "retain": ["no"]}}
    line["answers_rouge"] = {"forget": [0.0, 0.5], "retain": [1.0]}
    cells = [cell.strip() for cell in example.summary([line]).splitlines()[2].split("|")[1:-1]]
    assert [cells[0], cells[3], cells[5], cells[7], cells[8]] == ["x", "0.25", "0.50", "1.00", "0.00"]


def test_models_that_learned_other_rows_are_not_taken(tofu, tmp_path):
    names = {"forget_set": "forget01", "retain_rows": 100, "memorize_lr": 1e-3, "memorize_epochs": 12, "batch_size": 8}
    made = tofu.Tofu.__new__(tofu.Tofu)
    made.args = SimpleNamespace(**names, model="here/model", output_dir=tmp_path, seed=1)
    folder = tmp_path / "base-1"
    folder.mkdir()
    (folder / "memorized.json").write_text(json.dumps({"learned_from": made.learned_from}))
    assert made.folder("base") == folder
    made.args.forget_set = "forget05"
    with pytest.raises(ValueError, match=r"forget01.*forget05.*output-dir"):
        made.folder("base")
