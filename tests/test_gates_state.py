"""The gate by hidden states, against plain forwards of one text at a time."""

from __future__ import annotations

import copy
import json
import logging
import string
import subprocess
import sys

import numpy as np
import pytest
import torch
from gated_texts import forget_texts, retain_texts
from helpers import FAMILIES, build, layers_on, lora, make_tokenizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

import spul.gates.probes
from spul import SoftPromptUnlearner, fingerprint
from spul.gates import AnyGate, HiddenStates, NameGate, Probe, StateGate, TextGate, load
from spul.gates.probes import POOLINGS, fit_probes
from spul.gates.thresholds import checked_fit_texts, folds
from spul.records.digests import digest_of_tokenizer

FORGET, RETAIN = forget_texts(30), retain_texts(40)
TEXTS, IS_FORGET = FORGET + RETAIN, np.arange(70) < 30
WIDE = {ord(letter): ord(letter) + 0xFEE0 for letter in string.ascii_letters}
OTHERS = [*forget_texts(5, seed=3), *retain_texts(6, seed=4), "a", "the film"]


@pytest.fixture(scope="module")
def model():
    return build("llama").eval()


@pytest.fixture(scope="module")
def gate(model):
    return StateGate.fit(model, make_tokenizer(), FORGET, RETAIN, recall=0.9, paraphrases=["doe, jane, in film 3"])


def plain_states(model, text, layer):
    ids = torch.tensor([make_tokenizer()(text)["input_ids"]])
    with torch.no_grad():
        return model(ids, output_hidden_states=True).hidden_states[layer][0].float()


def plain_score(model, gate, text):
    tokens = plain_states(model, text, gate.layer).double().numpy() @ gate.probe.weights[:, 0] + gate.probe.bias[0]
    return {"mean": tokens.mean(), "last": tokens[-1], "max": tokens.max()}[gate.pooling]


def probe_of(width, seed=0):
    draws = np.random.default_rng(seed)
    return Probe(draws.normal(size=(width, 1)), np.array([0.3]))


@pytest.mark.parametrize("pooling", POOLINGS)
def test_scores_are_those_of_each_text_alone(family, pooling):
    model = build(family).train()  # with dropout: read in evaluation mode
    twin = copy.deepcopy(model).eval()
    for layer in (0, 1, 2):
        gate = StateGate(HiddenStates(model, make_tokenizer(), 4), layer, pooling, probe_of(32), 0.0, 400)
        expected = [plain_score(twin, gate, text) for text in OTHERS]
        np.testing.assert_allclose(gate.scores(OTHERS), expected, rtol=1e-4, atol=1e-4)
    assert model.training


@pytest.mark.parametrize("wrap", ["prompt", "layers", "lora"])
def test_the_base_is_read_under_any_unlearner(wrap, model, gate):
    wrapped = {
        "prompt": lambda base: SoftPromptUnlearner(base, virtual_tokens()),
        "layers": layers_on,
        "lora": lora,
    }[wrap](build("llama").eval())
    other = StateGate(
        HiddenStates(wrapped, make_tokenizer()), gate.layer, gate.pooling, gate.probe, gate.threshold, gate.window
    )
    trainable = [name for name, p in wrapped.named_parameters() if p.requires_grad]
    np.testing.assert_allclose(other.scores(OTHERS), gate.scores(OTHERS), rtol=1e-5, atol=1e-5)
    assert [name for name, p in wrapped.named_parameters() if p.requires_grad] == trainable


def virtual_tokens():
    from peft import PromptTuningConfig

    return PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)


def test_scores_come_from_a_base_in_bfloat16_as_float32():
    model = build("llama").eval().to(torch.bfloat16)
    gate = StateGate(HiddenStates(model, make_tokenizer()), 2, "mean", probe_of(32), 0.0, 400)
    expected = [plain_score(model, gate, text) for text in OTHERS]
    np.testing.assert_allclose(gate.scores(OTHERS), expected, rtol=0.05, atol=0.05)
    assert gate.scores(OTHERS).dtype == np.float64


