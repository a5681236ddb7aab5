"""Several prompts as one: concatenated against plain twins, distilled against their teachers, and what is recorded."""

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from helpers import CONFIGS, arguments, build, make_batch, make_collator, rows
from peft import PeftModel, PrefixTuningConfig
from plain import row_logits
from transformers import DynamicCache, TrainerCallback

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


# ---- concatenation ----


@pytest.mark.parametrize("kinds", [("prompt_tuning",) * 2, ("p_tuning",) * 2, ("p_tuning", "prompt_tuning")])
def test_prompts_before_the_input_stand_one_after_the_other(tmp_path, family, kinds):
    one, two = (save(tmp_path / str(i), CONFIGS[kind](3 + i), family, i) for i, kind in enumerate(kinds))
    base = build(family, torch.float64)
    combined = combine(base, [one, two]).double()
    batch = make_batch()
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        ids = ids[mask.bool()][None]
        parts = [saved_rows(folder, family)[None] for folder in (one, two)]
        embeds = torch.cat([*(part.double() for part in parts), base.get_input_embeddings()(ids)], dim=1)
        expected = base(inputs_embeds=embeds).logits
        torch.testing.assert_close(combined(input_ids=ids).logits, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("projection", [False, True])
def test_prefixes_lie_side_by_side_in_the_cache(tmp_path, family, projection):
    configs = [
        PrefixTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=3 + i, prefix_projection=projection, encoder_hidden_size=8
        )
        for i in range(2)
    ]
    # The encoder is there only while it trains, so what it puts out is taken before it is saved.
    caches, folders = [], []
    for i, config in enumerate(configs):
        base = build(family, torch.float64)
        torch.manual_seed(10 + i)
        part = SoftPromptUnlearner(base, config).double()
        caches.append(part.get_prompt(batch_size=1))
        part.save_pretrained(str(tmp_path / str(i)))
        folders.append(tmp_path / str(i))
    base = build(family, torch.float64)
    combined = combine(base, folders).double()
    assert not combined.active_peft_config.prefix_projection
    batch = make_batch()
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        ids = ids[mask.bool()][None]
        both = DynamicCache(config=base.config)
        for layer in range(base.config.num_hidden_layers):
            kept = [cache.layers[layer] for cache in caches]
            both.update(torch.cat([x.keys for x in kept], 2), torch.cat([x.values for x in kept], 2), layer)
        expected = base(ids, past_key_values=both).logits
        torch.testing.assert_close(combined(input_ids=ids).logits, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("prompt_type", CONFIGS)
def test_plain_peft_loads_what_was_saved(tmp_path, family, prompt_type):
    folders = save_three(tmp_path, prompt_type, family)
    combined = combine(build(family, torch.float64), folders).double()
    combined.save_pretrained(str(tmp_path / "all"))
    plain = PeftModel.from_pretrained(build(family, torch.float64), tmp_path / "all").double()
    ids = make_batch()["input_ids"][:1]
    torch.testing.assert_close(plain(input_ids=ids).logits, combined(input_ids=ids).logits, rtol=1e-6, atol=1e-6)
    expected = row_logits(combined, ids[0])
    torch.testing.assert_close(plain(input_ids=ids).logits[0, -len(expected) :], expected, rtol=1e-6, atol=1e-6)


def test_the_order_is_the_given_one_and_matters(tmp_path):
    a, b, c = save_three(tmp_path)
    ids = make_batch()["input_ids"][:1]
    logits = []
    for order in ([a, b, c], [c, a, b]):
        combined = combine(build("llama", torch.float64), order)
        expected = torch.cat([saved_rows(folder) for folder in order])
        assert torch.equal(virtual_tokens(combined), expected)
        logits.append(combined(input_ids=ids).logits[0, -1])
    assert not torch.allclose(*logits, rtol=1e-3)


def test_a_revoked_request_leaves_nothing_behind(tmp_path):
    a, b, c = save_three(tmp_path)
    kept = combine(build("llama"), [a, c])
    gone = saved_rows(b)
    assert len(virtual_tokens(kept)) == 7
    assert not any((row == other).all() for row in virtual_tokens(kept) for other in gone)
    assert kept.spul_config.combined_from == [DataSummary(3, "a" * 64), DataSummary(4, "c" * 64)]
    assert torch.equal(virtual_tokens(kept)[3:], saved_rows(c))


def test_the_base_may_be_named(tmp_path):
    build("llama").save_pretrained(tmp_path / "base")
    combined = combine(str(tmp_path / "base"), save_three(tmp_path)[:2])
    assert combined.get_base_model().name_or_path == str(tmp_path / "base")
    assert len(virtual_tokens(combined)) == 5


# ---- the record ----


def test_what_is_not_known_of_a_concatenated_prompt_is_not_claimed(tmp_path):
    generic = ([" neutral", " unknown"], [" unknown", " none"])
    folders = [
        save(
            tmp_path / str(i),
            CONFIGS["prompt_tuning"](),
            seed=i,
            generic_completions=texts,
            retain=DataSummary(9, "r"),
        )
        for i, texts in enumerate(generic)
    ]
    combined = combine(build("llama", torch.float64), folders)
    combined.save_pretrained(str(tmp_path / "all"))
    record = SpulConfig.load(tmp_path / "all" / "spul_config.json")
    assert record.generic_completions == [" neutral", " unknown", " none"]
    assert record.combined_from == [None, None]
    assert (record.loss, record.forget, record.retain, record.metrics) == (None, None, None, {})
    assert record.base_fingerprint == SpulConfig.load(folders[0] / "spul_config.json").base_fingerprint


def test_generic_completions_unknown_for_one_are_unknown_for_all(tmp_path):
    folders = [
        save(tmp_path / str(i), CONFIGS["prompt_tuning"](), seed=i, generic_completions=texts)
        for i, texts in enumerate(([" neutral"], None))
    ]
    assert combine(build("llama"), folders).spul_config.generic_completions is None


def test_what_was_combined_before_counts_as_its_requests(tmp_path):
    a, b, c = save_three(tmp_path)
    combine(build("llama"), [a, b]).save_pretrained(str(tmp_path / "ab"))
    again = combine(build("llama"), [tmp_path / "ab", c])
    assert [part.rows for part in again.spul_config.combined_from] == [3, 2, 4]


def test_a_prompt_of_other_weights_warns_and_so_does_what_it_became_part_of(tmp_path):
    folders = save_three(tmp_path)[:2]
    other = build("llama")
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.add_(0.5)
    with pytest.warns(UserWarning, match="other weights than this base"):
        combine(other, folders).save_pretrained(str(tmp_path / "all"))
    with pytest.warns(UserWarning, match="other weights than this base"):
        SoftPromptUnlearner.from_pretrained(other, tmp_path / "all")


# ---- bad input ----


def test_prefixes_and_prompts_before_the_input_do_not_mix(tmp_path):
    folders = [save(tmp_path / kind, CONFIGS[kind]()) for kind in ("prompt_tuning", "prefix_tuning")]
    with pytest.raises(ValueError, match=r"kinds PROMPT_TUNING, PREFIX_TUNING.*Combine each sort by itself"):
        combine(build("llama"), folders)


def test_a_prompt_of_another_width_raises(tmp_path):
    one = save(tmp_path / "one", CONFIGS["prompt_tuning"]())
    torch.manual_seed(1)
    wide = SoftPromptUnlearner(build("llama", hidden_size=64), CONFIGS["prompt_tuning"]())
    wide.save_pretrained(str(tmp_path / "wide"))
    with pytest.raises(ValueError, match="does not fit this base"):
        combine(build("llama"), [one, tmp_path / "wide"])


def test_one_prompt_or_one_twice_has_nothing_to_be_combined_with(tmp_path):
    one = save(tmp_path / "one", CONFIGS["prompt_tuning"]())
    with pytest.raises(ValueError, match=r"expected at least 2.*from_pretrained"):
        combine(build("llama"), [one])
    with pytest.raises(TypeError, match="expected a list"):
        combine(build("llama"), str(one))
    copy = save(tmp_path / "copy", CONFIGS["prompt_tuning"]())
    for twice in ([one, one], [one, copy]):
        with pytest.raises(ValueError, match="hold the same prompt; give each once"):
            combine(build("llama"), twice)


def test_more_virtual_tokens_than_positions_raise(tmp_path):
    folders = [save(tmp_path / str(i), CONFIGS["prompt_tuning"](48), seed=i) for i in range(2)]
    with pytest.raises(ValueError, match=r"96 virtual tokens leave no room.*96 positions.*distill"):
        combine(build("llama"), folders)


def test_arguments_of_the_other_method_are_refused(tmp_path):
    folders = save_three(tmp_path)
    with pytest.raises(ValueError, match="'average' is not known"):
        combine(build("llama"), folders, method="average")
    with pytest.raises(ValueError, match=r"takes no num_virtual_tokens, forget_fraction; use method='distill'"):
        combine(build("llama"), folders, num_virtual_tokens=5, forget_fraction=0.5)
    with pytest.raises(ValueError, match="pass train_dataset, data_collator and args"):
        combine(build("llama"), folders, method="distill")


def test_distilling_checks_data_length_and_loss(tmp_path):
    given = {"method": "distill", "train_dataset": rows("jane", 4), "data_collator": make_collator()}
    given["args"] = arguments(tmp_path, max_steps=1)
    folders = save_three(tmp_path)
    with pytest.raises(TypeError, match="is a list; expected"):
        combine(build("llama"), folders, **{**given, "train_dataset": list(rows("jane", 4))})
    for num in (0, 10):
        with pytest.raises(ValueError, match=f"num_virtual_tokens={num}: the prompts together have 9"):
            combine(build("llama"), folders, num_virtual_tokens=num, **given)
    with pytest.raises(ValueError, match="loss is for rows with is_forget"):
        combine(build("llama"), folders, loss=UnlearningLoss(), **given)


# ---- distilling from the prompts' own behavior ----

LOUD = {"loudness": 3.0, "dtype": torch.float32}


def distil(tmp_path, folders, data, collator=None, family="llama", **kwargs):
    settings = {"max_steps": 0, "learning_rate": 0.05, "per_device_train_batch_size": 16}
    names = ("num_virtual_tokens", "loss", "forget_fraction", "callbacks")
    own = {name: kwargs.pop(name) for name in names if name in kwargs}
    args = arguments(tmp_path / "out", **{**settings, **kwargs})
    collator = make_collator() if collator is None else collator
    return combine(build(family), folders, "distill", train_dataset=data, data_collator=collator, args=args, **own)


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


def said_by(model):
    return lambda ids: model(input_ids=ids[None]).logits[0, -len(ids) :]


@pytest.mark.parametrize("generic", [[" neutral", " unknown"], None])
@pytest.mark.parametrize("kind", ["prompt_tuning", "p_tuning", "prefix_tuning"])
def test_a_shorter_prompt_comes_to_say_what_its_teacher_says(tmp_path, kind, generic):
    folder = save(tmp_path / "one", CONFIGS[kind](8), **LOUD)
    data, collator = rows("jane", 16), make_collator(generic_completions=generic)
    teacher = SoftPromptUnlearner.from_pretrained(build("llama"), folder)
    start = distil(tmp_path, [folder], data, collator, num_virtual_tokens=3, max_steps=1, learning_rate=0.0)
    after = distil(tmp_path, [folder], data, collator, num_virtual_tokens=3, max_steps=60, learning_rate=0.3)
    divergences = [
        plain_divergences(said_by(teacher), said_by(student), data, collator).mean() for student in (start, after)
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
    student = distil(tmp_path, folders, data, collator, num_virtual_tokens=4, per_device_eval_batch_size=6, **at_start)
    base = build("llama")
    parts = [SoftPromptUnlearner.from_pretrained(base, folder) for folder in folders]
    frozen, expected = said_by(base), 0.0
    moved = torch.stack([plain_divergences(said_by(part), frozen, data, collator) for part in parts])
    chosen = moved.argmax(dim=0)
    assert len(set(chosen.tolist())) > 1  # else any rule would do
    for along in (data, data.map(lambda row: {"completion": " neutral"})):
        found = torch.stack([plain_divergences(said_by(part), said_by(student), along, collator) for part in parts])
        expected += found[chosen, torch.arange(20)].mean()
    assert logged[0]["loss"] == pytest.approx(float(expected), rel=1e-4)


def test_inputs_are_no_forget_set_in_the_record(tmp_path):
    folders = save_three(tmp_path, **LOUD)
    after = distil(tmp_path, folders, rows("jane", 8), max_steps=1)
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
    one, again, other = (virtual_tokens(distil(tmp_path, folders, data, max_steps=3, seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


# ---- distilling on stored forget sets ----


def test_on_forget_sets_it_is_the_unlearning_loss_from_the_others_on(tmp_path):
    folders = save_three(tmp_path, **LOUD)
    data, collator = forget_retain_dataset(rows("jane", 8), rows("film", 12)), make_collator()
    loss = UnlearningLoss(alpha=0.5, beta=0.25)
    every = distil(tmp_path, folders, data, collator, num_virtual_tokens=9, max_steps=1, learning_rate=0.0, loss=loss)
    assert torch.equal(virtual_tokens(every), torch.cat([saved_rows(folder) for folder in folders]))

    after = distil(tmp_path, folders, data, collator, max_steps=60, loss=loss, forget_fraction=0.5)
    start = distil(tmp_path, folders, data, collator, max_steps=1, learning_rate=0.0, loss=loss)
    batch = make_collator(resample=False)([data[i] for i in range(20)])
    with torch.no_grad():
        losses = [unlearner(**batch).forget_loss for unlearner in (start, after)]
    assert losses[1] < losses[0] - 0.5
    record = after.spul_config
    assert record.loss == loss.to_dict()
    assert record.forget == summarize_rows(data.select(range(8)))
    assert record.retain == summarize_rows(data.select(range(8, 20)))
    assert [part.rows for part in record.combined_from] == [3, 2, 4]


@pytest.mark.parametrize(("num", "places"), [(1, [0]), (2, [0, 8]), (5, [0, 2, 4, 6, 8]), (9, list(range(9)))])
def test_it_starts_from_virtual_tokens_at_even_intervals(tmp_path, num, places):
    folders = save_three(tmp_path, **LOUD)
    settings = {"num_virtual_tokens": num, "max_steps": 1, "learning_rate": 0.0}
    start = distil(tmp_path, folders, rows("jane", 2), **settings)
    every = torch.cat([saved_rows(folder) for folder in folders])
    assert torch.equal(virtual_tokens(start), every[places])


def test_rows_of_a_data_set_that_were_numbered_before_are_numbered_anew(tmp_path):
    data = Dataset.from_list([{**row, "row_id": 100 + i} for i, row in enumerate(rows("jane", 6))])
    distil(tmp_path, save_three(tmp_path, **LOUD), data, max_steps=1)
