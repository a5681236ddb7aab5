"""A saved object of some kind, gate or rival: both are found and checked alike."""

from __future__ import annotations

import json

import pytest

from spul.gates import load
from spul.gates.files import SavedGate, read_gate
from spul.rivals.files import SavedRival, read_rival

KINDS = {"gate.json": (read_gate, SavedGate), "spul_rival.json": (read_rival, SavedRival)}
GATE = {"threshold": 0.5, "report": None, "arrays_sha256": None}  # of every gate


@pytest.fixture(params=KINDS)
def name(request):
    return request.param


def test_the_file_is_read_with_its_kind_and_fields_of_later_versions(name, tmp_path):
    read, made = KINDS[name]
    fields = {"format_version": 1, "kind": "own", "later": [1], **GATE}
    (tmp_path / name).write_text(json.dumps(fields))
    assert read(tmp_path) == made(str(tmp_path), {}, tmp_path / name, fields)
    assert read(tmp_path).kind == "own"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"format_version": 2}, "format_version is 2; expected 1 to 1; update spul"),
        ({"format_version": True}, "format_version is True"),
        ({"format_version": 1.0}, "format_version is 1.0"),
        ({"format_version": None}, "format_version is None"),
        ({"kind": 3}, "kind is 3; expected the name of a kind."),
    ],
)
def test_another_format_or_kind_is_refused_by_the_files_name(name, changed, message, tmp_path):
    (tmp_path / name).write_text(json.dumps({"format_version": 1, "kind": "own", **GATE, **changed}))
    with pytest.raises(ValueError, match=f"{name}: {message}"):
        KINDS[name][0](tmp_path)


def test_a_missing_field_names_what_can_be_done_without_loading_it(name, tmp_path):
    (tmp_path / name).write_text(json.dumps({"format_version": 1, **GATE}))
    remedy = {
        "gate.json": "Fit it again, or copy or download the whole folder again",
        "spul_rival.json": "Copy or download the folder again, or make it anew",
    }
    with pytest.raises(ValueError, match=rf"{name} lacks kind; expected the name of a kind\. {remedy[name]}\.$"):
        KINDS[name][0](tmp_path)


def test_a_text_gate_of_one_window_is_to_be_fit_again(tmp_path):
    fields = {"format_version": 1, "kind": "text", "window": 160, **GATE}
    (tmp_path / "gate.json").write_text(json.dumps(fields))
    with pytest.raises(
        ValueError, match=r"lacks windows; expected a number of characters, its half, .*\. Fit it again, or"
    ):
        load(tmp_path)


def test_a_folder_without_it_and_arguments_that_are_none_of_the_hub_are_refused(name, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"has no {name}; expected a folder that .*save"):
        KINDS[name][0](tmp_path)
    with pytest.raises(TypeError, match=r"unknown arguments \['sub_folder'\]; expected the Hub's"):
        KINDS[name][0](tmp_path, sub_folder="a")
