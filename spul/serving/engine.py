"""The interface of engines, which answer requests, and the jobs that they take."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from ..gates.routes import Routes
from ..prompts.names import NO_PROMPT
from ..rivals.refusal import FixedRefusal
from .answers import AnswerParts, Piece
from .errors import ApiError, prompts_changed
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
        routes: of the prompts as they were when the request came; None for those as they are when its turn comes.
    """

    token_ids: list[int]
    sampling: Sampling
    max_tokens: int
    prompt_position: int | None = None
    routes: Routes | None = None
    prompt: dict[str, Any] | None = field(default=None, init=False)
    """Its prompt's entry in `ServedPrompts.served`; empty for the base, None before routing."""

    def parts(self, tokenizer: Any, ends: Collection[int]) -> AnswerParts:
        """The parts of its answer, to which tokens are given.

        Args:
            tokenizer: the model's.
            ends: tokens that end an answer.
        """
        return AnswerParts(tokenizer, self.token_ids, self.sampling.stop, self.max_tokens, ends)


def choose_prompts(served: ServedPrompts, jobs: Sequence[Job]) -> list[str | ApiError]:
    """The name of each job's prompt, as the gates say now, `"__base__"` for none.

    In its place stands the error of a job that is refused: it waited, and the prompt that it had is revoked. No prompt
    drops out in silence.

    Raises:
        ApiError: if it is not known which prompts are revoked.
    """
    names = served.choose([job.token_ids for job in jobs], [job.routes for job in jobs])
    for job, name in zip(jobs, names, strict=True):
        job.prompt = None if name is None else {} if name == NO_PROMPT else served.served[name]
    return [prompts_changed() if name is None else name for name in names]


def refused(refusal: FixedRefusal, parts: AnswerParts, job: Job) -> Iterator[Piece]:
    """The parts of a job's answer that is a fixed refusal; the model is not asked.

    Args:
        refusal: the one whose gate flags the job.
        parts: of the answer, as yet without a token.
        job: the request.
    """
    for token in refusal.refusal_ids(job.token_ids):
        if not parts.is_done and (piece := parts.push(token)) is not None:
            yield piece
    if (piece := parts.end()) is not None:  # its tokenizer may have another end token than the one that is served
        yield piece


def end_tokens(base: Any, tokenizer: Any) -> frozenset[int]:
    """The tokens that end an answer: those of the base's settings, and the tokenizer's.

    Args:
        base: the model.
        tokenizer: its tokenizer.
    """
    found = base.generation_config.eos_token_id
    of_base = found if isinstance(found, list) else [found]
    return frozenset(one for one in (*of_base, tokenizer.eos_token_id) if one is not None)


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