@pytest.fixture
def to_the_end(monkeypatch):
    """Probes fit until nothing changes, for comparisons."""
    monkeypatch.setattr(spul.gates.probes, "TOLERANCE", 1e-10)
    monkeypatch.setattr(spul.gates.probes, "MAX_ITERATIONS", 1000)


@pytest.mark.usefixtures("to_the_end")
def test_a_probe_of_one_state_is_scikit_learns_logistic_regression(model):
    fold = np.zeros(70, dtype=int)
    fold[::4] = 1
    states = HiddenStates(model, make_tokenizer())
    probes = fit_probes(states, TEXTS, IS_FORGET, fold, [1], seed=0)
    for pooling in ("mean", "last"):
        values = np.stack([take(plain_states(model, text, 1).numpy(), pooling) for text in TEXTS])
        values = (values - values.mean(axis=0)) / values.std(axis=0)
        for column, inside in enumerate([fold != 0, fold != 1, fold >= 0]):
            plain = LogisticRegression(C=0.5, class_weight="balanced", tol=1e-8, max_iter=10_000)
            plain.fit(values[inside], IS_FORGET[inside])
            raw = np.stack([take(plain_states(model, text, 1).numpy(), pooling) for text in TEXTS])
            probe = probes[1, pooling]
            np.testing.assert_allclose(
                raw @ probe.weights[:, column] + probe.bias[column], plain.decision_function(values), atol=1e-2
            )


def take(tokens, pooling):
    return tokens.mean(axis=0) if pooling == "mean" else tokens[-1]


@pytest.mark.usefixtures("to_the_end")
def test_a_probe_of_tokens_minimizes_the_loss_of_their_log_sum_exp(model):
    """By scipy, written out text by text."""
    from scipy.optimize import minimize

    states = HiddenStates(model, make_tokenizer())
    probe = fit_probes(states, TEXTS, IS_FORGET, np.arange(70) % 2, [1], seed=0)[1, "max"]
    tokens = [plain_states(model, text, 1).double().numpy() for text in TEXTS]
    every = np.concatenate(tokens)
    mean, scale = every.mean(axis=0), every.std(axis=0)
    tokens = [(each - mean) / scale for each in tokens]
    weights = np.where(IS_FORGET, 70 / 2 / 30, 70 / 2 / 40)

    def loss(parameters):
        scores = np.array([np.logaddexp.reduce(each @ parameters[:-1] + parameters[-1]) for each in tokens])
        signed = np.where(IS_FORGET, scores, -scores)
        return (weights * np.logaddexp(0, -signed)).sum() + parameters[:-1] @ parameters[:-1]  # C = 1/2

    best = minimize(loss, np.zeros(33), method="L-BFGS-B", options={"maxiter": 2000}).fun
    found = np.append(probe.weights[:, 2] * scale, probe.bias[2] + probe.weights[:, 2] @ mean)
    assert loss(found) == pytest.approx(best, rel=1e-3)
    assert loss(np.zeros(33)) > 3 * best


def test_the_choice_threshold_and_report_are_of_probes_fit_without_the_fold(model, gate):
    given = checked_fit_texts(FORGET, RETAIN, None, 0.9)
    fold = folds(given, 0)
    probes = fit_probes(HiddenStates(model, make_tokenizer()), TEXTS, IS_FORGET, fold, [1, 2], seed=0)
    assert all(len(text) <= gate.window for text in FORGET[:20])
    ranks = {}
    for (layer, pooling), probe in probes.items():
        held_out = np.zeros(70)
        for i, text in enumerate(TEXTS):
            one = StateGate(
                HiddenStates(model, make_tokenizer()), layer, pooling,
                Probe(probe.weights[:, fold[i]][:, None], probe.bias[fold[i]][None]), 0.0, gate.window,
            )  # fmt: skip
            held_out[i] = one.scores([text])[0]
        threshold = np.sort(held_out[:30])[::-1][27 - 1]
        flagged = held_out >= threshold - 1e-3
        ranks[layer, pooling] = (
            (flagged[30:].sum(), -roc_auc_score(IS_FORGET, held_out.round(3))), threshold, flagged[:30].sum()
        )  # fmt: skip
    best = min(sorted(ranks), key=lambda choice: ranks[choice][0])
    assert (gate.layer, gate.pooling) == best
    assert gate.threshold == pytest.approx(ranks[best][1] - 1e-3, abs=5e-4)
    assert gate.report.recall.flagged == ranks[best][2] >= 27
    assert gate.report.false_alarms.flagged == ranks[best][0][0]
    assert gate.report.paraphrases.texts == 1
    assert "5 folds, which chose one of 6 probes" in gate.report.source
    assert np.array_equal(gate.probe.weights[:, 0], probes[best].weights[:, -1])


