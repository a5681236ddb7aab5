"""The discriminative start: queries are read as the layers compute them, and fitted keys tell forget rows apart."""

import pytest
import torch
from datasets import Dataset, concatenate_datasets
from helpers import CONFIGS, GENERIC, build, build_gemma3, make_collator, make_dataset, make_tokenizer
from peft import CartridgeConfig, PrefixTuningConfig
from transformers import BloomConfig, BloomForCausalLM

from spul import ForgetRetainCollator, SoftPromptUnlearner, forget_retain_dataset
from spul.models.compat_attention import observed_attention
from spul.models.compat_cache import layer_states
from spul.prompts import DiscriminativeStart, discriminative
from spul.prompts.discriminative import Side, fit_keys

P = 5
FAMILIES = ("llama", "opt", "gpt2", "qwen3", "gemma3", "gpt_neox", "mistral")


def rows_of(names, num=24):
    words = ["review", "the", "film", "of", "was", "a"]
    texts = [
        " ".join([words[i % 6], words[(i * 5 + 1) % 6], names[i % len(names)], words[(i * 3) % 6], ":"])
        for i in range(num)
    ]
    return Dataset.from_list([{"prompt": text, "completion": " positive"} for text in texts])


def named_dataset():
    return forget_retain_dataset(rows_of(["jane", "doe"]), rows_of(["john", "smith", "someone"], 40))


def start_on(base, config=None, seed=1, **kwargs):
    torch.manual_seed(seed)
    start = DiscriminativeStart(named_dataset(), make_collator(), progress=False, **kwargs)
    return SoftPromptUnlearner(base, config or CONFIGS["prefix_tuning"](P), start=start).eval()


def started(family="llama", seed=1, **kwargs):
    return start_on(build(family, torch.float64), seed=seed, **kwargs)


def telling_base():
    """A base whose queries have what those of trained models have: a direction in common, and one for each token."""
    base = build("llama", torch.float64, hidden_size=128)
    with torch.no_grad():
        weight = base.get_input_embeddings().weight
        weight.copy_(torch.nn.functional.normalize(torch.randn_like(weight), dim=-1))
        weight.add_(torch.nn.functional.normalize(torch.randn(weight.shape[1], dtype=weight.dtype), dim=-1))
    return base


def inputs_of(row):
    ids = torch.tensor([make_collator().encoder.encode(row).prompt_ids])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def share_of_prompt(unlearner, row, layer=0):
    """The share of attention that goes to the prompt, (heads, n)."""
    unlearner.get_base_model().set_attn_implementation("eager")
    with torch.no_grad():
        return unlearner(**inputs_of(row), output_attentions=True).attentions[layer][0, :, :, :P].sum(dim=-1)


def means_of_sides(unlearner):
    """Means over forget and over retain rows of the largest share of attention that a query of the row gives."""
    shares = {flag: [] for flag in (True, False)}
    for row in named_dataset():
        shares[row["is_forget"]].append(share_of_prompt(unlearner, row)[:, 2:].amax())
    return [torch.stack(shares[flag]).mean() for flag in (True, False)]


# ---- the fit ----


