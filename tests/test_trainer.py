"""UnlearningTrainer: the same step however it is cut up, logs and evaluation; and life without it."""

import json
from collections import Counter

import pytest
import torch
from datasets import Dataset, concatenate_datasets
from helpers import (
    GENERIC,
    ONE_STEP,
    arguments,
    assert_same,
    build,
    make_collator,
    make_dataset,
    make_trainer,
    make_unlearner,
    prompt_state,
    rows,
    trainable_model,
)
from transformers import Trainer, TrainerCallback

from spul import SpulConfig, UnlearningLayers, UnlearningLoss, UnlearningTrainer
from spul.data.dataset import forget_retain_dataset
from spul.evaluation.metrics.scoring import score_completions
from spul.records.digests import RewrittenRows, is_summary_of, make_digest_key, read_digest_key

# ---- one step, however it is cut up ----


@pytest.mark.parametrize("forget_fraction", [None, 0.25])
def test_32_rows_and_4_times_8_make_the_same_step(tmp_path, prompt_type, forget_fraction):
    states = []
    for size, steps in ((32, 1), (8, 4)):
        trainer = make_trainer(
            tmp_path,
            prompt_type,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            forget_fraction=forget_fraction,
            **ONE_STEP,
        )
        before = prompt_state(trainer.model)
        trainer.train()
        states.append(prompt_state(trainer.model))
        assert any((states[-1][name] - before[name]).abs().max() > 1e-4 for name in before)
    assert_same(*states, rtol=0, atol=1e-6)