def test_the_gate_tells_texts_apart_that_it_was_not_fit_on(gate):
    report = gate.measure(forget_texts(40, seed=8), retain_texts(40, seed=9))
    assert report.recall.share > 0.8
    assert report.false_alarms.share < 0.2
    assert not gate.failures


def test_a_forget_question_in_a_long_text_is_found(model):
    gate = StateGate.fit(model, make_tokenizer(), FORGET, RETAIN, layers=[1], recall=0.9)
    long = " ".join(retain_texts(4, seed=11))
    mixed = " ".join([*retain_texts(2, seed=11), "jane doe in plot 3 was good", *retain_texts(2, seed=12)])
    windowless = StateGate(gate.states, gate.layer, "mean", gate.probe, 0.0, 10_000)
    windowed = StateGate(gate.states, gate.layer, "mean", gate.probe, 0.0, 32)
    assert len(long) > 100
    assert windowed.scores([mixed])[0] > windowless.scores([mixed])[0]
    assert windowless.scores([long])[0] <= windowed.scores([long])[0]


@pytest.mark.parametrize(
    "disguise",
    [
        lambda text: text.replace("a", "a\u200b"),
        lambda text: text.replace("a", "a\u3164"),  # a Hangul filler
        lambda text: text.translate(WIDE),
        lambda text: text.translate({ord("a"): "\u1d00", ord("e"): "\u1d07"}),  # small capitals
    ],
)
def test_invisible_full_width_and_styled_characters_hide_no_forget_text(gate, disguise):
    texts = forget_texts(5, seed=3)
    plain, found = gate.scores(texts), gate.scores([disguise(text) for text in texts])
    assert (found >= plain - 1e-4).all()


@pytest.mark.parametrize("text", ["film " * 200, ""])
def test_a_text_that_the_base_cannot_read_gets_the_prompt_and_is_counted(gate, text, caplog):
    gate.failures.clear()
    with pytest.raises(ValueError, match=r"tokens; expected at least 1 and at most 96"):
        gate.scores([text])
    with caplog.at_level(logging.WARNING):
        flags = gate.flags([OTHERS[-1], text, OTHERS[-2]])
    assert flags[1]
    assert flags[[0, 2]].tolist() == gate.flags([OTHERS[-1], OTHERS[-2]]).tolist()
    assert gate.failures == {"ValueError": 1}
    assert "tokens; expected" in caplog.text


def test_a_text_that_begins_with_its_own_first_token_gets_no_second():
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    states = HiddenStates(build("llama"), tokenizer)
    assert states.token_ids(["<s>the film"])[0].count(tokenizer.bos_token_id) == 1


def test_a_base_that_has_diverged_fails_and_attaches(gate):
    model = build("llama").eval()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    broken = StateGate(HiddenStates(model, make_tokenizer()), 2, "mean", gate.probe, 1e9, 400)
    assert broken.flags(["the film", "jane"]).all()
    with pytest.raises(ValueError, match="hidden states of layer 2 are not finite"):
        broken.scores(["the film"])
    with pytest.raises(ValueError, match="not finite"):
        StateGate.fit(model, make_tokenizer(), FORGET, RETAIN)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"layers": [3]}, ValueError, r"layers=\[3\]; expected a list of layers, 0 \(embeddings\) to 2"),
        ({"layers": [-1]}, ValueError, r"layers=\[-1\]"),
        ({"layers": []}, ValueError, r"layers=\[\]"),
        ({"layers": [True]}, ValueError, r"layers=\[True\]"),
        ({"recall": 0}, ValueError, r"recall=0"),
        ({"forget_texts": []}, ValueError, r"forget_texts has 0"),
        ({"retain_texts": [5, 6]}, TypeError, r"2 of 2 texts are not strings"),
        ({"retain_texts": [*RETAIN, "film " * 200]}, ValueError, r"at most 96, the positions of the base"),
        ({"model": "folder"}, TypeError, r"model is a str"),
        ({"tokenizer": None}, TypeError, r"tokenizer is a NoneType"),
        ({"model": build("llama").to("meta")}, ValueError, r"not in memory"),
        ({"batch_size": 0}, ValueError, r"batch_size=0; expected at least 1"),
    ],
)
def test_what_no_gate_can_be_fit_on_is_refused(model, change, error, message):
    arguments = {"model": model, "tokenizer": make_tokenizer(), "forget_texts": FORGET, "retain_texts": RETAIN}
    with pytest.raises(error, match=message):
        StateGate.fit(**{**arguments, **change})


