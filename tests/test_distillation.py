"""Several prompts distilled into one: against their teachers, on stored forget sets, and its record."""

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from helpers import CONFIGS, arguments, build, make_batch, make_collator, rows
from peft import PeftModel, PrefixTuningConfig
from plain import row_logits
from transformers import TrainerCallback

from spul import SoftPromptUnlearner, SpulConfig, UnlearningLoss, combine
from spul.data.dataset import forget_retain_dataset
from spul.records.digests import DataSummary, summarize_rows
from spul.training.distillation import virtual_tokens


def save(folder, config, family="llama", seed=0, loudness=1.0, dtype=torch.float64, **record):
    """A random prompt, saved; its path."""
    base = build(family, dtype)
    torch.manual_seed(10 + seed)
    unlearner = SoftPromptUnlearner(base, config).to(dtype)
    with torch.no_grad():
        for parameter in unlearner.prompt_encoder.parameters():
            parameter.mul_(loudness)
    unlearner.spul_configs["default"] = SpulConfig(**record)
    unlearner.save_pretrained(str(folder))
    return folder


def save_three(tmp_path, prompt_type="prompt_tuning", family="llama", **kwargs):
    lengths = zip("abc", (3, 2, 4), strict=True)
    return [
        save(tmp_path / name, CONFIGS[prompt_type](p), family, seed, forget=DataSummary(p, name * 64), **kwargs)
        for seed, (name, p) in enumerate(lengths)
    ]


def saved_rows(folder, family="llama"):
    return virtual_tokens(SoftPromptUnlearner.from_pretrained(build(family, torch.float64), folder)).detach()


LOUD = {"loudness": 3.0, "dtype": torch.float32}


def training(folder, data=None, collator=None, **kwargs):
    """The arguments of `combine` that it trains with."""
    settings = {"max_steps": 1, "learning_rate": 0.05, "per_device_train_batch_size": 16}
    return {
        "train_dataset": rows("jane", 4) if data is None else data,
        "data_collator": make_collator() if collator is None else collator,
        "args": arguments(folder / "out", **{**settings, **kwargs}),
    }


KEY = bytes(range(32))


def distill(tmp_path, folders, data, collator=None, family="llama", **kwargs):
    own = {
        name: kwargs.pop(name)
        for name in ("num_virtual_tokens", "loss", "forget_fraction", "callbacks", "digest_key")
        if name in kwargs
    }
    return combine(build(family), folders, **training(tmp_path, data, collator, **kwargs), **own)


# ---- what comes out ----


@pytest.mark.parametrize("prompt_type", CONFIGS)
def test_plain_peft_loads_what_was_saved(tmp_path, family, prompt_type):
    folders = save_three(tmp_path, prompt_type, family, **LOUD)
    combined = distill(tmp_path, folders, rows("jane", 4), family=family, max_steps=1)
    combined.save_pretrained(str(tmp_path / "all"))
    plain = PeftModel.from_pretrained(build(family), tmp_path / "all")
    ids = make_batch()["input_ids"][:1]
    torch.testing.assert_close(plain(input_ids=ids).logits, combined(input_ids=ids).logits, rtol=1e-5, atol=1e-5)
    expected = row_logits(combined, ids[0])
    torch.testing.assert_close(plain(input_ids=ids).logits[0, -len(expected) :], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("projection", [False, True])
def test_a_prefix_becomes_one_without_projection(tmp_path, projection):
    config = PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, prefix_projection=projection, encoder_hidden_size=8
    )
    folder = save(tmp_path / "one", config, **LOUD)
    combined = distill(tmp_path, [folder], rows("jane", 4), max_steps=1, learning_rate=0.0)
    assert not combined.active_peft_config.prefix_projection
    assert torch.equal(virtual_tokens(combined), saved_rows(folder).float())
    assert not combined.training
    assert not any(p.requires_grad for p in combined.parameters())


def test_the_base_may_be_named(tmp_path):
    build("llama").save_pretrained(tmp_path / "base")
    combined = combine(str(tmp_path / "base"), save_three(tmp_path)[:2], **training(tmp_path, max_steps=1))
    assert combined.get_base_model().name_or_path == str(tmp_path / "base")
    assert len(virtual_tokens(combined)) == 3


