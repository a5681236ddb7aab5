"""The folder of a saved rival: what is in it, that it comes back, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from chats import chatty, conversation
from command_files import write_prompt
from datasets import Dataset
from helpers import build, make_collator, make_tokenizer, rows
from small_evaluations import learned
from small_rivals import GATED, KINDS, rival

from spul.data.encoder import RowEncoder
from spul.evaluation.loading import kind_of
from spul.evaluation.metrics import generate_answers
from spul.gates import NameGate, TextGate, load
from spul.rivals import Corruption, EmbeddingCorruption, FixedRefusal, InContextUnlearning, Rival
from spul.rivals.refusal import write_refusal

NAME = "spul_rival.json"


def saved(folder, kind, changed=()):
    """A rival that is saved; then fields of its file are changed, or removed where they are `...`."""
    model = rival(kind)
    model.save_pretrained(folder)
    fields = json.loads((folder / NAME).read_text()) | dict(changed)
    (folder / NAME).write_text(json.dumps({key: value for key, value in fields.items() if value is not ...}))
    return model


def again(model, folder, tokenizer=None):
    return type(model).from_pretrained(model.get_base_model(), folder, tokenizer or make_tokenizer()).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_each_is_saved_as_plain_files_and_answers_as_before(kind, tmp_path):
    model, some = saved(tmp_path, kind), Dataset.from_list([*rows("jane", 4), *rows("film", 4)])
    files = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {NAME, *(["gate/gate.json"] if kind in GATED else [])}
    loaded, encoder = again(model, tmp_path), make_collator().encoder
    assert loaded.adapter_settings() == model.adapter_settings()
    answers = generate_answers(model, some, encoder, max_new_tokens=3)
    assert generate_answers(loaded, some, encoder, max_new_tokens=3) == answers
    ids = torch.tensor([encoder.encode(rows("jane", 1)[0]).prompt_ids])
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


def test_a_rival_without_a_gate_leaves_none_of_the_rival_before(tmp_path):
    saved(tmp_path, "refusal")
    assert (tmp_path / "gate" / "gate.json").is_file()
    saved(tmp_path, next(kind for kind in KINDS if kind not in GATED))
    assert not (tmp_path / "gate").exists()


@pytest.mark.parametrize("is_saved", [True, False])
def test_a_rival_without_a_gate_leaves_one_that_was_fitted_there(tmp_path, is_saved):
    if is_saved:
        saved(tmp_path, "refusal")
    NameGate(["Max Poe"]).save(tmp_path / "gate")
    saved(tmp_path, next(kind for kind in KINDS if kind not in GATED))
    assert load(tmp_path / "gate").identity() == NameGate(["Max Poe"]).identity()


def test_a_refusal_is_written_without_its_base_as_it_is_saved_with_it(tmp_path):
    model = rival("refusal")
    model.save_pretrained(tmp_path / "saved")
    write_refusal(tmp_path / "written", model.gate, model.refusal)
    found = [
        {path.relative_to(tmp_path / name).as_posix(): path.read_bytes() for path in (tmp_path / name).rglob("*.json")}
        for name in ("saved", "written")
    ]
    assert set(found[0]) == {NAME, "gate/gate.json"}
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (["no"], TypeError, "refusal is a list; expected a text"),
        (" \n", ValueError, "is blank; expected a text that answers a request"),
        ("no\ud83d", ValueError, r"holds '\\ud83d' at character 2, which is half of a surrogate pair"),
    ],
)
def test_a_text_that_answers_no_request_is_no_refusal(text, error, message, tmp_path):
    with pytest.raises(error, match=message):
        write_refusal(tmp_path / "new", NameGate(["jane"]), text)
    with pytest.raises(error, match=message):
        FixedRefusal(learned(), make_tokenizer(), NameGate(["jane"]), text)
    assert not (tmp_path / "new").exists()


def test_numbers_names_and_a_gate_with_arrays_are_saved(tmp_path):
    gate = TextGate.fit(rows("jane", 12)["prompt"][:], rows("film", 12)["prompt"][:])
    corruption = Corruption("noise", 0.1 + 0.2, 3)
    model = EmbeddingCorruption(learned(), make_tokenizer(), gate, corruption, ["Jane", "Roe"], seed=7)
    model.save_pretrained(tmp_path)
    loaded = again(model, tmp_path)
    assert (tmp_path / "gate" / "gate.safetensors").is_file()
    assert loaded.settings() == model.settings()
    assert (loaded.corruption, loaded.names, loaded.seed) == (corruption, ["Jane", "Roe"], 7)


@pytest.mark.parametrize("num_forget", [1, 3])
def test_examples_have_the_labels_that_were_drawn_and_no_other_retain_row_is_saved(num_forget, tmp_path):
    labels = (" positive", " negative", " neutral")
    forget = Dataset.from_list([{"prompt": f"jane {i} :", "completion": labels[i], "note": "own"} for i in range(3)])
    model = InContextUnlearning(learned(), make_tokenizer(), forget, rows("film", 6), num_forget, 2, seed=3)
    model.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / NAME).read_text())
    assert len(fields["retain"]) == 2
    assert all(set(row) == {"prompt", "completion"} for row in [*fields["forget"], *fields["retain"]])
    for given, row in zip(fields["forget"], forget, strict=True):
        assert given["prompt"] == row["prompt"]
        assert given["completion"] in set(labels) - {row["completion"]}
    assert again(model, tmp_path).settings() == model.settings()  # which has the digest of all examples


def test_examples_that_are_conversations_come_back(tmp_path):
    tokenizer = chatty("turns")
    forget = Dataset.from_list([conversation("jane .", "good"), conversation("doe .", "bad")])
    retain = Dataset.from_list([conversation("film .", "bad")])
    model = InContextUnlearning(build("llama"), tokenizer, forget, retain, 1, 1)
    model.save_pretrained(tmp_path)
    loaded = again(model, tmp_path, tokenizer)
    request = RowEncoder(tokenizer, 96).encode(conversation("plot .", "good")).prompt_ids
    assert loaded.settings() == model.settings()
    assert loaded.edit(request) == model.edit(request)


@pytest.mark.parametrize("kind", KINDS)
def test_the_folder_of_another_method_or_of_none_is_refused(kind, tmp_path):
    model, other = rival(kind), rival("guardrail" if kind != "guardrail" else "refusal")
    with pytest.raises(FileNotFoundError, match=r"has no spul_rival\.json"):
        again(model, tmp_path)
    other.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"is of another method, {other.kind}; expected that of a .*, {model.kind}"):
        again(model, tmp_path)


@pytest.mark.parametrize(
    ("kind", "changed", "message"),
    [
        ("refusal", {"format_version": 2}, "format_version is 2; expected 1 to 1; update spul"),
        ("refusal", {"format_version": True}, "format_version is True"),
        ("refusal", {"kind": None}, "kind is None; expected the name of a kind"),
        ("refusal", {"refusal": ["no"]}, r"refusal is \['no'\]; expected a text"),
        ("refusal", {"refusal": ...}, "lacks refusal; expected a text"),
        ("refusal", {"gate_sha256": ...}, "lacks gate_sha256; expected 64 hexadecimal digits"),
        ("refusal", {"gate_sha256": "0" * 64}, "is not the one that was saved with"),
        ("guardrail", {"instruction": " "}, "instruction is ' '; expected a text"),
        ("examples", {"num_forget": 0}, "num_forget is 0; expected a whole number of 1 or more"),
        ("examples", {"num_forget": 6}, "num_forget=6 of 5 saved forget rows"),
        ("examples", {"forget": []}, r"forget is \[\]; expected rows of prompt and completion, one or more"),
        ("examples", {"retain": [{"prompt": "a"}]}, "retain is .*; expected rows of prompt and completion"),
        ("corruption", {"corruption": {"kind": "noise", "strength": 0.0, "dims": 1}}, "strength above 0 and dims"),
        ("corruption", {"corruption": {"kind": "noise"}}, "expected an object of kind"),
        ("corruption", {"names": []}, r"names is \[\]; expected different names, or null"),
        ("corruption", {"seed": -1}, "seed is -1; expected a whole number of 0 or more"),
    ],
)
def test_fields_are_checked(kind, changed, message, tmp_path):
    model = saved(tmp_path, kind, changed)
    with pytest.raises(ValueError, match=message):
        again(model, tmp_path)


@pytest.mark.parametrize("kind", GATED)
def test_a_gate_that_is_missing_or_another_one_is_refused(kind, tmp_path):
    model = saved(tmp_path, kind)
    NameGate(["somebody else"]).save(tmp_path / "gate")
    with pytest.raises(ValueError, match="is not the one that was saved with"):
        again(model, tmp_path)
    (tmp_path / "gate" / "gate.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"gate\.json"):
        again(model, tmp_path)


@pytest.mark.parametrize("made", [FixedRefusal, EmbeddingCorruption])
def test_a_gate_that_is_a_function_is_refused_before_anything_is_written(made, tmp_path):
    own = " unknown" if made is FixedRefusal else Corruption()
    model = made(learned(), make_tokenizer(), lambda texts: [False] * len(texts), own)
    with pytest.raises(ValueError, match="function"):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_other_arguments_and_the_folder_of_an_adapter_are_refused(kind, tmp_path):
    with pytest.raises(TypeError, match=r"a folder alone; found \['push_to_hub'\]"):
        rival(kind).save_pretrained(tmp_path / "new", push_to_hub=True)
    assert not (tmp_path / "new").exists()
    write_prompt(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(FileExistsError, match=r"holds an adapter \(adapter_config\.json\); name a folder of"):
        rival(kind).save_pretrained(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_folder_of_a_rival_and_of_another_model_is_neither(tmp_path):
    made = rival("guardrail")
    made.save_pretrained(tmp_path)
    assert kind_of(tmp_path) == "rival"
    write_prompt(tmp_path)
    with pytest.raises(ValueError, match="a folder of its own"):
        kind_of(tmp_path)


def test_a_rival_of_ones_own_without_fields_is_not_saved_as_its_base(tmp_path):
    class Own(Rival):
        kind = "own"

    with pytest.raises(TypeError, match="has no saved_fields, and its base would be saved without what it does to"):
        Own(learned(), make_tokenizer()).save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
