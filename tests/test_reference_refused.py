"""Uses that a cached reference refuses: another base, other rows, changed files; refused or computed again."""

import os

import pytest
import torch
from datasets import Dataset
from helpers import (
    VOCABULARY,
    Counting,
    answers,
    build,
    make_answers,
    make_collator,
)
from references import CHECKED, batches, wrap
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import spul.training.reference
import spul.training.reference_parts
from spul import ReferenceCache, UnlearningLoss
from spul.data.dataset import forget_retain_dataset
from spul.records.files import SCRATCH
from spul.training.reference import row_checksums
from spul.training.reference_files import describe, read_part, without_dropout, write_part


def test_another_base_is_refused(tmp_path):
    dataset, collator = make_answers(), make_collator()
    base = build("llama")
    ReferenceCache.build(wrap(base), dataset, collator, tmp_path)
    with torch.no_grad():
        base.get_input_embeddings().weight.mul_(1.5)
    with pytest.raises(ValueError, match=r"this run: its base has other weights\. Delete the folder, name another"):
        ReferenceCache.build(wrap(base), dataset, collator, tmp_path)


def test_a_change_that_the_fingerprint_does_not_see_is_refused(tmp_path):
    dataset, collator = make_answers(), make_collator()
    ReferenceCache.build(wrap(build("llama")), dataset, collator, tmp_path)
    base = build("llama")
    for layer in base.model.layers:
        layer.self_attn.scaling = 2.0  # neither a weight nor in the config
    with pytest.raises(ValueError, match="changed in a way that its fingerprint does not show"):
        ReferenceCache.build(wrap(base), dataset, collator, tmp_path)


def test_rounding_that_depends_on_the_batch_is_no_other_base(tmp_path):
    base = build("llama")

    def in_bf16_among_others(module, args):  # as the kernels of TF32 and of 16 bit, which differ by shape
        return (args[0].bfloat16().float(), *args[1:]) if len(args[0]) > 1 else None

    for layer in base.model.layers:
        layer.register_forward_pre_hook(in_bf16_among_others)
    dataset, collator = make_answers(), make_collator()
    ReferenceCache.build(wrap(base), dataset, collator, tmp_path, batch_size=4)
    for layer in base.model.layers:
        layer.self_attn.scaling = 2.0
    with pytest.raises(ValueError, match="changed in a way that its fingerprint does not show"):
        ReferenceCache.build(wrap(base), dataset, collator, tmp_path)


def test_rounding_is_measured_in_no_more_rows_and_columns_than_the_cache_takes(tmp_path):
    base, dataset, collator = build("gpt2"), make_answers(), make_collator()
    longest = max(collator([row])["input_ids"].shape[1] for row in dataset)
    base.transformer.wpe.weight = torch.nn.Parameter(base.transformer.wpe.weight[:longest].detach())
    shapes = []

    def in_bf16_among_others(module, args):
        shapes.append(args[0].shape[:2])
        return (args[0].bfloat16().float(), *args[1:]) if len(args[0]) > 1 else None

    for layer in base.transformer.h:
        layer.register_forward_pre_hook(in_bf16_among_others)
    ReferenceCache.build(base, dataset, collator, tmp_path, batch_size=3, loss=UnlearningLoss())
    shapes.clear()
    ReferenceCache.build(base, dataset, collator, tmp_path, batch_size=3, loss=UnlearningLoss())  # its check alone
    assert {rows for rows, _ in shapes} == {1, 3}
    assert max(columns for _, columns in shapes) == longest


def test_another_config_is_refused(tmp_path):
    dataset, collator = make_answers(), make_collator()
    ReferenceCache.build(wrap(build("mistral", sliding_window=40)), dataset, collator, tmp_path)
    with pytest.raises(ValueError, match=r"this run: its base has another config\. Delete"):
        ReferenceCache.build(wrap(build("mistral", sliding_window=20)), dataset, collator, tmp_path)


def test_the_dropout_that_a_prompt_sets_to_0_is_no_other_config(tmp_path):
    dataset, collator, base = make_answers(), make_collator(), build("gpt2")
    base.config.resid_pdrop = 0.1
    before = describe(base, torch.arange(3))
    ReferenceCache.build(base, dataset, collator, tmp_path, loss=UnlearningLoss())
    unlearner = wrap(base)
    assert base.config.resid_pdrop == 0.0
    assert describe(base, torch.arange(3)) == before
    ReferenceCache.build(unlearner, dataset, collator, tmp_path)


