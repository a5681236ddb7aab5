"""`spul gate fit` and `spul gate check`: gates from files, beside a saved prompt."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from command_files import parsed, write_base, write_prompt, write_rows
from helpers import build, build_unlearner, lora, make_tokenizer
from transformers import AutoTokenizer

from spul.commands.gate import COMMANDS, check, check_fit, check_texts, fit
from spul.commands.options import parse
from spul.gates import AnyGate, GatedUnlearner, NameGate, StateGate, TextGate, load
from spul.gates.gate import request_texts
from spul.gates.gated_files import attach_gate
from spul.prompts.checkpoint import ENCODER_NAME

FORGET = [f"who is jane doe in film {i}" for i in range(12)]
RETAIN = [f"the plot of text {i} is good" for i in range(14)]


@pytest.fixture
def folder(tmp_path):
    """A base, an adapter, and files of requests."""
    write_base(tmp_path / "base", chat=True)
    write_prompt(tmp_path / "adapter")
    for name, texts in (("forget", FORGET), ("retain", RETAIN)):
        write_rows(tmp_path / f"{name}.jsonl", [{"prompt": text, "completion": " a"} for text in texts])
    return tmp_path


def options_for(folder, **more):
    sets = {name: folder / f"{name}.jsonl" for name in ("forget", "retain")}
    own = {} if more.get("kind") == "names" else {"recall": 0.9}  # a gate of names is not fit
    return {"adapter": folder / "adapter", **sets, "model": folder / "base", **own, **more}


def flagged(folder, texts, capsys):
    capsys.readouterr()
    values = {"adapter": folder / "adapter", "texts": texts, "model": folder / "base"}
    assert check(parsed("gate", values, "check")) is None
    return [line.split("\t")[0] == "flagged" for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize(
    ("more", "made"),
    [
        ({"kind": "names", "names": ["Jane Doe"]}, NameGate),
        ({"kind": "text"}, TextGate),
        ({"kind": "states", "layers": [1, 2]}, StateGate),
    ],
)
def test_a_gate_is_fit_reported_saved_with_its_prompt_and_routes(folder, capsys, more, made):
    assert fit(parsed("gate", options_for(folder, **more), "fit")) is None
    said = capsys.readouterr().out
    assert said.startswith("recall ")
    base, tokenizer = build("llama"), AutoTokenizer.from_pretrained(folder / "base")
    gate = load(folder / "adapter" / "gate", base, tokenizer)
    assert type(gate) is made
    assert str(gate.report) in said
    texts = [*FORGET[:2], *RETAIN[:3]]
    expected = gate.flags(texts).tolist()
    assert flagged(folder, texts, capsys) == expected
    gated = GatedUnlearner.from_pretrained(base, folder / "adapter", tokenizer)
    assert gated.route(texts) == ["default" if flag else "__base__" for flag in expected]
    assert "## Gate" in (folder / "adapter" / "README.md").read_text()


def test_a_gate_from_code_flags_the_same(folder):
    fit(parsed("gate", options_for(folder, kind="text", seed=3), "fit"))
    plain = TextGate.fit(FORGET, RETAIN, recall=0.9, seed=3)
    found = load(folder / "adapter" / "gate")
    assert found.scores(FORGET + RETAIN).tolist() == plain.scores(FORGET + RETAIN).tolist()
    assert found.threshold == plain.threshold


@pytest.mark.parametrize("kind", ["names", "text"])
def test_misspelled_words_are_read_as_the_gate_in_code_reads_them_or_as_told(folder, kind):
    for spelling in (None, True, False):
        options = options_for(folder, kind=kind, **({} if spelling is None else {"spelling": spelling}))
        fit(parsed("gate", {**options, **({"names": ["Jane Doe"]} if kind == "names" else {})}, "fit"))
        gate = load(folder / "adapter" / "gate")
        assert gate.spelling is (spelling is not False)


def test_spelling_alone_is_true_as_other_flags_are():
    words, fixed = ["spul", "gate", "fit"], ["--adapter", "a", "--kind", "names"]
    found = {
        more: parse(COMMANDS["fit"], words, [*fixed, *more.split()]).spelling
        for more in ("", "--spelling", "--spelling true", "--spelling false", "--spelling --seed 1")
    }
    assert list(found.values()) == [None, True, True, False, True]


def test_conversations_are_read_as_the_gate_will_see_them(folder, capsys):
    for name, texts in (("forget", FORGET), ("retain", RETAIN)):
        answer = {"role": "assistant", "content": "a"}
        chats = [{"messages": [{"role": "user", "content": text}, answer]} for text in texts]
        write_rows(folder / f"{name}.jsonl", chats)
    fit(parsed("gate", options_for(folder, kind="text"), "fit"))
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")

    def seen(texts):
        """Requests in the chat template, as `GatedUnlearner` shows them to a gate."""
        chats = [f"<s>user\n{text}</s><s>assistant\n" for text in texts]
        return request_texts(tokenizer, [tokenizer(chat, add_special_tokens=False)["input_ids"] for chat in chats])

    plain = TextGate.fit(seen(FORGET), seen(RETAIN), recall=0.9)
    found = load(folder / "adapter" / "gate")
    assert found.scores(seen(FORGET)).tolist() == plain.scores(seen(FORGET)).tolist()
    capsys.readouterr()
    values = {"adapter": folder / "adapter", "file": folder / "forget.jsonl", "model": folder / "base"}
    check(parsed("gate", values, "check"))
    assert len(capsys.readouterr().out.splitlines()) == len(FORGET)


@pytest.mark.parametrize("command", ["fit", "check"])
def test_conversations_without_a_base_are_refused_with_the_option_that_names_it(folder, command):
    chats = [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "a"}]} for text in FORGET
    ]
    values = {"adapter": folder / "adapter"}
    write_rows(folder / "chats.jsonl", chats)
    own = {"fit": {"kind": "text", "forget": folder / "chats.jsonl", "retain": folder / "retain.jsonl"}}
    values |= own.get(command, {"file": folder / "chats.jsonl"})
    with pytest.raises(ValueError, match=r"expected the base, by name or folder.*: --model BASE\. Conversations"):
        {"fit": fit, "check": check}[command](parsed("gate", values, command))


def test_a_gate_that_is_replaced_is_said(folder, capsys):
    said = []
    for more in ({"kind": "text"}, {"kind": "names", "names": ["Jane Doe"]}, {"kind": "text"}, {"kind": "text"}):
        fit(parsed("gate", options_for(folder, **more), "fit"))
        said.append([line for line in capsys.readouterr().out.splitlines() if line.startswith("replaced")])
        if more["kind"] == "text" and len(said) == 3:
            (folder / "adapter" / "gate" / "gate.json").write_text("{")
    assert said[:3] == [[], ["replaced: text gate"], ["replaced: names gate"]]
    assert said[3][0].startswith("replaced: a gate that could not be read (")


def test_lines_of_text_are_requests(folder, capsys):
    for name, texts in (("forget", FORGET), ("retain", RETAIN)):
        (folder / f"{name}.txt").write_text("\n".join(texts))
    sets = {name: folder / f"{name}.txt" for name in ("forget", "retain")}
    fit(parsed("gate", {**options_for(folder, kind="text"), **sets, "paraphrases": folder / "forget.txt"}, "fit"))
    assert "paraphrases " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"kind": "names"}, "needs names"),
        ({"kind": "text", "names": ["Jane"]}, "names are for a gate of names"),
        ({"kind": "text", "recall": 2}, "recall"),
        ({"kind": "text", "layers": [1]}, "layers are of a gate of states"),
        ({"kind": "names", "names": ["Jane"], "paraphrases": "p.txt"}, "paraphrases is of a gate that is fit"),
        ({"kind": "names", "names": ["Jane"], "recall": 0.9}, "recall is of a gate that is fit on requests"),
        ({"kind": "names", "names": ["Jane"], "seed": 1}, "seed is of a gate that is fit on requests"),
        ({"kind": "text", "column": "text"}, "has no column 'text'"),
        ({"kind": "states", "spelling": True}, "spelling is read by a gate of names or of wording"),
    ],
)
def test_options_that_do_not_go_together_are_refused_and_nothing_is_saved(folder, more, message):
    with pytest.raises(ValueError, match=message):
        fit(parsed("gate", options_for(folder, **more), "fit"))
    assert not (folder / "adapter" / "gate").exists()


def test_requests_of_one_side_are_refused(folder):
    values = options_for(folder, kind="text")
    del values["retain"]
    with pytest.raises(ValueError, match="a file of each"):
        fit(parsed("gate", values, "fit"))
    del values["recall"]
    with pytest.raises(ValueError, match="go together"):
        fit(parsed("gate", {**values, "kind": "names", "names": ["Jane"]}, "fit"))
    values = {"adapter": values["adapter"], "kind": "names", "names": ["Jane"], "column": "text"}
    with pytest.raises(ValueError, match="column='text' is given without a file of requests"):
        fit(parsed("gate", values, "fit"))
    with pytest.raises(ValueError, match="nothing to check"):
        check(parsed("gate", {"adapter": folder / "adapter"}, "check"))
    with pytest.raises(ValueError, match="column='completion' is given without a file of requests"):
        check(parsed("gate", {"adapter": folder / "adapter", "texts": ["a"], "column": "completion"}, "check"))


def test_a_column_of_files_that_are_all_lines_of_text_is_refused(folder, tmp_path):
    for name in ("forget", "retain"):
        (tmp_path / f"{name}.txt").write_text(f"{name}\n")
    lines, values = {name: str(tmp_path / f"{name}.txt") for name in ("forget", "retain")}, {"column": "prompt"}
    message = r"column='prompt' is of no effect on lines of text \(.*\.txt\); leave it out, or give files of rows"
    with pytest.raises(ValueError, match=message):
        check_fit(parsed("gate", options_for(folder, kind="text", **lines, **values), "fit"))
    with pytest.raises(ValueError, match=message):
        check_texts(parsed("gate", {"adapter": folder / "adapter", "file": lines["forget"], **values}, "check"))
    check_fit(parsed("gate", options_for(folder, kind="text", forget=lines["forget"], **values), "fit"))


# ---- a gate beside a prompt ----


def test_a_gate_is_attached_beside_a_prompt_that_can_still_be_trained(folder):
    trained = folder / "trained"
    build_unlearner("llama", "p_tuning", torch.float32).save_pretrained(str(trained))
    before = {path.name: path.read_bytes() for path in trained.iterdir() if path.name != "README.md"}
    attach_gate(NameGate(["Jane Doe"]), trained)
    attach_gate(NameGate(["Jane Roe"]), trained)
    assert ENCODER_NAME in before
    assert all((trained / name).read_bytes() == content for name, content in before.items())
    assert load(trained / "gate").names == ["Jane Roe"]
    assert json.loads((trained / "spul_gates.json").read_text())["prompts"] == ["default"]


def test_gates_of_several_prompts_are_replaced_one_by_one(folder):
    unlearner = GatedUnlearner.from_pretrained
    attach_gate(NameGate(["Jane Doe"]), folder / "adapter")
    gated = unlearner(build("llama"), folder / "adapter", make_tokenizer())
    gated.load_adapter(folder / "adapter", "second", gate=NameGate(["John Roe"]))
    gated.save_pretrained(folder / "both")
    attach_gate(NameGate(["Max Poe"]), folder / "both", "second")
    again = unlearner(build("llama"), folder / "both", make_tokenizer())
    assert again.route(["Max Poe", "John Roe", "Jane Doe"]) == ["second", "__base__", "default"]


def test_a_gate_without_its_prompt_is_refused(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no adapter_config\.json"):
        attach_gate(NameGate(["Jane Doe"]), tmp_path)
    attach_gate(NameGate(["Jane Doe"]), folder / "adapter")
    with pytest.raises(FileNotFoundError, match="other"):
        attach_gate(NameGate(["Jane Doe"]), folder / "adapter", "other")
    with pytest.raises(ValueError, match="is a function, which cannot be saved"):
        attach_gate(lambda texts: texts, folder / "adapter")


def test_an_adapter_that_no_gate_can_turn_on_gets_none(folder, tmp_path):
    lora(build("llama")).save_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match=r"lora is no prompt that a gate can turn on: .* LoraConfig"):
        attach_gate(NameGate(["Jane Doe"]), tmp_path / "lora")
    (tmp_path / "empty.txt").touch()  # before the work: nothing is read of it
    values = options_for(folder, kind="text") | {"adapter": tmp_path / "lora", "forget": tmp_path / "empty.txt"}
    with pytest.raises(ValueError, match="is no prompt that a gate can turn on"):
        fit(parsed("gate", values, "fit"))
    assert not list(tmp_path.rglob("gate*.json"))


def test_a_gate_for_one_of_several_prompts_without_gates_is_refused_and_checkpoints_are_no_prompts(folder):
    files = [path for path in (folder / "adapter").iterdir() if path.is_file()]
    for name in ("checkpoint-20", "second"):
        (folder / "adapter" / name).mkdir()
        for path in files:
            shutil.copy(path, folder / "adapter" / name)
    with pytest.raises(ValueError, match=r"also holds the prompts \['second'\], which would be left out"):
        attach_gate(NameGate(["Jane Doe"]), folder / "adapter")
    with pytest.raises(ValueError, match=r"also holds the prompts \['default'\]"):
        attach_gate(NameGate(["Jane Doe"]), folder / "adapter", "second")
    assert not (folder / "adapter" / "gate").exists()
    shutil.rmtree(folder / "adapter" / "second")
    attach_gate(NameGate(["Jane Doe"]), folder / "adapter")


@pytest.mark.parametrize("name", ["../adapter", "..", ".", "", "a/b", "..\\adapter"])
def test_a_name_that_leads_elsewhere_is_refused(folder, name):
    (folder / "other").mkdir()
    with pytest.raises(ValueError, match="leads out of"):
        attach_gate(NameGate(["Jane Doe"]), folder / "other", name)
    assert not (folder / "adapter" / "gate").exists()
    assert not any((folder / "other").iterdir())


def test_control_characters_of_requests_are_shown_escaped(folder, capsys):
    fit(parsed("gate", {"adapter": folder / "adapter", "kind": "names", "names": ["Jane Doe"]}, "fit"))
    capsys.readouterr()
    texts = ["Jane Doe\x1b[2J", "a\rflagged\tb", "c\nd\u202ee", "Wer ist J\u00f6rg?"]
    check(parsed("gate", {"adapter": folder / "adapter", "texts": texts}, "check"))
    assert capsys.readouterr().out.split("\n") == [
        *("flagged\tJane Doe\\x1b[2J", "passed\ta\\rflagged\\tb", "passed\tc\\nd\\u202ee"),
        *("passed\tWer ist J\u00f6rg?", ""),
    ]


def test_half_of_a_surrogate_pair_is_refused_before_a_gate_is_fit_and_flagged_where_one_is_asked(folder, capsys):
    before = sorted(path.name for path in (folder / "adapter").iterdir())
    with pytest.raises(ValueError, match=r"names has the name 'J\\udcffo', which holds '\\udcff' at character 1"):
        fit(parsed("gate", options_for(folder, kind="names", names=["J\udcffo"]), "fit"))
    rows = [{"prompt": text, "completion": " a"} for text in [*FORGET, "who \ud83d"]]
    (folder / "forget.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=r"forget\.jsonl: the text 'who .*' holds '\\ud83d' at character 4"):
        fit(parsed("gate", options_for(folder, kind="text"), "fit"))
    assert sorted(path.name for path in (folder / "adapter").iterdir()) == before
    fit(parsed("gate", {"adapter": folder / "adapter", "kind": "names", "names": ["Jane Doe"]}, "fit"))
    capsys.readouterr()
    check(parsed("gate", {"adapter": folder / "adapter", "texts": ["the plot", "the \udcff plot"]}, "check"))
    said = capsys.readouterr().out
    assert said.startswith("passed\tthe plot\nflagged\tthe ")
    assert said.endswith("\nthe gate (names) failed on 1 of them, which are flagged: ValueError\n")
    said.encode()


def test_failures_of_joined_gates_are_said_of_each(folder, capsys):
    by_wording = TextGate.fit(FORGET, RETAIN, recall=0.9)
    gate = AnyGate([NameGate(["Jane Doe"]), AnyGate([NameGate(["John Roe"]), by_wording])])
    attach_gate(gate, folder / "adapter")
    given = {"adapter": folder / "adapter", "texts": ["the plot", "the \udcff plot"]}
    check(parsed("gate", given, "check"))
    assert capsys.readouterr().out.splitlines()[2:] == [
        f"the gate ({kind}) failed on 1 of them, which are flagged: ValueError" for kind in ("names", "names", "text")
    ]


@pytest.mark.parametrize("nested", [False, True])
def test_check_needs_the_base_where_a_gate_of_states_is_among_joined_ones(folder, capsys, nested):
    of_states = StateGate.fit(
        build("llama"), AutoTokenizer.from_pretrained(folder / "base"), FORGET, RETAIN, recall=0.9
    )
    gate = AnyGate([NameGate(["John Roe"]), AnyGate([of_states]) if nested else of_states])
    attach_gate(gate, folder / "adapter")
    with pytest.raises(ValueError, match="--model BASE"):
        check(parsed("gate", {"adapter": folder / "adapter", "texts": ["the plot"]}, "check"))
    assert flagged(folder, [*FORGET[:2], "john roe"], capsys) == gate.flags([*FORGET[:2], "john roe"]).tolist()


def test_check_asks_no_gate_that_would_not_be_served(folder, capsys):
    fit(parsed("gate", {"adapter": folder / "adapter", "kind": "names", "names": ["Jane Doe"]}, "fit"))
    with pytest.raises(ValueError, match=r"'\.\./adapter' leads out of the folder"):
        check(parsed("gate", {"adapter": folder / "base", "adapter_name": "../adapter", "texts": ["a"]}, "check"))
    NameGate(["John Roe"]).save(folder / "adapter" / "gate")
    with pytest.raises(ValueError, match="are not those that were saved together"):
        flagged(folder, ["a"], capsys)


def test_a_damaged_prompt_gets_no_gate_and_is_named(folder):
    config = folder / "adapter" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "num_virtual_tokens": "four"}))
    with pytest.raises(ValueError, match=r"adapter is no prompt that a gate can turn on: .*num_virtual_tokens='four'"):
        fit(parsed("gate", options_for(folder, kind="text"), "fit"))
