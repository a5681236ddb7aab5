"""ReferenceCache: cached reference logits are the base model's, of the row with this id and no other."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from helpers import (
    CONFIGS,
    ONE_STEP,
    VOCABULARY,
    Counting,
    answers,
    assert_same,
    build,
    make_answers,
    make_collator,
    make_trainer,
    make_unlearner,
    prompt_state,
    rows,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CohereConfig, CohereForCausalLM, GraniteConfig, GraniteForCausalLM

import spul.training.reference
from spul import ReferenceCache, SoftPromptUnlearner, UnlearningLoss
from spul.data.dataset import forget_retain_dataset
from spul.losses.terms import CrossEntropy, KLDivergence
from spul.records.files import SCRATCH
from spul.training.reference import row_checksums
from spul.training.reference_files import describe, read_part, without_dropout, write_part

SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


CHECKED = 2 * spul.training.reference.ROWS_CHECKED  # each once for its logits and once for its states


def build_any(name):
    scaling = {
        "cohere": lambda: CohereForCausalLM(CohereConfig(**SHAPE, logit_scale=0.3)),
        "granite": lambda: GraniteForCausalLM(GraniteConfig(**SHAPE, logits_scaling=4.0)),
    }
    if name not in scaling:
        return build(name)
    torch.manual_seed(0)
    base = scaling[name]().eval()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return base


def wrap(base, loss=None):
    torch.manual_seed(3)
    return SoftPromptUnlearner(base, CONFIGS["prompt_tuning"](4), loss=loss)


def batches(dataset, collator, size=6):
    return [collator([dataset[i] for i in range(start, min(start + size, len(dataset)))]) for start in (0, 4, 12)]


# ---- the same loss ----


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "qwen3", "gemma3", "gpt_neox", "cohere", "granite"])
@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_cached_and_live_give_the_same_loss_and_gradient(family, direction, tmp_path):
    unlearner = wrap(build_any(family), UnlearningLoss(kl=KLDivergence(direction=direction)))
    dataset, collator = make_answers(), make_collator()
    reference = ReferenceCache.build(unlearner, dataset, collator, tmp_path / "reference", batch_size=4)
    for batch in batches(dataset, collator):
        found = []
        for more in ({}, {"reference_logits": reference.logits(batch)}):
            unlearner.zero_grad()
            out = unlearner(**batch, **more)
            out.loss.backward()
            gradients = [p.grad.clone() for p in unlearner.prompt_encoder.parameters()]
            found.append([out.loss, out.forget_loss, out.retain_loss, out.kl_loss, *gradients])
        assert not batch["is_forget"].all()
        assert out.kl_loss > 1e-4
        for live, cached in zip(*found, strict=True):
            torch.testing.assert_close(live, cached, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["text", "tokenized"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_the_trainer_takes_the_same_steps_with_either(kind, family, tmp_path):
    states, logs = [], []
    for mode in ("live", "cached"):
        collator = make_collator()
        dataset = make_answers()
        dataset = (
            dataset if kind == "text" else dataset.map(collator.tokenize, remove_columns=["prompt", "completion"])
        )
        trainer = make_trainer(
            tmp_path,
            unlearner=wrap(build(family)),
            dataset=dataset,
            collator=collator,
            reference=mode,
            max_steps=6,
            gradient_accumulation_steps=2,
            optim="sgd",
        )
        trainer.train()
        assert (trainer._reference is not None) == (mode == "cached")
        states.append(prompt_state(trainer.model))
        logs.append([entry["kl_loss"] for entry in trainer.state.log_history if "kl_loss" in entry])
    assert_same(*states, rtol=1e-5, atol=1e-6)
    assert logs[0] == pytest.approx(logs[1], rel=1e-4)
    assert max(logs[0]) > 1e-3


def test_bf16_bases_and_autocast_give_the_live_loss_to_their_precision(tmp_path):
    dataset, collator = make_answers(), make_collator()
    batch = batches(dataset, collator)[1]
    for name, base, autocast in (("base", build("llama", torch.bfloat16), False), ("autocast", build("llama"), True)):
        unlearner = wrap(base)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            reference = ReferenceCache.build(unlearner, dataset, collator, tmp_path / name)
            live = unlearner(**batch)
            cached = unlearner(**batch, reference_logits=reference.logits(batch))
        assert cached.kl_loss.item() == pytest.approx(live.kl_loss.item(), rel=0.1)
        (states,) = (part["states"] for part in stored_parts(tmp_path / name))
        assert states.dtype == next(base.parameters()).dtype


def stored_parts(folder):
    return [load_file(path) for path in sorted(folder.glob("*.safetensors"))]


def test_states_hold_d_values_in_the_bases_precision_and_at_most_16_bytes_a_token(tmp_path):
    unlearner = wrap(build("llama", torch.float16))
    one_token = forget_retain_dataset(rows("jane", 3), rows("film", 300))
    assert len(ReferenceCache.build(unlearner, one_token, make_collator(), tmp_path)) == 300
    parts = stored_parts(tmp_path)
    assert sum(len(part["states"]) for part in parts) == 300
    assert sum(tensor.nbytes for part in parts for tensor in part.values()) <= 300 * (32 * 2 + 16)


def test_padding_batch_mates_and_order_do_not_matter(tmp_path):
    unlearner, dataset, collator = wrap(build("opt")), make_answers(), make_collator()
    reference = ReferenceCache.build(unlearner, dataset, collator, tmp_path / "reference", batch_size=3)
    alone = [reference.logits(collator([row])) for row in dataset if not row["is_forget"]]
    places = [i for i in range(len(dataset)) if not dataset[i]["is_forget"]]
    order = torch.randperm(len(places), generator=torch.Generator().manual_seed(1)).tolist()
    together = reference.logits(collator([dataset[places[i]] for i in order]))
    for at, i in enumerate(order):
        torch.testing.assert_close(together[at, : alone[i].shape[1]], alone[i][0])
        assert not together[at, alone[i].shape[1] :].isnan().any()


# ---- stored, shared, resumed ----


def test_a_later_run_computes_nothing_but_its_check(tmp_path):
    dataset, collator = make_answers(), make_collator()
    base = build("llama")
    counting = Counting(base)
    ReferenceCache.build(wrap(base), dataset, collator, tmp_path / "reference")
    assert counting.rows >= 13
    other_base = build("llama")
    counting = Counting(other_base)
    ReferenceCache.build(wrap(other_base), dataset.shuffle(seed=1), collator, tmp_path / "reference")
    assert counting.rows == CHECKED


def test_without_a_folder_every_base_and_data_set_has_its_own(cache_home, tmp_path):
    dataset, collator = make_answers(), make_collator()
    first = ReferenceCache.build(wrap(build("llama")), dataset, collator)
    again = ReferenceCache.build(wrap(build("llama")), dataset, collator)
    other_base = ReferenceCache.build(wrap(build("opt")), dataset, collator)
    other_data = ReferenceCache.build(wrap(build("llama")), make_answers(5, 12), collator)
    assert first.folder == again.folder
    assert first.folder.is_relative_to(cache_home)
    assert len({first.folder, other_base.folder, other_data.folder}) == 3


def test_an_interrupted_computation_goes_on_where_it_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(spul.training.reference, "MIN_ROWS_PER_PART", 3)
    dataset, collator, folder = make_answers(), make_collator(), tmp_path / "reference"
    base = build("llama")
    write, written = spul.training.reference.write_part, []

    def write_two(path, *args):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path)
        write(path, *args)

    monkeypatch.setattr(spul.training.reference, "write_part", write_two)
    with pytest.raises(KeyboardInterrupt):
        ReferenceCache.build(wrap(base), dataset, collator, folder)
    monkeypatch.setattr(spul.training.reference, "write_part", write)
    assert sorted(p.name for p in folder.iterdir()) == [
        "part-00000.safetensors",
        "part-00001.safetensors",
        "reference.json",
    ]
    written[1].write_bytes(written[1].read_bytes()[:-40])  # as a full disk leaves it
    counting = Counting(base)
    resumed = ReferenceCache.build(wrap(base), dataset, collator, folder)
    assert counting.rows == 13 - 3 + CHECKED
    whole = ReferenceCache.build(wrap(base), dataset, collator, tmp_path / "whole")
    batch = batches(dataset, collator)[2]
    assert torch.equal(resumed.logits(batch), whole.logits(batch))
    for one, other in zip(stored_parts(folder), stored_parts(tmp_path / "whole"), strict=True):
        assert all(torch.equal(one[name], other[name]) for name in ("states", "rows"))
    assert not base.training


# ---- what is stored must be true ----


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

    monkeypatch.setattr(spul.training.reference, "write_part", write_other)
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


def test_a_folder_of_other_things_is_not_written_to(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds other files and no reference"):
        ReferenceCache.build(wrap(build("llama")), make_answers(), make_collator(), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_unknown_output_head_is_refused(dtype, tmp_path):
    base = build("llama", dtype)
    forward = base.forward

    def capped(*args, **kwargs):
        out = forward(*args, **kwargs)
        cap = 3 * out.logits.abs().max()
        out.logits = torch.tanh(out.logits / cap) * cap
        return out

    base.forward = capped
    with pytest.raises(ValueError, match="does more between its output embeddings and its logits"):
        ReferenceCache.build(wrap(base), make_answers(), make_collator(), tmp_path)


def test_a_head_that_is_trained_is_copied(tmp_path):
    dataset, collator = make_answers(), make_collator()
    unlearner = wrap(build("llama"))
    base = unlearner.get_base_model()
    base.lm_head.weight.requires_grad_(True)
    reference = ReferenceCache.build(unlearner, dataset, collator, tmp_path)
    batch = batches(dataset, collator)[2]
    before = reference.logits(batch)
    with torch.no_grad():
        base.lm_head.weight.add_(1.0)
    torch.testing.assert_close(reference.logits(batch), before, rtol=0, atol=0)


@pytest.mark.parametrize("resample", [True, False])
def test_forget_terms_on_generic_completions_are_cached_with_each_that_may_be_drawn(tmp_path, resample):
    unlearner = wrap(build("llama"), UnlearningLoss(beta=0.0, forget=KLDivergence()))
    dataset, collator = make_answers(), make_collator(resample=resample)
    reference = ReferenceCache.build(unlearner, dataset, collator, tmp_path)
    num_forget = sum(dataset["is_forget"])
    assert len(reference) == num_forget * (len(collator.generic_completions) if resample else 1)
    seen = set()
    for batch in [batch for _ in range(4) for batch in batches(dataset, collator)]:
        live, cached = unlearner(**batch), unlearner(**batch, reference_logits=reference.logits(batch))
        torch.testing.assert_close(live.forget_loss, cached.forget_loss, rtol=1e-5, atol=1e-6)
        seen |= {tuple(labels[labels != -100].tolist()) for labels in batch["labels"][batch["is_forget"]]}
    assert len(seen) == len(collator.generic_completions)


def test_forget_terms_on_true_completions_can_be_cached(tmp_path):
    unlearner = wrap(build("llama"), UnlearningLoss(forget=KLDivergence()))
    dataset, collator = make_answers(), make_collator(generic_completions=None)
    reference = ReferenceCache.build(unlearner, dataset, collator, tmp_path)
    assert len(reference) == len(dataset)
    batch = batches(dataset, collator)[1]
    live, cached = unlearner(**batch), unlearner(**batch, reference_logits=reference.logits(batch))
    torch.testing.assert_close(live.forget_loss, cached.forget_loss, rtol=1e-5, atol=1e-6)


def test_own_terms_that_need_no_reference_build_none(tmp_path):
    @dataclass(frozen=True)
    class Own(CrossEntropy):
        pass

    for loss in (UnlearningLoss(beta=0.0), UnlearningLoss(kl=Own())):
        trainer = make_trainer(
            tmp_path, unlearner=make_unlearner(loss=loss), reference_dir=tmp_path / "none", **ONE_STEP
        )
        trainer.train()
        assert trainer._reference is None
        assert not (tmp_path / "none").exists()


def test_the_states_are_memory_mapped(tmp_path):
    reference = ReferenceCache.build(wrap(build("llama")), make_answers(), make_collator(), tmp_path)
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("only Linux tells what is mapped")
    assert str(tmp_path / "part-00000.safetensors") in maps.read_text()
    assert len(reference) == 13


@pytest.mark.parametrize(
    "wrong", [{"reference": "cache"}, {"reference": None}, {"reference": "live", "reference_dir": "somewhere"}]
)
def test_unknown_choices_of_reference_raise(wrong, tmp_path):
    with pytest.raises(ValueError, match="expected 'cached', with or without a folder, or 'live' without one"):
        make_trainer(tmp_path, **wrong)


def test_reference_logits_of_another_shape_raise():
    unlearner, dataset, collator = wrap(build("llama")), make_answers(), make_collator()
    batch = batches(dataset, collator)[2]
    with pytest.raises(ValueError, match=r"reference_logits have the shape \(1, 2, 3\); expected"):
        unlearner(**batch, reference_logits=torch.zeros(1, 2, 3))


def test_the_index_says_what_the_files_belong_to(tmp_path):
    ReferenceCache.build(wrap(build("llama")), make_answers(), make_collator(), tmp_path)
    index = json.loads((tmp_path / "reference.json").read_text())
    assert index["rows"] == 13  # the retain rows
    assert index["precision"] == "float32, autocast None"
    assert len(index["base"]) == 64