@pytest.mark.parametrize(("heads", "group"), [(1, 1), (2, 1), (2, 3)])
def test_fitted_keys_are_attended_to_by_a_token_of_each_forget_row_alone(heads, group):
    torch.manual_seed(0)
    width, tokens, num_rows = 16, 6, 40
    common, special = torch.nn.functional.normalize(torch.randn(2, heads * group, width), dim=-1)

    def side(is_forget):
        queries = 0.3 * torch.randn(num_rows * tokens, heads * group, width) + 2 * common
        if is_forget:  # in one token of each row
            queries[tokens // 2 :: tokens] += 3 * special
        row = torch.arange(num_rows).repeat_interleave(tokens)
        return Side(queries, torch.full(queries.shape[:2], 2.0), row)

    keys = fit_keys(side(True), side(False), heads, 4)
    assert keys.shape == (heads, 4, width)
    for is_forget, expected in ((True, 0.8), (False, 0.1)):  # of other rows than the keys were fitted to
        one = side(is_forget)
        by_head = keys.repeat_interleave(group, dim=0)
        share = torch.sigmoid(torch.einsum("thd,hpd->thp", one.queries, by_head).logsumexp(-1) - one.own)
        largest = share.unflatten(0, (num_rows, tokens)).amax(dim=1).amax(dim=-1)
        assert (largest > expected).float().mean() > 0.9 if is_forget else largest.mean() < expected


def test_each_step_has_all_tokens_of_rows_drawn_anew_from_each_side(monkeypatch):
    monkeypatch.setattr(discriminative, "NUM_STEPS", 3)
    monkeypatch.setattr(discriminative, "ROWS_OF_STEP", 4)
    few, many = torch.tensor([7, 2, 2, 5]), torch.arange(9).repeat_interleave(3)
    torch.manual_seed(0)
    found = [one for step in discriminative._draws(few, many) for one in step]
    assert len(found) == 6
    torch.manual_seed(0)
    for row, one in zip([few, many] * 3, found, strict=True):
        rows = row.unique()
        picked = rows[torch.randperm(len(rows))[:4]].tolist()
        tokens = [i for i, number in enumerate(row.tolist()) if number in picked]
        assert (one.tokens.tolist(), one.rows) == (tokens, len(picked))
        assert one.row.tolist() == [picked.index(number) for number in row[tokens].tolist()]


@pytest.mark.parametrize("family", [one for one in FAMILIES if one != "mistral"])  # its window ends before the prompt
def test_a_layer_attends_to_the_keys_as_the_fit_took_it(family, monkeypatch):
    # In the first layer, which no other's prefix changes: rotated, scaled and packed right, where rows will stand.
    encode, sides = make_collator().encoder.encode, []
    ids = [[encode(row).prompt_ids for row in named_dataset() if row["is_forget"] is flag] for flag in (True, False)]

    def keep(forget, retain, *args):
        sides.append((forget, retain))
        return fit_keys(forget, retain, *args)

    monkeypatch.setattr(discriminative, "fit_keys", keep)
    monkeypatch.setattr(DiscriminativeStart, "encoded_rows", lambda start: ids)
    unlearner = started(family)
    state = layer_states(unlearner.get_prompt(batch_size=1))[0]
    forget, _ = sides[0]
    for i, row in enumerate(named_dataset().filter(lambda row: row["is_forget"])):
        at = (forget.row == i).nonzero().flatten()
        queries, own = forget.queries[at].double(), forget.own[at].double()
        keys = state.keys[0].double().repeat_interleave(queries.shape[1] // state.keys.shape[1], dim=0)
        expected = torch.sigmoid(torch.einsum("thd,hpd->thp", queries, keys).logsumexp(-1) - own)
        found = share_of_prompt(unlearner, row)[:, -len(at) :].T
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_keys_of_each_layer_are_the_fitted_ones_and_values_the_mean_of_what_its_heads_put_out(family, monkeypatch):
    fitted, outputs, data = [], {}, named_dataset()

    def keep(*args):
        fitted.append(fit_keys(*args))
        return fitted[-1]

    monkeypatch.setattr(discriminative, "fit_keys", keep)
    unlearner = started(family)
    base = build(family, torch.float64)
    torch.manual_seed(1)
    default = SoftPromptUnlearner(base, CONFIGS["prefix_tuning"](P)).eval()  # rows were read behind this one
    retained = {
        tuple(inputs_of(row)["input_ids"][0].tolist()[:i]) for row in data if not row["is_forget"] for i in range(9)
    }

    def own_output(one):  # of each head over the row's own tokens
        num = one.queries.shape[2]
        keys, values = (t[:, :, -num:].repeat_interleave(one.queries.shape[1] // t.shape[1], 1) for t in one[2:])
        later = torch.ones(num, num).triu(1).bool()
        shares = (one.queries @ keys.mT).masked_fill(later, -torch.inf).softmax(-1)
        outputs.setdefault(one.layer, []).append((shares @ values)[0, :, first:])

    for row in data.filter(lambda row: row["is_forget"]):
        ids = tuple(inputs_of(row)["input_ids"][0].tolist())
        first = next(i for i in range(len(ids)) if ids[: i + 1] not in retained)
        with observed_attention(default.get_base_model(), own_output), torch.no_grad():
            default(**inputs_of(row))
    for layer, state in enumerate(layer_states(unlearner.get_prompt(batch_size=1))):
        torch.testing.assert_close(state.keys[0].float(), fitted[layer])
        mean = torch.cat(outputs[layer], dim=1).mean(dim=1).unflatten(0, (state.keys.shape[1], -1)).mean(dim=1)
        expected = mean[:, None].expand_as(state.values[0])
        torch.testing.assert_close(state.values[0].double(), expected, rtol=1e-4, atol=1e-5)


def test_forget_rows_attend_to_the_prompt_and_others_do_not():
    forget, retain = means_of_sides(start_on(telling_base()))
    assert forget > 0.8
    assert retain < 0.2


def test_the_start_is_near_the_base_for_rows_that_are_kept():
    unlearner, shifts = start_on(telling_base()), []
    for row in named_dataset():
        with torch.no_grad():
            found = unlearner(**inputs_of(row)).logits[0, -1].log_softmax(-1)
            with unlearner.disable_adapter():
                base = unlearner(**inputs_of(row)).logits[0, -1].log_softmax(-1)
        if not row["is_forget"]:
            shifts.append((found.exp() * (found - base)).sum())
    assert torch.stack(shifts).mean() < 0.1


def test_layers_read_one_by_one_have_the_same_keys(monkeypatch):
    whole = started().state_dict()
    monkeypatch.setattr(discriminative, "STORED_NUMBERS", 1)
    monkeypatch.setattr(discriminative, "MOST_ROWS", 3)
    parts = started().state_dict()
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-4)


def test_in_half_precision_forget_rows_attend_to_the_prompt_too():
    forget, retain = means_of_sides(start_on(telling_base().bfloat16()))
    assert forget - retain > 0.4


def test_a_projection_that_is_too_narrow_is_refused_before_the_rows_are_read(monkeypatch):
    monkeypatch.setattr(DiscriminativeStart, "encoded_rows", lambda start: pytest.fail("rows were read"))
    config = PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=P, prefix_projection=True, encoder_hidden_size=2
    )
    with pytest.raises(ValueError, match="2 hidden numbers, too few to put out a start"):
        started(config=config)


def test_a_seed_gives_one_start_and_another_seed_another():
    first, again, other = (
        started(seed=seed).prompt_encoder["default"].embedding.weight.detach() for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    "config",
    [
        CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=P),
        PrefixTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=P, prefix_projection=True, encoder_hidden_size=32
        ),
    ],
    ids=["cartridge", "projection"],
)
def test_other_prompts_of_keys_and_values_begin_so_too(config):
    forget, retain = means_of_sides(start_on(telling_base(), config))
    assert forget - retain > 0.4