def test_dropout_is_found_in_the_parts_of_a_config():
    config = {0: 0.3, "dropout": 0.1, "drop": 1, "text_config": {"hidden_dropout": 0.2, "width": 8}}
    expected = {0: 0.3, "dropout": 0.0, "drop": 1, "text_config": {"hidden_dropout": 0.0, "width": 8}}
    assert without_dropout(config) == expected
    assert config["text_config"]["hidden_dropout"] == 0.2


def test_what_a_killed_process_left_is_in_nobodys_way(tmp_path):
    dataset, collator = make_answers(), make_collator()
    (tmp_path / f"{SCRATCH}new").write_text("half")
    (tmp_path / f"{SCRATCH}old").write_text("half")
    os.utime(tmp_path / f"{SCRATCH}old", (0, 0))
    ReferenceCache.build(wrap(build("llama")), dataset, collator, tmp_path)
    assert (tmp_path / f"{SCRATCH}new").exists()
    assert not (tmp_path / f"{SCRATCH}old").exists()


def test_a_part_with_any_changed_byte_is_computed_again(tmp_path, caplog):
    """As after a bad copy: in the header, in a state, in a row's checksum."""
    dataset, collator, base = make_answers(), make_collator(), build("llama")
    reference = ReferenceCache.build(wrap(base), dataset, collator, tmp_path)
    path = tmp_path / "part-00000.safetensors"
    whole = path.read_bytes()
    rows, num_tokens = load_file(path)["rows"], len(load_file(path)["states"])
    assert torch.equal(read_part(path, rows, num_tokens), reference._parts[0])
    in_header = 8 + int.from_bytes(whole[:8], "little")
    for i in [*range(in_header), *range(in_header, len(whole), 97)]:
        damaged = bytearray(whole)
        damaged[i] ^= 1 << i % 8
        path.write_bytes(damaged)
        assert read_part(path, rows, num_tokens) is None, i
        assert "is computed again" in caplog.text
        caplog.clear()
    counting = Counting(base)
    again = ReferenceCache.build(wrap(base), dataset, collator, tmp_path)
    assert counting.rows == 13 + CHECKED
    assert path.read_bytes() == whole
    batch = batches(dataset, collator)[2]
    assert torch.equal(again.logits(batch), reference.logits(batch))


@pytest.mark.parametrize("keep_metadata", [True, False])
def test_changed_states_outside_the_rows_that_are_checked_are_computed_again(tmp_path, monkeypatch, keep_metadata):
    monkeypatch.setattr(spul.training.reference, "ROWS_CHECKED", 1)  # the longest row
    dataset, collator, base = make_answers(), make_collator(), build("llama")
    ReferenceCache.build(wrap(base), dataset, collator, tmp_path)
    path = tmp_path / "part-00000.safetensors"
    tensors, whole = load_file(path), path.read_bytes()
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() if keep_metadata else None
    save_file(tensors | {"states": torch.cat([tensors["states"][:-7], tensors["states"][-7:] + 1])}, path, metadata)
    ReferenceCache.build(wrap(base), dataset, collator, tmp_path)
    assert path.read_bytes() == whole


def test_a_folder_that_does_not_keep_what_is_written_is_refused(tmp_path, monkeypatch):
    def write_other(path, states, rows):
        write_part(path, states, rows)
        path.write_bytes(path.read_bytes()[:-1] + b"\x7f")

    monkeypatch.setattr(spul.training.reference_parts, "write_part", write_other)
    with pytest.raises(OSError, match="is not what was just written to it; name another folder"):
        ReferenceCache.build(wrap(build("llama")), make_answers(), make_collator(), tmp_path)


@pytest.mark.parametrize("change", ["fewer rows", "another completion", "another prompt", "cut shorter"])
def test_other_data_are_refused(change, tmp_path):
    unlearner, dataset, collator = wrap(build("llama")), make_answers(), make_collator()
    ReferenceCache.build(unlearner, dataset, collator, tmp_path)
    if change == "fewer rows":
        dataset = dataset.select(range(len(dataset) - 1))
    elif change == "cut shorter":
        collator = make_collator(max_length=20)
    else:
        column = change.split()[1]
        dataset = Dataset.from_list([{**row, column: row[column] + " good"} for row in dataset])
    now = 12 if change == "fewer rows" else 13
    with pytest.raises(ValueError, match=f"its 13 rows are not the {now} of now, or were truncated or tokenized"):
        ReferenceCache.build(unlearner, dataset, collator, tmp_path)


def test_another_precision_is_refused(tmp_path):
    dataset, collator = make_answers(), make_collator()
    ReferenceCache.build(wrap(build("llama")), dataset, collator, tmp_path)
    with pytest.raises(ValueError, match=r"another precision \(float32, autocast None, now bfloat16, autocast None\)"):
        ReferenceCache.build(wrap(build("llama", torch.bfloat16)), dataset, collator, tmp_path)


