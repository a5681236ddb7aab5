"""Routes: they stay as they are while prompts come and go; without some they lack what these are a part of, too."""

from __future__ import annotations

from servers import make_gated

from spul.gates import GatedUnlearner, NameGate
from spul.gates.gate import as_gate
from spul.gates.routes import Routes

TEXTS = ["jane", "doe", "jane doe", "good"]


def test_a_text_gets_the_first_prompt_that_flags_it_or_the_one_for_several_together():
    gates = {name: as_gate(NameGate([word])) for name, word in (("a", "jane"), ("b", "doe"))}
    routes = Routes(gates, ["b", "a"], {})
    assert routes.names(TEXTS) == ["a", "b", "b", "__base__"]
    both = Routes(gates, ["b", "a"], {frozenset("ab"): "c"})
    assert both.names(TEXTS) == ["a", "b", "c", "__base__"]
    assert both.without(["a"]).names(TEXTS) == ["__base__", "b", "b", "__base__"]
    assert both.without(["c"]).names(TEXTS) == ["a", "b", "b", "__base__"]
    assert both.without(["a", "b"]).names(TEXTS) == ["__base__"] * 4
    assert both.names([]) == []


def test_a_name_is_that_of_the_same_prompt_until_its_gate_is_anothers():
    one, two, other = (as_gate(NameGate(["jane"])) for _ in range(3))
    before = Routes({"a": one, "b": two}, ["a", "b"], {frozenset("ab"): "c"})
    now = Routes({"a": one, "b": other}, ["a", "b"], {frozenset("ab"): "c"})
    assert [now.has_same(name, before) for name in ("a", "b", "c", "__base__", "d")] == [
        True,
        False,
        True,
        True,
        False,
    ]
    assert not now.without(["c"]).has_same("c", before)


def test_those_of_a_model_do_not_change_with_it():
    plain = make_gated("other")
    gated = GatedUnlearner(plain.unlearner, plain.tokenizer, plain.gates)
    before = gated.routes
    assert before.names(TEXTS) == gated.route(TEXTS) == ["default", "other", "default", "__base__"]
    gated.delete_adapter("default")
    assert gated.route(TEXTS) == ["__base__", "other", "other", "__base__"]
    assert before.names(TEXTS) == ["default", "other", "default", "__base__"]
