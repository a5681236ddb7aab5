"""`--rewritten` of `spul train` and `spul combine`: what is trained on, what the record says, what is refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from command_files import parsed, write_base, write_prompt, write_rows
from datasets import Dataset
from helpers import GENERIC, make_collator, rows
from safetensors.torch import load_file

from spul import SoftPromptUnlearner, forget_retain_dataset
from spul.commands import combine, train
from spul.commands.rewriting import rewritten_rows, ways_of
from spul.data.dataset import hold_out
from spul.data.prompt_files import read_prompts
from spul.records import is_summary_of, make_digest_key
from spul.records.spul_config import read_spul_config
from spul.training import augmented, rewritings

SHORT = {"max_steps": 2, "num_virtual_tokens": 4, "use_cpu": "true", "disable_tqdm": "true", "save_strategy": "no"}
SETS = {"forget": ("jane", 10), "retain": ("film", 18), "test_forget": ("doe", 3), "test_retain": ("good", 4)}


def texts(name, num):
    """Rows whose text stands between a cue before and one after."""
    some = [f"the film {i} that we saw about {name}" for i in range(num)]
    return [{"text": text, "prompt": f"text: {text}\nsentiment:", "completion": " good"} for text in some]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    sets = {name: write_rows(folder / f"{name}.jsonl", rows(*which)) for name, which in SETS.items()}
    base = write_base(folder / "base")
    config = folder / "base" / "config.json"  # room for asides, which are letters to this tokenizer
    config.write_text(json.dumps({**json.loads(config.read_text()), "max_position_embeddings": 1024}))
    return {"model": base, **sets}


@pytest.fixture
def runs(monkeypatch):
    """The trainer and the test rows of each run."""
    found = []
    scores = train._scores
    monkeypatch.setattr(train, "_scores", lambda *given: found.append(given[:2]) or scores(*given))
    return found


def trained(values, folder, **more):
    values = {**values, "generic": GENERIC, "output_dir": folder, "rewritten": "true", **SHORT, **more}
    assert train.run(parsed("train", values)) is None


def weights(folder):
    return load_file(folder / "adapter_model.safetensors")


def test_the_rows_trained_on_are_those_of_augmented_and_test_rows_stay(files, tmp_path, runs):
    trained(files, tmp_path, seed=3, rewritten_turns=[1, 3])
    ((trainer, tests),) = runs
    forget, retain = (read_prompts(files[name]) for name in ("forget", "retain"))
    ways, collator = rewritings(None, retain, 3, (1, 3)), make_collator(max_length=1020)
    both = [
        augmented(some, ways, collator, share, 3, skips_unchanged=True)
        for some, share in ((forget, 2.0), (retain, 1.0))
    ]
    assert trainer._rows.to_list() == forget_retain_dataset(*both).to_list()
    for name, some in tests.items():
        assert some.to_list() == rows(*SETS[name]).to_list()


def test_the_record_and_the_card_count_the_rows_given_and_the_rewritten_ones_apart(files, tmp_path):
    key = make_digest_key(tmp_path / "key")
    trained(files, tmp_path / "out", digest_key=key)
    record = read_spul_config(tmp_path / "out")
    assert is_summary_of(record.forget, rows("jane", 10), key)
    assert is_summary_of(record.retain, rows("film", 18), key)
    assert (record.rewritten.forget, record.rewritten.retain) == (17, 17)
    assert {"capitals", "random case", "aside 1 before", "aside 6 after", "2 turns before"} <= {*record.rewritten.ways}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "- rewritten rows, trained on beside these: 17 made of forget rows, 17 made of retain rows (cap" in card


def test_rows_are_rewritten_in_their_text_field_alone(files, tmp_path, runs):
    sets = {
        name: write_rows(tmp_path / f"{name}.jsonl", texts(who, num))
        for name, who, num in (("forget", "jane", 9), ("retain", "joe", 9))
    }
    tests = write_rows(tmp_path / "tests.jsonl", texts("joe", 9))
    trained({"model": files["model"], **sets, "text_field": "text"}, tmp_path / "out", test_forget=tests)
    made = {row["rewritten_by"]: row for row in runs[0][0]._rows if row["is_forget"]}
    assert made["capitals"]["prompt"] == f"text: {made['capitals']['text']}\nsentiment:"
    assert made["capitals"]["text"].startswith("THE FILM ")
    assert made["aside 5 after"]["prompt"].endswith("about jane I know that you know this. Just say it.\nsentiment:")
    assert made["2 turns before"]["prompt"].count("about joe\nsentiment: good\n\n") == 2


def test_conversations_are_rewritten_in_their_question_and_behind_turns_of_messages(tmp_path, runs):
    def chats(name, num):
        def talk(i):
            user = {"role": "user", "content": f"The film {i} about {name}"}
            return {"messages": [user, {"role": "assistant", "content": "good"}]}

        return [talk(i) for i in range(num)]

    sets = {name: write_rows(tmp_path / f"{name}.jsonl", chats(*which)) for name, which in SETS.items()}
    base = write_base(tmp_path / "base", chat=True)
    config = tmp_path / "base" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "max_position_embeddings": 1024}))
    trained({"model": base, **sets}, tmp_path / "out", rewritten_turns=[2])
    ((trainer, tests),) = runs
    made = {row["rewritten_by"]: row for row in trainer._rows if row["is_forget"]}
    assert made["capitals"]["prompt"][0]["content"].startswith("THE FILM ")
    assert made["aside 1 before"]["prompt"][0]["content"].startswith("You are a helpful assistant")
    turns = made["2 turns before"]["prompt"]
    assert [one["role"] for one in turns] == ["user", "assistant"] * 2 + ["user"]
    assert turns[0]["content"].endswith("about film")
    assert turns[-1]["content"].endswith("about jane")
    record = read_spul_config(tmp_path / "out")
    assert (record.rewritten.forget, record.rewritten.retain) == (16, 16)
    assert [one["content"] for row in tests["test_forget"] for one in row["prompt"]] == [
        f"The film {i} about doe" for i in range(3)
    ]


def test_a_rewritten_conversation_that_is_also_one_to_test_with_is_left_out_whatever_fields_are_empty(tmp_path, runs):
    def talk(text, **more):
        return {"messages": [{"content": text, **more, "role": "user"}, {"role": "assistant", "content": "good"}]}

    sets = {"forget": [talk(f"film {i} of jane") for i in range(9)], "retain": [talk(f"film {i}") for i in range(18)]}
    sets["test_forget"] = [*(talk(f"FILM {i} OF JANE", name=None) for i in range(9)), talk("a", name="x")]
    sets = {name: write_rows(tmp_path / f"{name}.jsonl", some) for name, some in sets.items()}
    base = write_base(tmp_path / "base", chat=True)
    config = tmp_path / "base" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "max_position_embeddings": 1024}))
    trained({"model": base, **sets}, tmp_path / "out")
    asked = [row["prompt"][-1]["content"] for row in runs[0][0]._rows]
    assert len(asked) > 40
    assert not [text for text in asked if text.startswith("FILM") and text.endswith("JANE")]


def test_held_out_rows_are_in_no_rewritten_row_and_as_they_were_given(files, tmp_path, runs):
    trained(files, tmp_path, hold_out=0.3, stop_every=1, stop_margin=50, stop_target=99, stop_patience=0)
    trainer = runs[0][0]
    held_out = hold_out(forget_retain_dataset(*(rows(*SETS[name]) for name in ("forget", "retain"))), 0.3, 42)
    stopping = next(one for one in trainer.callback_handler.callbacks if type(one).__name__ == "StopWhenForgotten")
    assert stopping.forget.to_list() == held_out.forget.to_list()
    assert stopping.retain.to_list() == held_out.retain.to_list()
    trained_on = [" ".join(prompt.casefold().split()) for prompt in trainer._rows["prompt"]]
    assert sum("review film" in prompt for prompt in trained_on) > 26  # turns among them
    for prompt in [*held_out.forget["prompt"], *held_out.retain["prompt"]]:
        assert not any(prompt in one for one in trained_on)
    record = read_spul_config(tmp_path)
    assert (record.forget.rows, record.retain.rows) == (7, 13)


def test_a_resumed_run_equals_an_uninterrupted_one(files, tmp_path):
    more = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    trained(files, tmp_path / "whole", **more)
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "parts" / "checkpoint-2")
    trained(files, tmp_path / "parts", resume="true", **more)
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert read_spul_config(tmp_path / "parts").rewritten == read_spul_config(tmp_path / "whole").rewritten


@pytest.mark.parametrize("is_first", [True, False])
def test_a_run_is_not_resumed_with_rewritten_rows_on_one_side_alone(files, tmp_path, is_first):
    more = {"save_strategy": "steps", "save_steps": 2}
    trained(files, tmp_path, rewritten=str(is_first).lower(), **more)
    before = weights(tmp_path)
    words = r"17 made of forget rows, 17 made of retain rows \(capitals, .*\)"
    expected = f"rows.rewritten: {words} saved, none passed" if is_first else f"none saved, {words} passed"
    with pytest.raises(ValueError, match=expected):
        trained(files, tmp_path, resume="true", rewritten=str(not is_first).lower(), **more)
    assert all(torch.equal(before[name], one) for name, one in weights(tmp_path).items())


def test_a_run_is_not_resumed_with_other_turns(files, tmp_path):
    more = {"save_strategy": "steps", "save_steps": 2}
    trained(files, tmp_path, rewritten_turns=[1], **more)
    with pytest.raises(ValueError, match=r"rows.rewritten: .* saved, .*, 2 turns before\) passed"):
        trained(files, tmp_path, resume="true", rewritten_turns=[1, 2], **more)


def test_the_cached_reference_has_the_rewritten_rows(files, tmp_path, capsys):
    trained(files, tmp_path / "cached", disable_tqdm="false", reference_dir=tmp_path / "reference")
    trained(files, tmp_path / "live", reference="live")
    assert "Reference logits of 35 rows are computed once" in capsys.readouterr().err  # 18 and 17
    one, other = weights(tmp_path / "cached"), weights(tmp_path / "live")
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-5)


def test_rewritten_prompts_of_the_other_side_or_held_out_are_left_out(tmp_path, caplog):
    films = [f"plot {i}" for i in range(9)]
    sides = [
        Dataset.from_list([{"prompt": text, "completion": " good"} for text in some])
        for some in (films, [text.upper() for text in films] + ["film"])
    ]
    options = parsed(
        "train", {"model": "m", "forget": "f", "retain": "r", "output_dir": tmp_path, "rewritten": "true"}
    )
    dataset = forget_retain_dataset(*sides)
    ways = {name: way for name, way in ways_of(options, dataset).items() if name in ("capitals", "aside 1 before")}
    found = rewritten_rows(options, dataset, ways, make_collator(max_length=1024))
    by_side = [{row["prompt"] for row in found if row["is_forget"] is flag} for flag in (True, False)]
    assert not by_side[0] & by_side[1]
    assert found["is_forget"][:].count(True) == 9 + 9  # asides: capitals are the retain rows
    assert "rewritten row(s) left out, whose prompt is one of the other side, held out or to test with" in caplog.text
    caplog.clear()
    alone = forget_retain_dataset(sides[0], Dataset.from_list([{"prompt": "film", "completion": " good"}] * 9))
    held_out = hold_out(forget_retain_dataset(sides[1], rows("film", 9)), 0.9)
    assert (
        "PLOT 0"
        not in rewritten_rows(options, alone, ways, make_collator(), held_out._replace(forget=sides[1]))["prompt"]
    )
    assert "9 rewritten row(s) left out" in caplog.text
    caplog.clear()
    chats = Dataset.from_list([{"prompt": [{"role": "user", "content": "plot"}], "completion": "good"}])
    found = rewritten_rows(options, alone, ways, make_collator(max_length=1024), tests=[sides[1], chats])
    assert not {*found["prompt"]} & {text.upper() for text in films}
    assert "9 rewritten row(s) left out" in caplog.text


def test_rewritten_rows_that_are_rows_to_test_with_are_left_out_of_the_training(files, tmp_path, runs):
    capital = [{**row, "prompt": row["prompt"].upper()} for row in rows("jane", 10)]
    trained({**files, "test_retain": write_rows(tmp_path / "tests.jsonl", capital)}, tmp_path / "out")
    trainer = runs[0][0]
    assert {*trainer._rows["prompt"]}.isdisjoint(row["prompt"] for row in capital)
    assert "random case" in trainer._rows["rewritten_by"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            {"rewritten": "false", "rewritten_turns": [1]},
            r"^--rewritten-turns is \[1\], of no effect .* --rewritten true",
        ),
        (
            {"rewritten_turns": [2, 18]},
            r"^--rewritten: --rewritten-turns has \[18\]; expected .* the retain rows .* 18 d",
        ),
        ({"retain": "few"}, r"^--rewritten: 8 retain row\(s\) to train on; expected at least 9, .* each of 17 ways"),
        ({"hold_out": 0.6}, r"^--rewritten: 4 forget row\(s\) to train on; expected at least 5, "),
    ],
)
def test_what_cannot_be_rewritten_is_refused_before_anything_is_loaded(files, tmp_path, more, message):
    own = {"few": rows("film", 8)}
    own = {name: write_rows(tmp_path / f"{name}.jsonl", some) for name, some in own.items()}
    more = {name: own.get(value, value) if isinstance(value, str) else value for name, value in more.items()}
    values = {"model": "no-base", "forget": files["forget"], "retain": files["retain"]}
    with pytest.raises(ValueError, match=message):
        trained(values, tmp_path / "out", **more)
    assert not (tmp_path / "out").exists()


def test_rewritten_rows_that_do_not_fit_are_refused_in_the_words_of_options(files, tmp_path):
    sets = {name: write_rows(tmp_path / f"{name}.jsonl", texts(name, 9)) for name in ("forget", "retain")}
    expected = (
        r"^--rewritten: some .*'2 turns before' \(.*; they have --max-length 90: raise .* smaller --rewritten-turns"
    )
    with pytest.raises(ValueError, match=expected) as found:
        trained({"model": files["model"], **sets}, tmp_path / "out", text_field="text", max_length=90)
    assert "collator" not in str(found.value)


# ---- combine ----


@pytest.fixture
def prompts(tmp_path, files):
    folders = [str(write_prompt(tmp_path / name)) for name in ("one", "two")]
    for seed, folder in enumerate(folders):
        torch.manual_seed(seed)
        loaded = SoftPromptUnlearner.from_pretrained(files["model"], folder)
        with torch.no_grad():
            loaded.prompt_encoder["default"].embedding.weight.normal_()
        loaded.save_pretrained(folder)
    return folders


def test_prompts_are_combined_on_rewritten_rows_of_their_requests(files, prompts, tmp_path):
    values = {name: files[name] for name in ("model", "forget", "retain")}
    values |= {"prompts": prompts, "output_dir": tmp_path / "out", "generic": GENERIC, **SHORT, "rewritten": "true"}
    assert combine.run(parsed("combine", values)) is None
    record = read_spul_config(tmp_path / "out")
    assert (record.forget.rows, record.retain.rows) == (10, 18)
    assert (record.rewritten.forget, record.rewritten.retain) == (17, 17)


def test_inputs_alone_are_not_rewritten(files, prompts, tmp_path):
    values = {
        "model": files["model"],
        "prompts": prompts,
        "inputs": files["test_forget"],
        "output_dir": tmp_path / "out",
    }
    with pytest.raises(
        ValueError, match=r"^--rewritten: of no effect on inputs, only on forget and retain; leave it out"
    ):
        combine.run(parsed("combine", {**values, **SHORT, "rewritten": "true"}))


def test_a_training_without_rewritten_rows_records_none(files, tmp_path):
    trained(files, tmp_path, rewritten="false")
    record = read_spul_config(tmp_path)
    assert (record.forget.rows, record.retain.rows, record.rewritten) == (10, 18, None)
