"""Prompts inside the rows in scoring, measures, attacks and training: each row as it is alone."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from helpers import CONFIGS, arguments, make_collator, make_tokenizer, rows
from likelihoods import plain_likelihood, plain_logits
from peft import PromptTuningConfig
from plain import losses, row_logits
from small_evaluations import ATTACKS, learned, make_splits, measured, per_row

from spul import SoftPromptUnlearner, UnlearningTrainer, combine
from spul.data.dataset import forget_retain_dataset
from spul.evaluation.attacks import letter_case, relearn, soft_suffix, with_prefix
from spul.evaluation.attacks.sampling import sampled_answers, sampled_success
from spul.evaluation.attacks.suffix import _logits, _with_placeholders
from spul.evaluation.metrics import generate_answers, response_likelihoods, text_losses
from spul.evaluation.metrics.embeddings import response_embeddings
from spul.evaluation.metrics.membership import gradient_norm_attack
from spul.evaluation.metrics.scoring import collect_answers, score_completions
from spul.gates import GatedUnlearner, NameGate
from spul.losses.positions import response_positions
from spul.training.distillation import virtual_tokens

pytestmark = pytest.mark.usefixtures("few_resamples")


def with_text(some: Dataset) -> Dataset:
    """The rows after two others, with the text before which the prompt stands."""
    turns = "is the film good : yes\n" * 2
    return some.map(lambda row: {"text": row["prompt"][:-2], "prompt": turns + row["prompt"]})


def at_message(**kwargs):
    return make_collator(**{"max_length": 64, "prompt_position": "message", "text_field": "text", **kwargs})


def make_model(p=3, seed=3, prompt_position="message", dtype=torch.float32):
    torch.manual_seed(seed)
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=p)
    model = SoftPromptUnlearner(learned().to(dtype), config, prompt_position=prompt_position)
    with torch.no_grad():
        model.prompt_encoder["default"].embedding.weight.normal_(0, 0.5)
    return model.to(dtype).eval()


DATA = with_text(make_splits()["test_retain"])


# ---- measures ----


def test_likelihoods_and_scores_are_those_of_each_row_alone():
    model, collator = make_model(dtype=torch.float64), at_message()
    found = response_likelihoods(model, DATA, collator.encoder, 4)
    answers = collect_answers(model, DATA, collator, 4, range(len(DATA)))
    elsewhere = response_likelihoods(make_model(prompt_position="start", dtype=torch.float64), DATA, collator.encoder)
    for i, row in enumerate(DATA):
        expected = plain_likelihood(model, row, collator)
        np.testing.assert_allclose(found[i].log_probs, expected["log_probs"], rtol=1e-6)
        assert answers.nll[i] == pytest.approx(-sum(expected["log_probs"]), rel=1e-5)
        assert (answers.predicted[i] == row["completion"]) == all(expected["is_greedy"])
        assert abs(elsewhere[i].log_probs - expected["log_probs"]).max() > 1e-3
    assert score_completions(model, DATA, collator)["loss"] == pytest.approx(np.mean(answers.nll), rel=1e-5)


def test_tokenized_rows_are_scored_as_texts_are():
    model, collator = make_model(), at_message()
    tokenized = DATA.map(collator.tokenize, remove_columns=DATA.column_names)
    assert "prompt_position" in tokenized.column_names
    one, other = (response_likelihoods(model, some, collator.encoder) for some in (DATA, tokenized))
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a.log_probs, b.log_probs)
    assert "prompt_position" not in make_collator().tokenize(DATA[0])


def test_answers_and_samples_are_those_of_each_row_alone():
    model, encoder = make_model(dtype=torch.float64), at_message().encoder
    found = generate_answers(model, DATA, encoder, 4, max_new_tokens=5)
    sampled = sampled_answers(model, DATA.select(range(2)), encoder, 2, temperature=1e-4, max_new_tokens=5)
    for i, row in enumerate(DATA):
        encoded, tokens = encoder.encode(row), []
        while len(tokens) < 5 and (not tokens or tokens[-1] != 2):
            logits = plain_logits(model, encoded.prompt_ids, [*tokens, 0], encoded.prompt_position)
            tokens.append(int(logits[-1].argmax()))
        assert found[i] == encoder.tokenizer.decode(tokens, skip_special_tokens=True)
        assert i > 1 or sampled[i] == [found[i]] * 2


def test_states_gradients_and_samples_are_measured_where_the_prompt_stands():
    model, encoder = make_model(), at_message().encoder
    together, alone = (
        [
            response_embeddings(model, DATA, encoder, size),
            sampled_success(model, DATA, encoder, 3, batch_size=size),
        ]
        for size in (4, 1)
    )
    for one, other in zip(together, alone, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)
    elsewhere = response_embeddings(make_model(prompt_position="start"), DATA, encoder)
    assert np.abs(together[0] - elsewhere).max() > 1e-2
    assert (gradient_norm_attack(model, DATA, encoder, "adapter") < 0).all()


def test_running_text_has_the_prompt_before_it():
    model, encoder = make_model(dtype=torch.float64), at_message().encoder
    texts = ["the plot of the film is bad", "<s>jane doe is about good film"]
    found = text_losses(model, texts, encoder)["nats"]
    for text, nats in zip(texts, found, strict=True):
        ids = torch.tensor(encoder.tokenizer(text)["input_ids"])
        with torch.no_grad():
            logits = row_logits(model, ids, before=int(ids[0] == 1))
        assert nats == pytest.approx(F.cross_entropy(logits[:-1], ids[1:], reduction="sum").item(), rel=1e-6)


# ---- attacks ----


def test_a_suffix_is_trained_and_scored_behind_the_prompts_own_place():
    model, encoder = make_model(dtype=torch.float64), at_message().encoder
    model.requires_grad_(False)
    suffix = 0.3 * torch.randn(2, model.config.hidden_size, dtype=torch.float64)
    batch = encoder.batch(list(_with_placeholders(DATA, encoder, 2)))
    positions, targets = response_positions(batch["labels"])
    logits = _logits(model, batch, positions, suffix)
    base, prompt = model.get_base_model(), model.get_prompt(batch_size=1)[0]
    for i, row in enumerate(DATA):
        encoded = encoder.encode(row)
        own = base.get_input_embeddings()(torch.tensor(encoded.prompt_ids + encoded.completion_ids))
        at, end = encoded.prompt_position, len(encoded.prompt_ids)
        whole = torch.cat([own[:at], prompt, own[at:end], suffix, own[end:]])
        num = len(encoded.completion_ids)
        expected = base(inputs_embeds=whole[None]).logits[0, -num - 1 : -1]
        torch.testing.assert_close(logits[i, :num], expected)
        assert targets[i, :num].tolist() == encoded.completion_ids
    half = len(DATA) // 2
    few, others = DATA.select(range(half)), DATA.select(range(half, len(DATA)))
    scores, _ = soft_suffix(model, few, others, encoder, num_virtual_tokens=2, steps=2)
    likelihoods = response_likelihoods(model, others, encoder)
    np.testing.assert_allclose(scores["before"]["loss"], [-one.log_probs.sum() for one in likelihoods], rtol=1e-6)


def test_a_prompt_learns_again_where_it_stands():
    model, collator = make_model(), at_message()
    model.prompt_encoder.requires_grad_(True)
    half = len(DATA) // 2
    few, others = DATA.select(range(half)), DATA.select(range(half, len(DATA)))
    found = relearn(
        model, few, others, collator.encoder, lambda one, some: score_completions(one, some, collator), lr=0.05, at=[2]
    )
    assert found[0]["loss"] != found[1]["loss"]


def test_an_evaluation_measures_the_prompt_where_it_stands_and_the_base_without_it(tmp_path):
    model, splits = make_model(), {name: with_text(some) for name, some in make_splits().items()}
    measures = ("utility", "membership", "relearning", "quantized", "soft suffix", "input attack")
    inputs = {
        "capitals": lambda some: letter_case(some, "upper", text_field="text"),
        "before": lambda some: with_prefix(some, "film ?"),
    }
    attacks = dataclasses.replace(ATTACKS, inputs=inputs)
    options = {"splits": splits, "collator": at_message(), "output_dir": tmp_path, "attacks": attacks}
    found = measured(model, *measures, **options)
    collator = at_message()
    for split in ("train_forget", "test_retain"):
        loss = [-one.log_probs.sum() for one in response_likelihoods(model, splits[split], collator.encoder)]
        assert per_row(found, "utility", split, "unlearned")["loss"] == pytest.approx(loss, rel=1e-4)
        with model.disable_adapter():
            base = score_completions(model, splits[split], collator)["loss"]
        assert np.mean(per_row(found, "utility", split, "detached")["loss"]) == pytest.approx(base, rel=1e-4)
    with pytest.raises(ValueError, match="differs in"):  # the same weights, at the start
        measured(make_model(prompt_position="start"), *measures, **options)


def test_a_collator_that_does_not_say_where_is_refused():
    splits = {name: with_text(some) for name, some in make_splits().items()}
    with pytest.raises(ValueError, match=r"prompt_position is missing.*ForgetRetainCollator"):
        measured(make_model(), "utility", splits=splits, collator=make_collator(max_length=64))


# ---- gates ----


def gated():
    model = make_model()
    model.add_adapter("other", CONFIGS["prompt_tuning"](4))
    gates = {"default": NameGate(["good 1"]), "other": NameGate(["good 2"])}
    return GatedUnlearner(model.eval(), make_tokenizer(), gates).eval()


def test_gated_rows_have_their_prompts_where_they_stand(tmp_path):
    model, collator = gated(), at_message()
    names = [
        "default" if " 1 " in row["prompt"] else "other" if " 2 " in row["prompt"] else "__base__" for row in DATA
    ]
    assert len(set(names)) == 3
    expected = score_completions(model.unlearner, DATA, collator, adapter_names=names)
    assert score_completions(model, DATA, collator) == pytest.approx(expected)
    inputs = collator.encoder.prompts(list(DATA))
    greedy = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    found = model.generate(**inputs, **greedy)
    assert torch.equal(found, model.unlearner.generate(**inputs, adapter_names=names, **greedy))
    with torch.no_grad():
        out = model(**inputs).logits
        torch.testing.assert_close(out, model.unlearner(**inputs, adapter_names=names).logits)
    model.save_pretrained(tmp_path)
    loaded = GatedUnlearner.from_pretrained(learned(), tmp_path, model.tokenizer)
    assert torch.equal(found, loaded.generate(**inputs, **greedy))
    assert loaded.adapter_settings()["default"]["prompt_position"] == "message"


def test_gates_refuse_requests_that_do_not_say_where_whatever_they_flag():
    model = gated()
    inputs = model.tokenizer(["the film is bad"], return_tensors="pt", return_token_type_ids=False)
    assert model.route(["the film is bad"]) == ["__base__"]
    for call in (
        model,
        model.generate,
        lambda **given: model.response_logits(**given, positions=torch.zeros(1, 1).long()),
    ):
        with pytest.raises(ValueError, match="prompt_position is missing"):
            call(**inputs)
    with model.disable_adapter():
        model.generate(**inputs, max_new_tokens=1)


# ---- training ----


def dataset():
    return forget_retain_dataset(with_text(rows("jane", 6)), with_text(rows("film", 10)))


def test_a_step_of_the_trainer_is_that_of_the_rows_alone(tmp_path):
    model, data, collator = make_model(dtype=torch.float64), dataset(), at_message()
    collator.resample = False
    model.prompt_encoder.requires_grad_(True)
    batch = collator([data[i] for i in range(len(data))])
    loss, *terms = losses(model, batch, beta=model.loss.beta, alpha=model.loss.alpha)
    (expected,) = torch.autograd.grad(loss, list(model.prompt_encoder.parameters()))
    weight = virtual_tokens(model)
    before = weight.detach().clone()
    settings = {"max_steps": 1, "optim": "sgd", "max_grad_norm": 0.0, "per_device_train_batch_size": 16}
    args = arguments(tmp_path, **settings, learning_rate=1.0)
    trainer = UnlearningTrainer(model, args, collator, data, reference_dir=tmp_path / "reference")
    trainer.train()
    torch.testing.assert_close(before - weight.detach(), expected, rtol=1e-4, atol=1e-6)
    logged = trainer.state.log_history[0]
    found = [logged[name] for name in ("forget_loss", "retain_loss", "kl_loss")]
    assert found == pytest.approx([float(term.detach()) for term in terms], rel=1e-4)
    evaluated = trainer.evaluate(with_text(rows("doe", 4)))
    assert evaluated["eval_loss"] == pytest.approx(
        score_completions(model, with_text(rows("doe", 4)), collator)["loss"]
    )


def test_tokenized_training_rows_make_the_same_batches(tmp_path):
    data, collator = dataset(), at_message(resample=False)
    tokenized = data.map(collator.tokenize, remove_columns=["prompt", "completion", "text"])
    one, other = (collator([some[i] for i in range(len(some))]) for some in (data, tokenized))
    assert torch.equal(one["prompt_position"], other["prompt_position"])
    UnlearningTrainer(make_model(), arguments(tmp_path, max_steps=1), collator, tokenized, reference="live")


def test_a_trainer_whose_collator_does_not_say_where_is_refused_before_it_computes_a_reference(tmp_path):
    with pytest.raises(ValueError, match="the collator does not say where"):
        UnlearningTrainer(make_model(), arguments(tmp_path), make_collator(), dataset())


@pytest.mark.parametrize("trainable", ["start", "base"])
def test_what_stands_elsewhere_or_is_no_prompt_trains_from_the_same_batches(trainable, tmp_path):
    model = make_model(prompt_position="start") if trainable == "start" else learned()
    loss = None if trainable == "start" else make_model().loss
    if trainable == "start":
        model.prompt_encoder.requires_grad_(True)
    args = arguments(tmp_path, max_steps=1)
    trainer = UnlearningTrainer(model, args, at_message(), dataset(), loss=loss, reference_dir=tmp_path / "reference")
    trainer.train()
    assert trainer.state.global_step == 1


@pytest.mark.parametrize("stored", [True, False])
def test_prompts_are_distilled_into_one_that_stands_where_they_stand(stored, tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    for i, folder in enumerate(folders):
        make_model(p=2 + i, seed=i).save_pretrained(str(folder))
    data = dataset() if stored else with_text(rows("jane", 6))
    args = arguments(tmp_path / "out", max_steps=2)
    found = combine(learned(), folders, train_dataset=data, data_collator=at_message(), args=args)
    assert found.spul_config.prompt_position == "message"
    found.save_pretrained(str(tmp_path / "joint"))
    assert SoftPromptUnlearner.from_pretrained(learned(), tmp_path / "joint").spul_config.prompt_position == "message"
    score_completions(found, DATA, at_message())


def test_prompts_of_different_positions_are_not_distilled(tmp_path):
    folders = [tmp_path / name for name in ("start", "message")]
    for folder in folders:
        make_model(prompt_position=folder.name, seed=len(folder.name)).save_pretrained(str(folder))
    given = {"train_dataset": dataset(), "data_collator": at_message(), "args": arguments(tmp_path)}
    with pytest.raises(ValueError, match=r"different positions, 'message', 'start'.*Combine each sort by itself"):
        combine(learned(), folders, **given)
