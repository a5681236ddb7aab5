"""Damaged and foreign folders of gates: refused, each with the field or the file."""

from __future__ import annotations

import json
import stat

import numpy as np
import pytest
import torch
from gated_texts import forget_texts, retain_texts
from helpers import build, make_tokenizer
from safetensors.torch import load_file, save_file

from spul.gates import AnyGate, HiddenStates, NameGate, Probe, StateGate, TextGate, load
from spul.records.weights import file_digest

SETTINGS, ARRAYS = "gate.json", "gate.safetensors"


@pytest.fixture(scope="module")
def model():
    return build("llama").eval()


@pytest.fixture(scope="module")
def gates(model):
    text = TextGate.fit(forget_texts(), retain_texts(), recall=0.9)
    probe = Probe(np.ones((32, 1)), np.zeros(1))
    return {
        "names": NameGate(["Jane Doe"], {"Jane Doe": ["Janie"]}),
        "text": text,
        "states": StateGate(HiddenStates(model, make_tokenizer()), 1, "mean", probe, 0.5, 40),
        "any": AnyGate([text, NameGate(["Jane Doe"])]),
    }


@pytest.fixture
def saved(gates, tmp_path):
    def save(kind):
        gates[kind].save(tmp_path / "gate")
        return tmp_path / "gate"

    return save


def rewrite(folder, **fields):
    path = folder / SETTINGS
    data = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not ...}))


def retensor(folder, change):
    """With the digest of the new file, as if it had been saved so."""
    save_file(change(load_file(folder / ARRAYS)), folder / ARRAYS)
    rewrite(folder, arrays_sha256=file_digest(folder / ARRAYS))


FIELDS = {
    "names": {
        "format_version": (0, 2, "1", True, None, ...),
        "kind": ("image", 5, None, ...),
        "threshold": ("1", None, 10**400, True, float("nan"), 2.0, ...),
        "report": (5, [], {"recall": 1}, ...),
        "arrays_sha256": (5, ...),
        "names": ([], "jane", [5], ["a", "a"], [" "], ["Jane Doe", "\ud83d"], ...),
        "aliases": ([], {"bob": ["b"]}, {"Jane Doe": "J"}, {"Jane Doe": [5]}, ...),
    },
    "text": {
        "threshold": (float("inf"),),
        "windows": (
            0,
            [],
            [31],
            [40.0],
            ["40"],
            None,
            [True],
            [40, 80],
            [40, 40],
            [80],
            [80, 40.0],
            [300, 150, 75, 37, 36],
            list(range(400, 31, -1)),
            ...,
        ),
        "vocabulary": (
            [],
            {},
            {"words": ["a"], "chars": ["b"]},
            {"chars": ["a"], "words": []},
            {"chars": ["\ud83d"], "words": ["a"]},
            ...,
        ),
        "arrays_sha256": (None, "0" * 64),
    },
    "states": {
        "layer": (-1, 3, 1.0, "1", True, ...),
        "pooling": ("median", 5, None, [], ...),
        "window": (5, ...),
        "hidden_size": (0, 33, 10**9, "32", ...),
        "base_fingerprint": (None, "0" * 64, ...),
        "tokenizer_digest": (None, "0" * 64, ...),
    },
    "any": {
        "gates_sha256": ([], ["0" * 64] * 2, "ab", ...),
        "threshold": (1.0,),
    },
}
CASES = [(kind, name, value) for kind, fields in FIELDS.items() for name, values in fields.items() for value in values]


@pytest.mark.parametrize(("kind", "name", "value"), CASES)
def test_a_field_that_is_missing_or_out_of_range_is_refused_by_name(saved, model, kind, name, value):
    folder = saved(kind)
    rewrite(folder, **{name: value})
    with pytest.raises(ValueError, match=rf"gate\.json.*{'weights' if value in (33, 10**9) else name}"):
        load(folder, model, make_tokenizer())


TENSORS = {
    "other keys": (lambda s: {f"x.{k}": v for k, v in s.items()}, "does not fit gate.json"),
    "one key less": (lambda s: dict(list(s.items())[1:]), "does not fit gate.json"),
    "one key more": (lambda s: {**s, "more": torch.zeros(1)}, "'more' has the shape"),
    "other shape": (lambda s: {**s, "weights": s["weights"][:-1].clone()}, "'weights' has the shape"),
    "NaN": (lambda s: {**s, "weights": s["weights"] * float("nan")}, "NaN or infinite"),
    "infinite": (lambda s: {**s, "bias": s["bias"] + float("inf")}, "NaN or infinite"),
    "int64": (lambda s: {k: v.long() for k, v in s.items()}, "expected floating point"),
    "float32": (lambda s: {k: v.float() for k, v in s.items()}, "expected float64"),
}


@pytest.mark.parametrize("kind", ["text", "states"])
@pytest.mark.parametrize("damage", TENSORS)
def test_other_arrays_are_refused(saved, model, kind, damage):
    folder = saved(kind)
    change, message = TENSORS[damage]
    retensor(folder, change)
    with pytest.raises(ValueError, match=message):
        load(folder, model, make_tokenizer())