def test_a_row_that_changed_after_the_cache_was_built_is_refused(tmp_path):
    unlearner, dataset, collator = wrap(build("llama")), make_answers(), make_collator()
    reference = ReferenceCache.build(unlearner, dataset, collator, tmp_path)
    retain = [row for row in dataset if not row["is_forget"]]
    for wrong in (
        {**retain[1], "prompt": "another text :"},
        {**retain[1], "completion": retain[3]["completion"]},
        {**retain[1], "row_id": 99},
        {**retain[1], "row_id": 8},  # another row's
    ):
        first = wrong["row_id"]
        with pytest.raises(
            ValueError, match=rf"1 of 2 rows of the batch are not, .* among the 13 .* \(row_id {first} is the first\)"
        ):
            reference.logits(collator([retain[0], wrong]))


def test_every_single_changed_token_is_seen(tmp_path):
    unlearner, dataset, collator = wrap(build("llama")), make_answers(), make_collator()
    reference = ReferenceCache.build(unlearner, dataset, collator, tmp_path)
    batch = collator([dataset[10]])
    length = int(batch["attention_mask"].sum())
    for i in range(length):
        for token in range(3, VOCABULARY):
            changed = {name: tensor.clone() for name, tensor in batch.items()}
            changed["input_ids"][0, i] = token
            if token == batch["input_ids"][0, i]:
                assert reference.logits(changed) is not None
            elif token % 20 == 3:
                with pytest.raises(ValueError, match="the data changed"):
                    reference.logits(changed)
            else:
                assert row_checksums(changed) != row_checksums(batch)


def test_checksums_see_order_and_response_and_no_padding():
    ids = torch.tensor([[5, 6, 7, 8], [6, 5, 7, 8], [5, 6, 7, 8], [5, 6, 7, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 0]])
    labels = torch.tensor([[-100, -100, -100, 8], [-100, -100, -100, 8], [-100, -100, 7, 8], [-100, -100, 7, -100]])
    found = row_checksums({"input_ids": ids, "attention_mask": mask, "labels": labels})
    assert len(set(found.tolist())) == 4
    pad = torch.nn.functional.pad
    for left, right in ((0, 3), (2, 0), (1, 4)):
        padded = {
            "input_ids": pad(ids, (left, right), value=9),
            "attention_mask": pad(mask, (left, right)),
            "labels": pad(labels, (left, right), value=-100),
        }
        assert torch.equal(row_checksums(padded), found)


def test_rows_without_an_id_of_their_own_are_refused(tmp_path):
    unlearner, dataset, collator = wrap(build("llama")), make_answers(), make_collator()
    with pytest.raises(ValueError, match=r"the rows have no row_id; .*Make the data set with forget_retain_dataset"):
        ReferenceCache.build(unlearner, dataset.remove_columns("row_id"), collator, tmp_path / "none")
    same = dataset.map(lambda row: {"row_id": row["row_id"] // 2})
    with pytest.raises(ValueError, match=r"6 row_id\(s\), such as 3, stand at more than one row"):
        ReferenceCache.build(unlearner, same, collator, tmp_path / "same")
    reference = ReferenceCache.build(unlearner, dataset, collator, tmp_path / "all")
    batch = batches(dataset, collator)[2]
    del batch["row_id"]
    with pytest.raises(ValueError, match=r"the batch has no row_id, only \['attention_mask'"):
        reference.logits(batch)


def test_rows_of_one_content_each_have_their_reference_and_other_forget_rows_the_same_files(tmp_path):
    unlearner, collator = wrap(build("llama")), make_collator()
    retain = answers("film", 4)
    twice = Dataset.from_list([*retain, *retain])
    reference = ReferenceCache.build(unlearner, forget_retain_dataset(answers("jane", 2), twice), collator, tmp_path)
    assert len(reference) == 8
    later = forget_retain_dataset(answers("jane", 5), twice)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    again = ReferenceCache.build(unlearner, later, collator, tmp_path)
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    logits = again.logits(collator([later[i] for i in (6, 10)]))
    assert torch.equal(logits[0], logits[1])


def test_a_loss_that_compares_no_row_needs_no_reference(tmp_path):
    loss = UnlearningLoss(beta=0.0)
    with pytest.raises(ValueError, match=r"no reference is needed\. Leave reference_logits out"):
        ReferenceCache.build(wrap(build("llama")), make_answers(), make_collator(), tmp_path, loss=loss)


def test_a_folder_of_other_things_is_not_written_to(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds other files and no reference"):
        ReferenceCache.build(wrap(build("llama")), make_answers(), make_collator(), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