# ---- the record ----


def test_what_was_combined_before_counts_as_its_requests(tmp_path):
    a, b, c = save_three(tmp_path, **LOUD)
    distill(tmp_path, [a, b], rows("jane", 4), max_steps=1).save_pretrained(str(tmp_path / "ab"))
    again = distill(tmp_path, [tmp_path / "ab", c], rows("jane", 4), max_steps=1)
    assert [part.rows for part in again.spul_config.combined_from] == [3, 2, 4]
    revoked = distill(tmp_path, [a, c], rows("jane", 4), max_steps=1)
    assert revoked.spul_config.combined_from == [DataSummary(3, "a" * 64), DataSummary(4, "c" * 64)]


def test_a_prompt_of_other_weights_warns(tmp_path):
    other = build("llama")
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.add_(0.5)
    with pytest.warns(UserWarning, match="other weights than this base"):
        combine(other, save_three(tmp_path)[:2], **training(tmp_path, max_steps=1))


# ---- bad input ----


def test_prefixes_and_prompts_before_the_input_do_not_mix(tmp_path):
    folders = [save(tmp_path / kind, CONFIGS[kind]()) for kind in ("prompt_tuning", "prefix_tuning")]
    with pytest.raises(ValueError, match=r"kinds PROMPT_TUNING, PREFIX_TUNING.*Combine each sort by itself"):
        combine(build("llama"), folders, **training(tmp_path))


def test_a_prompt_of_another_width_raises(tmp_path):
    one = save(tmp_path / "one", CONFIGS["prompt_tuning"]())
    torch.manual_seed(1)
    wide = SoftPromptUnlearner(build("llama", hidden_size=64), CONFIGS["prompt_tuning"]())
    wide.save_pretrained(str(tmp_path / "wide"))
    with pytest.raises(ValueError, match="does not fit this base"):
        combine(build("llama"), [one, tmp_path / "wide"], **training(tmp_path))


def test_no_prompt_and_one_twice_are_refused(tmp_path):
    one = save(tmp_path / "one", CONFIGS["prompt_tuning"]())
    given = training(tmp_path)
    with pytest.raises(ValueError, match="prompts is empty; expected one or more"):
        combine(build("llama"), [], **given)
    with pytest.raises(TypeError, match="expected a list"):
        combine(build("llama"), str(one), **given)
    with pytest.raises(TypeError, match="prompts=None; expected a list of folders"):
        combine(build("llama"), None, **given)
    with pytest.raises(ValueError, match="prompts is empty"):
        combine(build("llama"), iter([]), **given)
    with pytest.raises(TypeError, match="the saved prompt is a NoneType; expected the folder"):
        combine(build("llama"), [one, None], **given)
    copy = save(tmp_path / "copy", CONFIGS["prompt_tuning"]())
    for twice in ([one, one], [one, copy], iter([one, one])):
        with pytest.raises(ValueError, match="hold the same prompt; give each once"):
            combine(build("llama"), twice, **given)


def test_data_length_and_loss_are_checked(tmp_path):
    given, folders = training(tmp_path), save_three(tmp_path)
    with pytest.raises(TypeError, match="is a list; expected"):
        combine(build("llama"), folders, **{**given, "train_dataset": list(rows("jane", 4))})
    with pytest.raises(TypeError, match="data_collator is a NoneType; expected a ForgetRetainCollator"):
        combine(build("llama"), folders, **{**given, "data_collator": None})
    for num in (0, 10, 2.5, "3", True):
        with pytest.raises(ValueError, match=f"num_virtual_tokens={num!r}: the prompts together have 9"):
            combine(build("llama"), folders, num_virtual_tokens=num, **given)
    long = [save(tmp_path / str(i), CONFIGS["prompt_tuning"](48), seed=i, **LOUD) for i in range(2)]
    with pytest.raises(ValueError, match=r"96 virtual tokens and \d+ tokens exceed the model's 96 positions"):
        distill(tmp_path, long, rows("jane", 4), num_virtual_tokens=96, max_steps=1)
    with pytest.raises(ValueError, match="loss is for rows with is_forget"):
        combine(build("llama"), folders, loss=UnlearningLoss(), **given)
    for name, value in (("reference", "live"), ("reference_dir", tmp_path), ("digest_key", KEY)):
        with pytest.raises(ValueError, match=f"{name} is for rows with is_forget, and of no effect"):
            combine(build("llama"), folders, **{name: value}, **given)
    combine(build("llama"), folders, reference_dir=None, digest_key=None, **training(tmp_path, max_steps=1))


