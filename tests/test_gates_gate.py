"""The protocol of a gate: a gate that fails attaches the prompt, and says so."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from datasets import Dataset
from gated_texts import forget_texts, retain_texts
from helpers import CHAT_TEMPLATE, build, make_tokenizer

from spul.data.encoder import RowEncoder
from spul.gates import (
    AnyGate,
    FunctionGate,
    Gate,
    GateReport,
    HiddenStates,
    NameGate,
    Probe,
    Rate,
    StateGate,
    TextGate,
    as_gate,
    flags_of,
    hard_negatives,
    load,
    prompt_texts,
)
from spul.gates.gate import request_texts
from spul.gates.routes import Routes
from spul.rivals import FixedRefusal


class LengthGate(Gate):
    """Scores a text by its length; fails on "boom", and gives what is no number for "nan" and "inf"."""

    threshold = 3.0

    def __init__(self):
        self.asked = []

    def scores(self, texts):
        self.asked.append(len(texts))
        if "boom" in texts:
            raise RuntimeError("the lights are out")
        odd = {"nan": np.nan, "inf": -np.inf}
        return np.array([odd.get(text, len(text)) for text in texts], dtype=float)


def test_flags_are_scores_that_reach_the_threshold():
    gate = LengthGate()
    assert gate.flags(["a", "abc", "ab", "abcd"]).tolist() == [False, True, False, True]
    assert gate.flags([]).dtype == bool
    assert gate.flags([]).shape == (0,)
    assert not gate.failures


@pytest.mark.parametrize(("text", "kind"), [("boom", "RuntimeError"), ("nan", "ValueError"), ("inf", "ValueError")])
def test_a_text_on_which_a_gate_fails_gets_the_prompt_and_the_others_are_judged(text, kind, caplog):
    gate = LengthGate()
    texts = ["a", "abcd", "b", text, "c", "d", "e", "f", "g"]
    with caplog.at_level(logging.WARNING):
        assert gate.flags(texts).tolist() == [False, True, False, True] + [False] * 5
        assert gate.flags([text, text]).tolist() == [True, True]
    assert gate.failures == {kind: 3}
    assert len(caplog.records) == 1
    assert kind in caplog.text
    assert "gets the prompt" in caplog.text
    with pytest.raises((RuntimeError, ValueError)):
        gate.decide([text])


def test_one_failing_text_costs_few_further_calls():
    gate = LengthGate()
    gate.flags(["boom", *"abcdefghijklmnopqrstuvwxyzabcde"])
    assert len(gate.asked) <= 1 + 2 * 5


@pytest.mark.parametrize(
    "function",
    [
        lambda texts: [1 for _ in texts],
        lambda texts: [0.0 for _ in texts],
        lambda texts: ["False" for _ in texts],
        lambda texts: [False],
        lambda texts: [],
        lambda texts: None,
        lambda texts: [[False] for _ in texts],
        lambda texts: [None for _ in texts],
        lambda texts: 1 / 0,
    ],
)
def test_a_function_that_returns_no_bool_for_each_text_fails(function):
    gate = as_gate(lambda texts: function(texts) if len(texts) == 2 else [[False]])
    assert gate.flags(["a", "b"]).tolist() == [True, True]
    assert sum(gate.failures.values()) == 2


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor, tuple])
def test_plain_functions_are_gates(kind):
    def by_name(texts):
        return kind(["jane" in text for text in texts])

    assert flags_of(by_name, ["jane doe", "a film"]).tolist() == [True, False]
    gate = as_gate(by_name)
    assert isinstance(gate, FunctionGate)
    assert as_gate(gate) is gate
    assert gate.scores(["jane doe", "a film"]).tolist() == [1.0, 0.0]
    assert "by_name" in repr(gate)
    for wrong in ("jane", None, NameGate):
        with pytest.raises(TypeError, match=r"a gate is a .*; expected a gate of spul\.gates, or a function"):
            as_gate(wrong)


@pytest.mark.parametrize("texts", ["jane", ["jane", 5], [None]])
def test_texts_that_are_no_strings_are_the_callers_error_not_the_gates(texts):
    gates = [LengthGate(), as_gate(lambda texts: [False for _ in texts]), NameGate(["jane"])]
    for gate in [*gates, AnyGate(gates)]:
        for call in (gate.flags, gate.scores, gate.decide, lambda t, gate=gate: flags_of(gate, t)):
            if not (isinstance(gate, LengthGate) and call == gate.scores):
                with pytest.raises(TypeError, match="texts"):
                    call(texts)
        assert not gate.failures


def test_interrupts_are_no_failures():
    def interrupted(texts):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        flags_of(interrupted, ["a"])


def test_any_gate_flags_what_one_of_its_gates_flags_or_fails_on():
    gate = AnyGate([LengthGate(), NameGate(["al"]), lambda texts: ["z" in text for text in texts]])
    assert gate.flags(["a", "al", "abcd", "z", "ab", "boom"]).tolist() == [False, True, True, True, False, True]
    assert gate.gates[0].failures == {"RuntimeError": 1}
    assert not gate.failures
    nested = AnyGate([gate, gate.gates[1]])
    assert nested.parts() == [nested, gate, *gate.gates], "each once"
    assert gate.scores(["a", "al", "abcd", "z"]).tolist() == [-1.0, 0.0, 1.0, 0.0]
    assert gate.flags([]).tolist() == []


def test_any_gate_takes_a_list_of_gates():
    with pytest.raises(ValueError, match="gates is empty"):
        AnyGate([])
    with pytest.raises(TypeError, match="expected a list of gates"):
        AnyGate(NameGate(["jane"]))
    with pytest.raises(TypeError, match="a gate is a str"):
        AnyGate(["jane"])


def test_measured_rates_are_counts_of_flags_with_wilsons_interval():
    gate = LengthGate()
    report = gate.measure(["abc", "abcd", "a"], ["a", "abc", "b", "c"], paraphrases=["abcdef", "boom"])
    assert report == GateReport(Rate(2, 3), Rate(1, 4), Rate(2, 2), "texts given to measure")
    z, n, p = 1.959963984540054, 4, 0.25
    middle, half = (p + z * z / 2 / n), z * (p * (1 - p) / n + z * z / 4 / n / n) ** 0.5
    scale = 1 + z * z / n
    assert report.false_alarms.interval == pytest.approx(((middle - half) / scale, (middle + half) / scale))
    assert report.recall.share == 2 / 3
    assert "66.7% (2 of 3; 95 % interval" in str(report)
    assert gate.measure(["abc"], ["a"]).paraphrases is None
    with pytest.raises(ValueError, match="0 forget and 1 retain texts"):
        gate.measure([], ["a"])


@pytest.mark.parametrize("position", ["start", "message"])
def test_prompts_as_texts_are_what_a_gate_reads_of_them_and_are_not_cut(position):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    encoder = RowEncoder(tokenizer, 4, prompt_position=position)
    talk = [{"role": "system", "content": "be good"}, {"role": "user", "content": "the film and plot"}]
    rows = Dataset.from_list([{"prompt": talk}, {"prompt": [talk[1]]}])
    found = prompt_texts(rows, encoder)
    rendered = [tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True) for row in rows]
    assert found == request_texts(tokenizer, [one["input_ids"] for one in rendered])
    assert "be good" in found[0]
    assert "the film and plot" in found[1]
    seen = []
    gate = as_gate(lambda texts: seen.extend(texts) or [False] * len(texts))
    whole = RowEncoder(tokenizer, 99).prompts(list(rows))
    FixedRefusal(build("llama"), tokenizer, gate, " no").generate(**whole, max_new_tokens=1)
    assert [text.strip() for text in seen] == [text.strip() for text in found]


def test_hard_negatives_are_the_rows_of_the_highest_scores_in_their_order():
    rows = Dataset.from_list([{"prompt": "x" * n, "completion": str(i)} for i, n in enumerate([2, 5, 1, 5, 3])])
    found = hard_negatives(LengthGate(), rows, 3)
    assert isinstance(found, Dataset)
    assert found["completion"][:] == ["1", "3", "4"]
    assert hard_negatives(LengthGate(), rows["prompt"][:], 2) == ["xxxxx", "xxxxx"]
    named = rows.rename_column("prompt", "question")
    assert hard_negatives(LengthGate(), named, 5, text_field="question")["completion"][:] == ["1", "3", "4", "0", "2"]
    assert hard_negatives(lambda texts: [len(t) == 1 for t in texts], rows, 1)["completion"][:] == ["2"]
    for n in (0, 6, 1.5, True):
        with pytest.raises(ValueError, match=r"of 5 retain rows; expected an integer from 1"):
            hard_negatives(LengthGate(), rows, n)
    with pytest.raises(ValueError, match=r"lacks the column.*text_field"):
        hard_negatives(LengthGate(), named, 1)


def test_joined_gates_are_saved_and_loaded_whole(tmp_path):
    text = TextGate.fit(forget_texts(), retain_texts(), recall=0.9)
    gate = AnyGate([NameGate(["Jane Doe"]), AnyGate([text, NameGate(["Al"])])])
    gate.report = gate.measure(forget_texts(seed=5), retain_texts(seed=6))
    gate.save(tmp_path / "gate")
    again = load(tmp_path / "gate")
    texts = [*forget_texts(seed=3), *retain_texts(seed=4), "al", ""]
    assert again.report == gate.report
    assert np.array_equal(again.scores(texts), gate.scores(texts))
    assert np.array_equal(again.flags(texts), gate.flags(texts))
    assert load(tmp_path, subfolder="gate").report == gate.report  # as the Hub's repositories are read


def test_a_joined_gate_with_a_function_is_not_saved_and_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="is a function, which cannot be saved"):
        AnyGate([NameGate(["jane"]), lambda texts: [True for _ in texts]]).save(tmp_path / "gate")
    assert list((tmp_path / "gate").iterdir()) == []


@pytest.mark.parametrize("base", [LengthGate, NameGate, AnyGate])
def test_a_gate_of_ones_own_class_is_told_apart_and_not_saved_in_half(base, tmp_path):
    class Own(base):
        def settings(self):
            return {"names": ["jane"]} if base is LengthGate else super().settings()

    one = {LengthGate: [], NameGate: [["jane"]], AnyGate: [[NameGate(["jane"])]]}[base]
    gate, twin = Own(*one), base(*one)
    assert gate.identity() == Own(*one).identity() != twin.identity()
    (tmp_path / "gate").mkdir()
    for each in (gate, AnyGate([NameGate(["doe"]), gate])):
        with pytest.raises(ValueError, match="a Own is a gate of your own, which cannot be loaded again"):
            each.check_savable()
        with pytest.raises(ValueError, match="Saved are NameGate, TextGate, StateGate, AnyGate"):
            each.save(tmp_path / "gate")
    assert list((tmp_path / "gate").iterdir()) == []


def test_a_threshold_that_would_not_come_back_is_refused(tmp_path):
    gate = NameGate(["jane", "doe"])
    gate.threshold = 2.0
    assert gate.flags(["jane", "jane and doe"]).tolist() == [False, True]
    for each in (gate, AnyGate([gate])):
        with pytest.raises(ValueError, match=r"threshold is 2.0, and a NameGate is saved with 1.0 alone"):
            each.save(tmp_path)
    assert not any(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"threshold=0.5: an AnyGate has none of its own; assign those of its gates"):
        AnyGate([gate]).threshold = 0.5


def test_a_score_that_is_not_finite_is_no_place_among_hard_negatives():
    class Fails(Gate):
        def scores(self, texts):
            return np.array([np.nan, *range(len(texts) - 1)])

    with pytest.raises(ValueError, match="1 of them not finite"):
        hard_negatives(Fails(), ["a", "b", "c"], 2)


@pytest.mark.parametrize("threshold", [float("nan"), float("inf"), "0.5"])
def test_a_gate_whose_threshold_is_no_number_attaches_the_prompt(threshold):
    gate = NameGate(["Jane Doe"])
    gate.threshold = threshold
    assert gate.flags(["nobody", "Jane Doe"]).tolist() == [True, True]
    assert sum(gate.failures.values()) == 2


HALF = "who is jane doe \ud83d"


def test_half_of_a_surrogate_pair_is_refused_where_a_gate_is_made():
    with pytest.raises(ValueError, match=r"text 40 of 41 holds '\\ud83d' at character 16"):
        TextGate.fit([*forget_texts(), HALF], retain_texts())
    with pytest.raises(ValueError, match=r"text 0 of 1 holds '\\ud83d'"):
        TextGate.fit(forget_texts(), retain_texts(), paraphrases=[HALF])
    with pytest.raises(ValueError, match=r"text 2 of 3 holds '\\ud83d'"):
        StateGate.fit(build("llama"), make_tokenizer(), ["a", "b"], ["c", "d", HALF])
    with pytest.raises(ValueError, match=r"names has the name .*'\\ud83d'"):
        NameGate([HALF])
    with pytest.raises(ValueError, match=r"aliases\['jane'\] has the name .*'\\ud83d'"):
        NameGate(["jane"], {"jane": [HALF]})


def test_a_request_with_half_of_a_surrogate_pair_gets_the_prompt_and_the_others_are_judged(caplog):
    functions = as_gate(lambda texts: [False for _ in texts])
    states = StateGate(
        HiddenStates(build("llama"), make_tokenizer()), 1, "mean", Probe(np.zeros((32, 1)), np.zeros(1)), 1.0, 40
    )
    gates = [NameGate(["jane doe"]), TextGate.fit(forget_texts(), retain_texts(), recall=0.9), functions, states]
    for gate in [*gates, AnyGate(gates)]:
        assert gate.flags(["the plot", "\udc00 the plot", "the end"]).tolist() == [False, True, False]
        with pytest.raises(ValueError, match=r"text 0 of 1 holds '\\udc00' at character 0"):
            gate.scores(["\udc00 the plot"])
    assert [gate.failures["ValueError"] for gate in gates] == [2] * 4
    assert "A gate (names) failed on a text" in caplog.text
    assert "jane" not in caplog.text
    assert Routes({"one": gates[0]}, ["one"], {}).names(["\udc00", "the plot"]) == ["one", "__base__"]


def test_gates_read_tool_calls_that_the_template_writes():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}"
        "{% for call in m.tool_calls or [] %}{{ call.function.arguments | tojson }}{% endfor %}</s>{% endfor %}"
    )
    called = {"role": "assistant", "content": "", "tool_calls": [{"function": {"arguments": {"query": "jane doe"}}}]}
    rows = [{"prompt": [{"role": "user", "content": "the film"}, called]}]
    texts = prompt_texts(Dataset.from_list(rows), RowEncoder(tokenizer, 99))
    assert NameGate(["jane doe"]).flags(texts).all()
    assert not NameGate(["jane doe"]).flags(["the film"]).any()