class Poison(TrainerCallback):
    """Fills a parameter that trains with a value, after a step, and remembers all parameters."""

    def __init__(self, step, value):
        self.step, self.value, self.after = step, value, None

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            parameter = [p for p in model.parameters() if p.requires_grad][-1]
            with torch.no_grad():
                parameter.fill_(self.value)
            self.after = [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("trainable", ["prompt", "layers", "lora", "all"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_training_stops_at_the_first_term_that_is_not_finite_before_the_optimizer_steps(tmp_path, trainable, value):
    model = make_unlearner() if trainable == "prompt" else trainable_model(trainable, dtype=torch.float32)
    poison = Poison(2, value)
    trainer = UnlearningTrainer(
        model,
        arguments(tmp_path, per_device_train_batch_size=8, gradient_accumulation_steps=2, max_steps=9),
        make_collator(),
        make_dataset(),
        loss=None if trainable == "prompt" else UnlearningLoss(),
        callbacks=[poison],
    )
    with pytest.raises(FloatingPointError, match=r"step 3: forget_loss=.*nan.*; expected finite values"):
        trainer.train()
    assert trainer.state.global_step == 2
    for before, now in zip(poison.after, trainer.model.parameters(), strict=True):
        torch.testing.assert_close(now.detach(), before, rtol=0, atol=0, equal_nan=True)


# ---- logging and evaluation ----


def test_every_term_is_logged_and_they_add_up(tmp_path):
    loss = UnlearningLoss(alpha=0.5, beta=2.0)
    trainer = make_trainer(
        tmp_path,
        unlearner=make_unlearner(loss=loss),
        gradient_accumulation_steps=2,
        per_device_train_batch_size=4,
        logging_steps=2,
        max_steps=4,
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "forget_loss" in entry]
    assert len(logs) == 2
    for entry in logs:
        expected = entry["forget_loss"] + 0.5 * entry["retain_loss"] + 2.0 * entry["kl_loss"]
        assert entry["loss"] == pytest.approx(expected, rel=1e-3)
        assert min(entry["forget_loss"], entry["retain_loss"], entry["kl_loss"]) > 0


def test_evaluation_tells_accuracy_f1_and_generic_share_of_each_split(tmp_path):
    sets = {"train_forget": rows("jane", 9), "test_retain": rows("other", 8)}
    trainer = make_trainer(tmp_path, eval_dataset=sets)
    metrics = trainer.evaluate()
    for name, split in sets.items():
        own = score_completions(trainer.model, split, make_collator())
        for measure in ("accuracy", "f1", "generic", "loss"):
            assert metrics[f"eval_{name}_{measure}"] == pytest.approx(own[measure])
    assert set(trainer.model.spul_config.metrics) == set(sets)
    one = trainer.evaluate(sets["train_forget"], metric_key_prefix="test")
    assert one["test_accuracy"] == metrics["eval_train_forget_accuracy"]


def test_rewritten_rows_are_recorded_apart_and_the_digests_are_of_the_rows_given(tmp_path):
    made = [rows(name, 2).add_column("rewritten_by", ["capitals", "spaces"]) for name in ("doe", "good")]
    given = [rows(name, num) for name, num in (("jane", 11), ("film", 21))]
    dataset = forget_retain_dataset(*map(concatenate_datasets, zip(given, made, strict=True)))
    record = make_trainer(tmp_path, dataset=dataset, digest_key=bytes(16)).model.spul_config
    assert record.rewritten == RewrittenRows(2, 2, ["capitals", "spaces"])
    assert is_summary_of(record.forget, given[0], bytes(16))
    assert is_summary_of(record.retain, given[1], bytes(16))
    record = make_trainer(tmp_path, dataset=list(dataset)).model.spul_config
    assert (record.forget.rows, record.retain.rows, record.rewritten.forget) == (11, 21, 2)
    assert make_trainer(tmp_path).model.spul_config.rewritten is None


def test_the_saved_adapter_knows_its_data(tmp_path):
    key = make_digest_key(tmp_path / "key")
    trainer = make_trainer(tmp_path, max_steps=1, digest_key=key)
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    config = json.loads((tmp_path / "adapter" / "spul_config.json").read_text())
    assert (config["forget"]["rows"], config["retain"]["rows"]) == (11, 21)
    assert config["forget"]["digest"] != config["retain"]["digest"]
    assert config["generic_completions"] == GENERIC
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert config["forget"]["digest"] in card
    assert "jane" not in card
    record = SpulConfig.load(tmp_path / "adapter" / "spul_config.json")
    assert is_summary_of(record.forget, rows("jane", 11).shuffle(seed=1), key)
    assert is_summary_of(record.retain, rows("film", 21), key)
    assert not is_summary_of(record.forget, rows("doe", 11), key)
    for file in (tmp_path / "adapter").iterdir():
        assert read_digest_key(key).hex().encode() not in file.read_bytes()


@pytest.mark.parametrize("kind", ["prompt_tuning", "layers"])
def test_without_a_key_no_file_of_the_adapter_has_a_digest_of_rows(tmp_path, kind):
    model = UnlearningLayers(build("llama")) if kind == "layers" else make_unlearner(kind)
    loss = UnlearningLoss() if kind == "layers" else None
    UnlearningTrainer(model, arguments(tmp_path), make_collator(), make_dataset(), loss=loss)
    model.save_pretrained(str(tmp_path / "adapter"))
    config = json.loads((tmp_path / "adapter" / "spul_config.json").read_text())
    assert config["forget"] == {"rows": 11, "digest": None}
    assert config["retain"] == {"rows": 21, "digest": None}
    assert "- forget set: 11 rows\n" in (tmp_path / "adapter" / "README.md").read_text()


def test_a_key_that_is_none_is_refused_before_training(tmp_path):
    with pytest.raises(FileNotFoundError, match="make one with spul"):
        make_trainer(tmp_path, digest_key=tmp_path / "key")
    with pytest.raises(ValueError, match="digest_key has 3 bytes"):
        make_trainer(tmp_path, digest_key=b"abc")


# ---- without UnlearningTrainer ----


def test_a_plain_trainer_trains_the_same_model(tmp_path):
    unlearner = make_unlearner()
    before = prompt_state(unlearner)
    settings = arguments(tmp_path, max_steps=12, remove_unused_columns=False, gradient_accumulation_steps=2)
    trainer = Trainer(unlearner, settings, make_collator(), make_dataset())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-3:]) < sum(losses[:3])
    assert any(not torch.equal(before[name], value) for name, value in prompt_state(unlearner).items())


def test_a_plain_trainers_accumulated_step_is_no_larger_than_one_batch(tmp_path):
    """Same rows, same groups in each micro-batch: accumulation must not multiply the gradient."""
    dataset = forget_retain_dataset(rows("jane", 8), rows("film", 8))
    order = [row for i in range(8) for row in (i, 8 + i)]
    states = []
    for size, steps in ((16, 1), (4, 4)):
        unlearner = make_unlearner()
        settings = arguments(
            tmp_path,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            remove_unused_columns=False,
            train_sampling_strategy="sequential",
            **ONE_STEP,
        )
        # Completions of one token, so that all micro-batches weigh the same.
        collator = make_collator(generic_completions=[" x"])
        one_token = dataset.map(lambda row: {"completion": " a"}).select(order)
        Trainer(unlearner, settings, collator, one_token).train()
        states.append(prompt_state(unlearner))
    assert_same(*states, rtol=0, atol=1e-6)


def test_an_accelerate_loop_trains_the_same_model():
    from accelerate import Accelerator
    from torch.utils.data import DataLoader

    accelerator = Accelerator(cpu=True)
    unlearner = make_unlearner()
    optimizer = torch.optim.AdamW([p for p in unlearner.parameters() if p.requires_grad], lr=1e-2)
    loader = DataLoader(make_dataset(), batch_size=8, shuffle=True, collate_fn=make_collator())
    model, optimizer, loader = accelerator.prepare(unlearner, optimizer, loader)
    losses = []
    for _ in range(5):
        for batch in loader:
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert sum(losses[-4:]) < sum(losses[:4])


def test_column_pruning_raises_and_names_the_argument(tmp_path):
    tokenized = make_dataset().map(make_collator().tokenize)
    settings = arguments(tmp_path, max_steps=1)
    with pytest.raises(ValueError, match=r"remove_unused_columns=False"):
        Trainer(make_unlearner(), settings, make_collator(), tokenized).train()
    make_trainer(tmp_path, dataset=tokenized, max_steps=1).train()  # UnlearningTrainer keeps the columns it needs


@pytest.mark.parametrize("kind", ["text", "tokenized"])
@pytest.mark.parametrize("forget_fraction", [None, 0.25])
def test_rows_of_like_length_meet_also_under_a_forget_fraction(tmp_path, kind, forget_fraction):
    def of_lengths(name, num):
        return Dataset.from_list(
            [{"prompt": f"{name} {i} " + "x " * (i * 7 % 29), "completion": " positive"} for i in range(num)]
        )

    collator = make_collator(max_length=96)
    dataset = forget_retain_dataset(of_lengths("jane", 60), of_lengths("film", 180))
    if kind == "tokenized":
        dataset = dataset.map(collator.tokenize, remove_columns=["prompt", "completion"])
    padding = {}
    for strategy in ("random", "group_by_length"):
        options = {"forget_fraction": forget_fraction, "train_sampling_strategy": strategy, "max_steps": 2}
        trainer = make_trainer(tmp_path, dataset=dataset, collator=collator, **options)
        batches = list(trainer.get_train_dataloader())
        padding[strategy] = sum(int((batch["attention_mask"] == 0).sum()) for batch in batches)
        if forget_fraction is not None:
            assert all(batch["is_forget"].sum() == 2 for batch in batches)
        trainer.train()
    assert padding["group_by_length"] < 0.5 * padding["random"]


def test_a_forget_fraction_and_another_order_contradict_each_other(tmp_path):
    with pytest.raises(ValueError, match=r"forget_fraction=0\.5 and train_sampling_strategy="):
        make_trainer(tmp_path, forget_fraction=0.5, train_sampling_strategy="sequential")


@pytest.mark.parametrize("kind", ["text", "tokenized"])
@pytest.mark.parametrize("options", [{}, {"forget_fraction": 0.5}, {"train_sampling_strategy": "group_by_length"}])
def test_retain_rows_are_trained_on_as_often_as_their_weights_say(tmp_path, kind, options):
    collator = make_collator()
    dataset = forget_retain_dataset(rows("jane", 11), rows("film", 21), retain_weight=[4, 2] + [1] * 19)
    if kind == "tokenized":
        dataset = dataset.map(collator.tokenize, remove_columns=dataset.column_names)
    trainer = make_trainer(tmp_path, dataset=dataset, collator=collator, max_steps=2, **options)
    drawn = Counter(int(i) for batch in trainer.get_train_dataloader() for i in batch["row_id"])
    forget = [drawn.pop(i) for i in range(11)]
    if "forget_fraction" in options:  # as many as the retain draws
        assert (sum(forget), min(forget), max(forget)) == (25, 2, 3)
    else:
        assert forget == [1] * 11
    assert drawn == {11: 4, 12: 2, **dict.fromkeys(range(13, 32), 1)}
    trainer.train()


def test_weights_and_another_order_contradict_each_other(tmp_path):
    dataset = forget_retain_dataset(rows("jane", 2), rows("film", 2), retain_weight=[1, 2])
    with pytest.raises(ValueError, match="the column sampling_weight and train_sampling_strategy='sequential'"):
        make_trainer(tmp_path, dataset=dataset, train_sampling_strategy="sequential")


def test_forget_fraction_holds_in_every_batch(tmp_path):
    trainer = make_trainer(tmp_path, forget_fraction=0.25)
    for batch in trainer.get_train_dataloader():
        assert batch["is_forget"].float().mean() == pytest.approx(0.25, abs=0.13)
        if len(batch["is_forget"]) == 8:
            assert batch["is_forget"].sum() == 2


def test_bf16_training_stays_close_to_float32(tmp_path):
    finals = []
    for bf16 in (False, True):
        trainer = make_trainer(tmp_path, max_steps=6, bf16=bf16)
        trainer.train()
        finals.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert finals[1] == pytest.approx(finals[0], rel=0.05)


@pytest.mark.parametrize("prompt_type", ["prompt_tuning", "prefix_tuning"])
def test_gradient_checkpointing_trains_the_same(tmp_path, prompt_type):
    plain, checkpointed = (
        make_trainer(tmp_path, prompt_type, max_steps=2),
        make_trainer(tmp_path, prompt_type, max_steps=2, gradient_checkpointing=True),
    )
    plain.train()
    checkpointed.train()
    assert_same(prompt_state(plain.model), prompt_state(checkpointed.model), rtol=1e-3, atol=1e-4)
