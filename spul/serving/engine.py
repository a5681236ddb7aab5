"""The interface of engines, which answer requests, and the jobs that they take."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from .answers import Piece
from .requests import Sampling
from .served import ServedPrompts

T = TypeVar("T")


@dataclass(eq=False)
class Job:
    """A request on its way to an answer.

    Args:
        token_ids: of the request, without virtual tokens.
        sampling: how tokens are chosen.
        max_tokens: of the answer.
        prompt_position: tokens before a prompt at the message; None where none stands there.
    """

    token_ids: list[int]
    sampling: Sampling
    max_tokens: int
    prompt_position: int | None = None
    prompt: dict[str, Any] | None = field(default=None, init=False)
    """Its prompt's entry in `ServedPrompts.served`; empty for the base, None before routing."""


class Engine(Protocol):
    """Answers requests, under the prompts that their gates turn on."""

    name: str
    served: ServedPrompts

    def start(self) -> None:
        """Begin to answer."""

    async def stop(self) -> None:
        """Answer what waits, and end."""

    def answer(self, job: Job) -> AsyncGenerator[Piece, None]:
        """The parts of an answer; closing the iterator ends the generation.

        Raises:
            ApiError: if it is refused or fails.
        """

    async def change(self, function: Callable[[ServedPrompts], T]) -> T:
        """Call a function that changes the prompts, while no request is between its gate and its prompt."""

    @property
    def num_waiting(self) -> int:
        """Requests that wait."""

    @property
    def is_alive(self) -> bool:
        """Whether requests are answered."""
