"""Corrupted embeddings (ECO): which entries of which tokens change, by how much, and for which requests."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from helpers import build, make_collator, make_tokenizer, rows

from spul.evaluation.metrics.scoring import score_completions
from spul.gates import NameGate
from spul.rivals import Corruption, EmbeddingCorruption

CORRUPTIONS = [Corruption("noise", 3.0, 1), Corruption("noise", 0.5, 32), Corruption("zero", dims=5),
               Corruption("flip", dims=32)]  # fmt: skip


def corrupted(corruption=CORRUPTIONS[0], base=None, gate=None, **options):
    base, gate = build("llama") if base is None else base, NameGate(["jane"]) if gate is None else gate
    return EmbeddingCorruption(base, make_tokenizer(), gate, corruption, **options).eval()


def plain(corruption, embeddings, seed):
    """The change of (n, d) embeddings, entry by entry."""
    changed = embeddings.clone()
    noise = np.random.default_rng(seed).standard_normal((len(embeddings), corruption.dims))
    for i, row in enumerate(embeddings):
        if corruption.kind == "noise":
            for k in range(corruption.dims):
                changed[i, k] = row[k] + corruption.strength * noise[i, k]
            continue
        for k in sorted(range(len(row)), key=lambda k: -abs(row[k]))[: corruption.dims]:
            changed[i, k] = 0.0 if corruption.kind == "zero" else -row[k]
    return changed


@pytest.mark.parametrize("corruption", CORRUPTIONS, ids=str)
def test_embeddings_change_entry_by_entry_as_published(corruption):
    embeddings = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(corruption.of(embeddings, [3, 1, 4]), plain(corruption, embeddings, [3, 1, 4]))


def test_noise_has_the_strength_as_its_standard_deviation():
    noise = Corruption("noise", 7.0, 50).of(torch.zeros(200, 60), [0])
    assert noise[:, :50].std().item() == pytest.approx(7.0, rel=0.05)
    assert not noise[:, 50:].any()


@pytest.mark.parametrize("corruption", CORRUPTIONS, ids=str)
@pytest.mark.parametrize("seed", [0, 9])
def test_logits_are_those_of_the_base_on_corrupted_embeddings(corruption, seed, family):
    """The plain twin: one row at a time, embeddings of the base changed and passed on."""
    model = corrupted(corruption, build(family), seed=seed)
    base, tokenizer = model.get_base_model(), make_tokenizer()
    texts = [("about jane :", " good film"), ("about the film :", " bad"), ("jane :", " plot")]
    encoded = [(tokenizer(a)["input_ids"], tokenizer(b, add_special_tokens=False)["input_ids"]) for a, b in texts]
    width = max(len(a) + len(b) for a, b in encoded)
    ids = torch.tensor([a + b + [0] * (width - len(a) - len(b)) for a, b in encoded])
    mask = torch.tensor([[1] * (len(a) + len(b)) + [0] * (width - len(a) - len(b)) for a, b in encoded])
    positions = torch.tensor([[len(a) - 1, len(a)] for a, _ in encoded])
    with torch.no_grad():
        found = model.response_logits(ids, mask, positions)
        for i, (request, answer) in enumerate(encoded):
            embeddings = base.get_input_embeddings()(torch.tensor([request + answer]))[0]
            if "jane" in texts[i][0]:
                num = len(request) - 1  # all but the last token of the request
                embeddings[:num] = plain(corruption, embeddings[:num], [seed, *request])
            expected = base(inputs_embeds=embeddings[None]).logits[0, positions[i]]
            torch.testing.assert_close(found[i], expected, rtol=1e-4, atol=1e-4)


def test_tokens_of_names_alone_are_corrupted_where_there_are_any():
    model, tokenizer = corrupted(names=["Jane  Doe", "plot"]), make_tokenizer()
    for text, expected in {
        "the film of jane doe and a plot .": ["jane doe", "plot"],
        "jane does plots": None,
        "plot": ["plot"],
        "about jane": None,
    }.items():
        ids = tokenizer(text)["input_ids"]
        chosen = model.chosen(ids)
        if expected is None:
            assert chosen == list(range(len(ids) - 1))
            continue
        groups, start = [], 0
        for i in range(1, len(chosen) + 1):
            if i == len(chosen) or chosen[i] != chosen[i - 1] + 1:
                groups.append(tokenizer.decode([ids[k] for k in chosen[start:i]]).strip())
                start = i
        assert groups == expected
    assert model.chosen([7]) == [0]


def test_noise_depends_on_the_request_and_the_seed_alone():
    model, collator = corrupted(), make_collator()
    some = rows("jane", 6)
    found = score_completions(model, some, collator, batch_size=6)
    assert score_completions(model, some, collator, batch_size=1)["loss"] == pytest.approx(found["loss"], rel=1e-5)
    other = corrupted(base=model.get_base_model(), seed=1)
    assert score_completions(other, some, collator)["loss"] != pytest.approx(found["loss"], rel=1e-4)


def test_requests_that_are_not_flagged_are_the_bases():
    model, collator = corrupted(), make_collator()
    base = model.get_base_model()
    assert score_completions(model, rows("film", 4), collator) == score_completions(base, rows("film", 4), collator)
    assert score_completions(model, rows("jane", 4), collator) != score_completions(base, rows("jane", 4), collator)


def test_a_gate_that_fails_corrupts_and_says_so(caplog):
    def broken(texts):
        raise RuntimeError("no light")

    collator, base = make_collator(), build("llama")
    found = score_completions(corrupted(base=base, gate=broken), rows("film", 4), collator)
    everything = corrupted(base=base, gate=lambda texts: [True] * len(texts))
    assert found == score_completions(everything, rows("film", 4), collator)
    assert found != score_completions(base, rows("film", 4), collator)
    assert "no light" in caplog.text


def test_other_threads_on_the_base_see_no_corruption():
    model = corrupted()
    base, seen = model.get_base_model(), []
    ids = torch.tensor([make_tokenizer()("about jane :")["input_ids"]])
    with torch.no_grad():
        expected = base(ids).logits

        def other(*_):
            if threading.current_thread() is threading.main_thread() and not seen:
                thread = threading.Thread(target=lambda: seen.append(base(ids).logits.detach()))
                thread.start()
                thread.join()

        hook = base.get_input_embeddings().register_forward_pre_hook(other)
        found = model.response_logits(ids, torch.ones_like(ids), torch.tensor([[ids.shape[1] - 1]]))
        hook.remove()
    torch.testing.assert_close(seen[0], expected)
    assert not torch.allclose(found[0, 0], expected[0, -1])


def test_a_base_that_goes_around_its_embedding_is_refused():
    base = build("llama")
    base.get_input_embeddings = lambda: torch.nn.Embedding(2, 2)
    ids = torch.tensor([[5, 6]])
    with pytest.raises(ValueError, match="nothing was corrupted"):
        corrupted(base=base, gate=lambda texts: [True]).response_logits(ids, torch.ones_like(ids), torch.tensor([[1]]))


def test_a_prefill_in_chunks_is_refused():
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with pytest.raises(ValueError, match="expected them in one pass"):
        corrupted().generate(ids, max_new_tokens=2, prefill_chunk_size=2)


def test_generation_without_a_cache_would_read_the_request_uncorrupted_and_is_refused():
    ids = torch.tensor([make_tokenizer()("about jane")["input_ids"]])
    with pytest.raises(ValueError, match="reads the request again at every step"):
        corrupted().generate(ids, max_new_tokens=3, use_cache=False)


def test_noise_beyond_the_range_of_the_embeddings_is_refused():
    with pytest.raises(ValueError, match="beyond the range of"):
        Corruption("noise", 1e6).of(torch.zeros(9, 4, dtype=torch.float16), [0])
    assert Corruption("noise", 1e6).of(torch.zeros(9, 4, dtype=torch.bfloat16), [0]).isfinite().all()


@pytest.mark.parametrize(
    "fields",
    [{"kind": "blur"}, *({"strength": bad} for bad in (0.0, float("nan"), 10**400)), {"dims": 0}, {"dims": 1.5}],
)
def test_a_corruption_is_of_a_kind_with_a_strength_and_dims(fields):
    with pytest.raises(ValueError, match="expected a kind"):
        Corruption(**fields)


def test_arguments_are_checked():
    with pytest.raises(TypeError, match="expected a Corruption"):
        corrupted(0.5)
    with pytest.raises(ValueError, match="seed"):
        corrupted(seed=-1)
    with pytest.raises(ValueError, match="names"):
        corrupted(names=[])
    with pytest.raises(ValueError, match="lower dims"):
        Corruption("zero", dims=4).of(torch.zeros(1, 3), [0])
