"""Routes: the prompt of each request, by gates and precedence as they are at one moment."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from ..prompts.names import NO_PROMPT
from .gate import Gate


@dataclass(frozen=True, eq=False)
class Routes:
    """From requests to prompts: a request gets the first prompt whose gate flags it, or the one for several together.

    Prompts that come and go make new routes; these stay as they are.

    Args:
        gates: of each prompt its gate.
        precedence: names of the prompts, the first first.
        combined: for sets of names the one prompt for all of them.
    """

    gates: Mapping[str, Gate]
    precedence: Sequence[str]
    combined: Mapping[frozenset[str], str]

    def check(self, prompts: Collection[str]) -> None:
        """Raise unless every prompt has a route, and every route a prompt.

        Args:
            prompts: names of the prompts that there are.

        Raises:
            ValueError: if not.
        """
        gated = list(self.gates)
        if unknown := sorted(({*gated, *self.combined.values()}) - set(prompts)):
            raise ValueError(
                f"gates and combined name {unknown}, which the model does not have; it has {list(prompts)}. A prompt "
                "is removed by delete_adapter of the GatedUnlearner, which drops its gate as well."
            )
        if sorted(self.precedence) != sorted(gated):
            raise ValueError(f"precedence is {self.precedence}; expected the names of the gates, {gated}, each once.")
        if bad := [sorted(names) for names in self.combined if len(names) < 2 or not names <= set(gated)]:
            raise ValueError(f"combined has the set {bad[0]}; expected two or more of the gates, {gated}.")
        if off := sorted(set(prompts) - set(gated) - set(self.combined.values())):
            raise ValueError(
                f"{off} have no gate, so nothing would turn them on; give each a gate, or delete it "
                "(delete_adapter). A function that returns True for every text keeps a prompt on."
            )

    def names(self, texts: list[str]) -> list[str]:
        """The name of the prompt that each text gets, `"__base__"` for none."""
        flags = {name: gate.flags(texts) for name, gate in self.gates.items()}
        by_text = [[name for name in self.precedence if flags[name][i]] for i in range(len(texts))]
        return [self.combined.get(frozenset(some), some[0]) if some else NO_PROMPT for some in by_text]

    def has_same(self, name: str, earlier: Routes) -> bool:
        """Whether a name is still that of the prompt that had it in earlier routes: not gone, nor another's by now.

        Each prompt has a gate of its own, by which two of one name are told apart.
        """
        there = {NO_PROMPT, *self.gates, *self.combined.values()}
        return name in there and self.gates.get(name) is earlier.gates.get(name)

    def without(self, names: Collection[str]) -> Routes:
        """The routes of the other prompts; a combined prompt goes with any of its parts."""
        return Routes(
            {name: gate for name, gate in self.gates.items() if name not in names},
            [name for name in self.precedence if name not in names],
            {parts: name for parts, name in self.combined.items() if name not in names and not parts & set(names)},
        )