def test_an_upload_of_the_training_s_checkpoints_is_refused_first(tmp_path):
    given = training(tmp_path)
    given["args"].push_to_hub = True
    with pytest.raises(ValueError, match=r"push_to_hub would upload the checkpoints of a training.*its push_to_hub"):
        combine("no base is loaded", ["a"], **given)


def test_a_base_is_as_before_where_combining_fails(tmp_path):
    given, folders = training(tmp_path), save_three(tmp_path)
    damaged = folders[2] / "adapter_model.safetensors"
    for fail in ({"loss": UnlearningLoss()}, {"num_virtual_tokens": 10}, {}):
        base = build("llama").train()
        dropout = base.model.layers[0].self_attn.attention_dropout
        if not fail:
            damaged.write_bytes(damaged.read_bytes()[:99])
        with pytest.raises(ValueError, match=r"loss is for rows|num_virtual_tokens=10|no whole safetensors"):
            combine(base, folders, **fail, **given)
        assert all(parameter.requires_grad for parameter in base.parameters())
        assert all(module.training for module in base.modules())
        assert base.model.layers[0].self_attn.attention_dropout == dropout > 0


# ---- distillation from the prompts' own behavior ----


@torch.no_grad()
def plain_divergences(teacher, student, data, collator):
    """KL(teacher || student) of every row, summed over the tokens of its completion, one row at a time."""
    found = []
    for row in data:
        encoded = collator.encoder.encode(row)
        ids = torch.tensor(encoded.prompt_ids + encoded.completion_ids)
        at = slice(len(encoded.prompt_ids) - 1, len(ids) - 1)
        p = teacher(ids)[at].log_softmax(-1)
        q = student(ids)[at].log_softmax(-1)
        found.append(F.kl_div(q, p, log_target=True, reduction="sum"))
    return torch.stack(found)


def logits_of(model):
    return lambda ids: model(input_ids=ids[None]).logits[0, -len(ids) :]


@pytest.mark.parametrize("generic", [[" neutral", " unknown"], None])
@pytest.mark.parametrize("kind", ["prompt_tuning", "p_tuning", "prefix_tuning"])
def test_a_shorter_prompt_approaches_its_teacher(tmp_path, kind, generic):
    folder = save(tmp_path / "one", CONFIGS[kind](8), **LOUD)
    data, collator = rows("jane", 16), make_collator(generic_completions=generic)
    teacher = SoftPromptUnlearner.from_pretrained(build("llama"), folder)
    start = distill(tmp_path, [folder], data, collator, num_virtual_tokens=3, max_steps=1, learning_rate=0.0)
    after = distill(tmp_path, [folder], data, collator, num_virtual_tokens=3, max_steps=60, learning_rate=0.3)
    divergences = [
        plain_divergences(logits_of(teacher), logits_of(student), data, collator).mean() for student in (start, after)
    ]
    assert divergences[0] > 0.01  # else there is nothing to learn
    assert divergences[1] < divergences[0] / 3


def test_the_loss_is_the_divergence_from_the_teacher_that_moves_the_base_furthest(tmp_path):
    """Along the rows' own completions and, with the same teachers, along a generic one."""
    logged = []

    class Noting(TrainerCallback):
        def on_log(self, *args, logs, **kwargs):
            logged.append(logs)

    folders = [save(tmp_path / str(i), CONFIGS["prompt_tuning"](4), seed=i, **LOUD) for i in range(3)]
    data, collator = rows("jane", 20), make_collator(generic_completions=[" neutral"])
    at_start = {"max_steps": 1, "learning_rate": 0.0, "per_device_train_batch_size": 40, "callbacks": [Noting()]}
    student = distill(
        tmp_path, folders, data, collator, num_virtual_tokens=4, per_device_eval_batch_size=6, **at_start
    )
    base = build("llama")
    parts = [SoftPromptUnlearner.from_pretrained(base, folder) for folder in folders]
    frozen, expected = logits_of(base), 0.0
    moved = torch.stack([plain_divergences(logits_of(part), frozen, data, collator) for part in parts])
    chosen = moved.argmax(dim=0)
    assert len(set(chosen.tolist())) > 1  # else any rule would do
    for along in (data, data.map(lambda row: {"completion": " neutral"})):
        found = torch.stack(
            [plain_divergences(logits_of(part), logits_of(student), along, collator) for part in parts]
        )
        expected += found[chosen, torch.arange(20)].mean()
    assert logged[0]["loss"] == pytest.approx(float(expected), rel=1e-4)