def test_rows_are_drawn_up_to_the_number_of_tokens():
    torch.manual_seed(0)
    start = DiscriminativeStart(named_dataset(), make_collator(), num_tokens=20, progress=False)
    for rows in start.encoded_rows():
        assert 20 <= sum(map(len, rows)) < 20 + max(map(len, rows))


def test_a_second_prompt_begins_so_and_leaves_the_first_alone():
    unlearner = SoftPromptUnlearner(telling_base(), CONFIGS["prefix_tuning"](P)).eval()
    before = unlearner.prompt_encoder["default"].embedding.weight.detach().clone()
    start = DiscriminativeStart(named_dataset(), make_collator(), progress=False)
    unlearner.add_adapter("second", CONFIGS["prefix_tuning"](P), start=start)
    assert torch.equal(unlearner.prompt_encoder["default"].embedding.weight, before)
    unlearner.set_adapter("second")
    forget, retain = means_of_sides(unlearner)
    assert forget - retain > 0.4


# ---- what is refused ----


@pytest.mark.parametrize("kind", ["prompt_tuning", "p_tuning"])
def test_prompts_without_keys_are_refused(kind):
    start = DiscriminativeStart(named_dataset(), make_collator())
    with pytest.raises(ValueError, match="has none; expected a PrefixTuningConfig"):
        SoftPromptUnlearner(build("llama"), CONFIGS[kind](P), start=start)


def test_a_family_that_computes_attention_itself_is_refused_and_left_as_it_was():
    shape = {"vocab_size": 128, "hidden_size": 32, "n_layer": 2, "n_head": 4}
    base = BloomForCausalLM(BloomConfig(**shape)).eval()
    start = DiscriminativeStart(named_dataset(), make_collator(), progress=False)
    with pytest.raises(ValueError, match="BloomForCausalLM computes attention in code of its own"):
        SoftPromptUnlearner(base, CONFIGS["prefix_tuning"](P), start=start)
    assert all(parameter.requires_grad for parameter in base.parameters())
    assert not any(module.training for module in base.modules())
    assert not base.config._attn_implementation.startswith("spul")