@pytest.mark.parametrize("kind", ["text", "states"])
def test_arrays_of_another_save_half_a_file_and_a_changed_bit_are_refused(saved, model, kind):
    folder = saved(kind)
    whole = (folder / ARRAYS).read_bytes()
    for content in (whole[: len(whole) // 2], b"", whole[:-1] + bytes([whole[-1] ^ 1])):
        (folder / ARRAYS).write_bytes(content)
        with pytest.raises(ValueError, match=r"no whole safetensors file|not the file that was saved"):
            load(folder, model, make_tokenizer())


@pytest.mark.parametrize("kind", ["names", "text", "states", "any"])
def test_missing_files_and_what_is_no_json_are_refused(saved, model, kind):
    folder = saved(kind)
    settings = (folder / SETTINGS).read_text()
    for content in ("", "{", "[]", "5", "[" * 100_000):
        (folder / SETTINGS).write_text(content)
        with pytest.raises(ValueError, match=r"gate\.json (is no JSON|holds a JSON)"):
            load(folder, model, make_tokenizer())
    (folder / SETTINGS).unlink()
    with pytest.raises(FileNotFoundError, match=r"no gate\.json; .* that `spul gate fit` or Gate\.save wrote"):
        load(folder, model, make_tokenizer())
    (folder / SETTINGS).write_text(settings)
    if kind in ("text", "states"):
        (folder / ARRAYS).unlink()
        with pytest.raises(FileNotFoundError, match=r"has gate\.json but no gate\.safetensors"):
            load(folder, model, make_tokenizer())
    if kind == "any":
        (folder / "1" / SETTINGS).unlink()
        with pytest.raises(FileNotFoundError, match=r"has no 1/gate\.json"):
            load(folder, model, make_tokenizer())


def test_a_part_of_a_joined_gate_from_another_save_is_refused(saved):
    folder = saved("any")
    NameGate(["Somebody Else"]).save(folder / "1")
    with pytest.raises(ValueError, match="not the file that was saved with"):
        load(folder)


def test_gates_too_deep_in_each_other_are_refused(tmp_path):
    gate = NameGate(["jane"])
    for _ in range(12):
        gate = AnyGate([gate])
    gate.save(tmp_path)
    with pytest.raises(ValueError, match="gates within gates within gates, 8 deep"):
        load(tmp_path)


def test_what_is_no_folder_of_a_gate_is_refused(tmp_path, gates):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file; pass a folder"):
        gates["names"].save(tmp_path / "file")
    with pytest.raises(TypeError, match=r"unknown arguments \['sub_folder'\]; expected the Hub's"):
        load(tmp_path, sub_folder="gate")


def test_a_save_that_fails_leaves_the_gate_that_was_there(saved, gates, monkeypatch):
    folder = saved("text")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    broken = TextGate.fit(forget_texts(), retain_texts(), recall=0.9, seed=1)
    monkeypatch.setattr(broken, "threshold", float("nan"))
    with pytest.raises(ValueError, match="JSON compliant"):
        broken.save(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_gate_saved_over_another_kind_is_the_new_one_and_readable_by_others(saved, gates, model):
    saved("any")
    folder = saved("states")
    assert isinstance(load(folder, model, make_tokenizer()), StateGate)
    folder = saved("names")
    assert isinstance(load(folder), NameGate)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("gate.*")}
    probe = folder / "new"
    probe.touch()
    assert modes == {stat.S_IMODE(probe.stat().st_mode)}


def test_a_gate_saved_over_another_leaves_no_file_of_it_and_all_others(gates, tmp_path):
    def files():
        return sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())

    deep = AnyGate([gates["text"], AnyGate([NameGate(["Max Poe"]), NameGate(["John Roe"])]), gates["text"]])
    deep.save(tmp_path)
    mine = ["1/notes.txt", "2024/gate.json", "notes.txt"]  # no gates of it: those have the numbers from 0 on
    for path in mine:
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text("{}")
    AnyGate([gates["names"], AnyGate([gates["names"]])]).save(tmp_path)
    assert files() == sorted([*mine, "0/gate.json", "1/0/gate.json", "1/gate.json", "gate.json"])
    gates["text"].save(tmp_path)
    assert files() == sorted([*mine, "gate.json", "gate.safetensors"])
    gates["names"].save(tmp_path)
    assert files() == sorted([*mine, "gate.json"])
    assert not (tmp_path / "0").exists()
    assert isinstance(load(tmp_path), NameGate)


@pytest.mark.parametrize(("kind", "mine"), [("names", ["0", "1"]), ("any", ["2", "3"])])
def test_a_gate_saved_beside_others_leaves_them(gates, tmp_path, kind, mine):
    """Whether it is the first in the folder, or one that replaces a gate there."""
    for one in mine:
        gates["text"].save(tmp_path / one)
    for _ in range(2):
        gates[kind].save(tmp_path)
        assert all(isinstance(load(tmp_path / one), TextGate) for one in mine)
    gates["names"].save(tmp_path)
    assert all(isinstance(load(tmp_path / one), TextGate) for one in mine)


def test_another_gate_saved_where_a_part_of_one_stood_stays(gates, tmp_path):
    AnyGate([gates["names"], NameGate(["Max Poe"])]).save(tmp_path)
    gates["text"].save(tmp_path / "1")
    gates["names"].save(tmp_path)
    assert not (tmp_path / "0").exists()
    assert isinstance(load(tmp_path / "1"), TextGate)


def test_a_damaged_gate_is_replaced_with_its_arrays(gates, tmp_path):
    gates["text"].save(tmp_path)
    (tmp_path / SETTINGS).write_text("{")
    gates["names"].save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [SETTINGS]


@pytest.mark.parametrize("kind", ["names", "text", "states", "any"])
def test_a_saved_gate_names_no_local_path(saved, kind, tmp_path):
    folder = saved(kind)
    assert not [path for path in folder.rglob("gate.json") if str(tmp_path) in path.read_text()]