def test_an_index_alone_is_one_layer(model):
    gate = StateGate.fit(model, make_tokenizer(), FORGET, RETAIN, layers=1, recall=0.9)
    assert gate.layer == 1
    assert "one of 3 probes" in gate.report.source


def test_saved_gates_score_the_same_to_the_last_bit_in_another_process(model, gate, tmp_path):
    """Those by names and by wording, too."""
    joined = AnyGate([gate, TextGate.fit(FORGET, RETAIN, recall=0.9), NameGate(["doe"])])
    joined.save(tmp_path / "gate")
    model.save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "texts.json").write_text(json.dumps(OTHERS))
    code = (
        "import json, numpy as np, torch; torch.set_num_threads(1); from spul.gates import load; "
        "from transformers import LlamaForCausalLM as M, PreTrainedTokenizerFast as T; "
        "g = load('gate', M.from_pretrained('base'), T.from_pretrained('base')); t = json.load(open('texts.json')); "
        "np.save('scores.npy', [each.scores(t) for each in [g, *g.gates]])"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, capture_output=True)
    expected = [each.scores(OTHERS) for each in [joined, *joined.gates]]
    assert np.array_equal(np.load(tmp_path / "scores.npy"), expected)


def test_a_saved_gate_comes_back_on_its_base_under_any_prompt(model, gate, tmp_path):
    gate.save(tmp_path / "gate")
    again = load(tmp_path / "gate", SoftPromptUnlearner(model, virtual_tokens()), make_tokenizer())
    assert (again.threshold, again.window, again.report) == (gate.threshold, gate.window, gate.report)
    assert np.array_equal(again.scores(OTHERS), gate.scores(OTHERS))
    fields = json.loads((tmp_path / "gate" / "gate.json").read_text())
    assert fields["base_fingerprint"] == fingerprint(model)
    assert fields["tokenizer_digest"] == digest_of_tokenizer(make_tokenizer())


def test_another_base_another_tokenizer_or_none_is_refused(model, gate, tmp_path):
    gate.save(tmp_path)
    other = make_tokenizer()
    other.add_tokens(["zzz"])
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    for arguments, message in [
        ((changed, make_tokenizer()), "was fit on another model: base_fingerprint is"),
        ((model, other), "was fit on another tokenizer: tokenizer_digest is"),
        ((None, other), r"model is None; expected load\(folder, model=\.\.\., tokenizer="),
        ((model, None), "tokenizer is None"),
    ]:
        with pytest.raises(ValueError, match=message):
            load(tmp_path, *arguments)
    with pytest.raises(TypeError, match="model is a str"):
        load(tmp_path, "base", make_tokenizer())
    with pytest.raises(ValueError, match=r"lacks|layer is 1|layer is 2|another model"):
        load(tmp_path, build("gpt2"), make_tokenizer())


def test_fitting_leaves_the_model_as_it_was():
    model = build("opt").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    StateGate.fit(model, make_tokenizer(), FORGET, RETAIN, layers=[1], recall=0.9)
    assert all(module.training for module in model.modules())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_every_family_of_the_tests_has_layers_to_read():
    for family in FAMILIES:
        assert HiddenStates(build(family), make_tokenizer()).num_layers == 2