def test_forget_rows_whose_prompts_others_have_are_refused():
    same = rows_of(["jane"])
    flags = [True] * len(same) + [False] * len(same)
    both = concatenate_datasets([same, same]).add_column("is_forget", flags)
    start = DiscriminativeStart(both, make_collator(), progress=False)
    with pytest.raises(ValueError, match="every forget row's prompt is also that of another row"):
        SoftPromptUnlearner(build("llama"), CONFIGS["prefix_tuning"](P), start=start)


def test_rows_that_leave_no_room_for_the_prefix_are_refused():
    long = {"completion": " positive"}
    rows = [long | {"prompt": "film " * 93 + who, "is_forget": who == "jane"} for who in ("jane", "a")]
    start = DiscriminativeStart(Dataset.from_list(rows), make_collator(max_length=96), progress=False)
    with pytest.raises(ValueError, match="max_length of at most 91"):
        SoftPromptUnlearner(build("llama"), CONFIGS["prefix_tuning"](P), start=start)


def test_other_rows_that_are_all_alike_leave_keys_of_a_usual_size():
    rows = [{"prompt": f"review {who}", "completion": " positive", "is_forget": True} for who in ("jane", "doe")]
    rows += [{"prompt": "film", "completion": " positive", "is_forget": False}] * 3
    torch.manual_seed(0)
    start = DiscriminativeStart(Dataset.from_list(rows), make_collator(), progress=False)
    unlearner = SoftPromptUnlearner(build("gpt2"), CONFIGS["prefix_tuning"](P), start=start)
    assert unlearner.prompt_encoder["default"].embedding.weight.abs().max() < 1e4  # half precision ends at 65,504


def test_a_tokenizer_of_another_base_is_refused():
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"zzz{i}" for i in range(9)])
    collator = ForgetRetainCollator(tokenizer, GENERIC, max_length=32)
    rows = [
        {"prompt": "zzz5 jane", "completion": " positive", "is_forget": True},
        {"prompt": "film a", "completion": " positive", "is_forget": False},
    ]
    start = DiscriminativeStart(Dataset.from_list(rows), collator, progress=False)
    with pytest.raises(ValueError, match="expected the base's own tokenizer"):
        SoftPromptUnlearner(build("llama"), CONFIGS["prefix_tuning"](P), start=start)


def test_inference_mode_is_refused_since_the_fit_needs_gradients():
    base = build("llama")
    start = DiscriminativeStart(named_dataset(), make_collator(), progress=False)
    with torch.inference_mode(), pytest.raises(ValueError, match="inference_mode forbids"):
        SoftPromptUnlearner(base, CONFIGS["prefix_tuning"](P), start=start)
    assert all(parameter.requires_grad for parameter in base.parameters())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([{"prompt": "a"}], make_collator()), TypeError, "dataset is a list"),
        ((rows_of(["jane"]), make_collator()), ValueError, "has no is_forget"),
        ((make_dataset(3, 3), "collator"), TypeError, "collator is a str"),
        ((make_dataset(3, 3), make_collator(), 0), ValueError, "num_tokens=0"),
        ((make_dataset(3, 3), make_collator(), "all"), TypeError, "num_tokens='all'"),
        ((make_dataset(3, 3).select(range(3)), make_collator()), ValueError, "no retain rows"),
        ((make_dataset(3, 3).select(range(3, 6)), make_collator()), ValueError, "no forget rows"),
    ],
)
def test_bad_arguments_of_the_start_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        DiscriminativeStart(*arguments)


def test_sliding_windows_are_read_too():
    base = build_gemma3(sliding_window=4).double()
    torch.manual_seed(0)
    start = DiscriminativeStart(named_dataset(), make_collator(), progress=False)
    unlearner = SoftPromptUnlearner(base, CONFIGS["prefix_tuning"](3), start=start)
    torch.manual_seed(0)
    default = SoftPromptUnlearner(build_gemma3(sliding_window=4).double(), CONFIGS["prefix_tuning"](3))
    for found, before in zip(*(layer_states(one.get_prompt(1)) for one in (unlearner, default)), strict=True):
        assert found.keys.isfinite().all()
        assert not torch.allclose(found.keys, before.keys, atol=1e-3)