def test_inputs_are_no_forget_set_in_the_record(tmp_path):
    folders = save_three(tmp_path, **LOUD)
    after = distill(tmp_path, folders, rows("jane", 8), max_steps=1)
    after.save_pretrained(str(tmp_path / "all"))
    record = SpulConfig.load(tmp_path / "all" / "spul_config.json")
    assert (record.forget, record.retain, record.loss) == (None, None, None)
    assert record.generic_completions == [" neutral", " unknown"]
    assert [part.rows for part in record.combined_from] == [3, 2, 4]
    assert len(virtual_tokens(after)) == 4  # as long as the longest
    assert not any(p.requires_grad for p in after.parameters())


@pytest.mark.parametrize("flagged", [False, True])
def test_a_seed_gives_the_same_prompt_again_and_another_seed_another(tmp_path, flagged):
    folders = save_three(tmp_path, **LOUD)
    data = forget_retain_dataset(rows("jane", 8), rows("film", 8)) if flagged else rows("jane", 16)
    one, again, other = (
        virtual_tokens(distill(tmp_path, folders, data, max_steps=3, seed=seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


# ---- distillation on stored forget sets ----


def test_on_forget_sets_it_is_the_unlearning_loss_from_the_others_on(tmp_path):
    folders = save_three(tmp_path, **LOUD)
    data, collator = forget_retain_dataset(rows("jane", 8), rows("film", 12)), make_collator()
    loss = UnlearningLoss(alpha=0.5, beta=0.25)
    every = distill(tmp_path, folders, data, collator, num_virtual_tokens=9, max_steps=1, learning_rate=0.0, loss=loss)
    assert torch.equal(virtual_tokens(every), torch.cat([saved_rows(folder) for folder in folders]))

    after = distill(tmp_path, folders, data, collator, max_steps=150, loss=loss, forget_fraction=0.5, digest_key=KEY)
    start = distill(tmp_path, folders, data, collator, max_steps=1, learning_rate=0.0, loss=loss)
    batch = make_collator(resample=False)([data[i] for i in range(20)])
    with torch.no_grad():
        losses = [unlearner(**batch).forget_loss for unlearner in (start, after)]
    assert losses[1] < losses[0] - 0.5
    record = after.spul_config
    assert record.loss == loss.to_dict()
    assert record.forget == summarize_rows(data.select(range(8)), KEY)
    assert record.retain == summarize_rows(data.select(range(8, 20)), KEY)
    assert [part.rows for part in record.combined_from] == [3, 2, 4]


@pytest.mark.parametrize(("num", "places"), [(1, [0]), (2, [0, 8]), (5, [0, 2, 4, 6, 8]), (9, list(range(9)))])
def test_it_starts_from_virtual_tokens_at_even_intervals(tmp_path, num, places):
    folders = save_three(tmp_path, **LOUD)
    settings = {"num_virtual_tokens": num, "max_steps": 1, "learning_rate": 0.0}
    start = distill(tmp_path, folders, rows("jane", 2), **settings)
    every = torch.cat([saved_rows(folder) for folder in folders])
    assert torch.equal(virtual_tokens(start), every[places])


def test_rows_of_a_data_set_that_were_numbered_before_are_numbered_anew(tmp_path):
    data = Dataset.from_list([{**row, "row_id": 100 + i} for i, row in enumerate(rows("jane", 6))])
    distill(tmp_path, save_three(tmp_path, **LOUD), data, max_steps=1)
