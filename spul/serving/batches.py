"""The embedded engine: requests are gathered into batches, each row under the prompt that its gate turns on."""

from __future__ import annotations

import asyncio
import copy
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from ..models.causal_lm import max_positions
from ..prompts.arguments import generation_settings
from ..prompts.names import NO_PROMPT
from ..rivals.refusal import FixedRefusal
from .answers import Piece
from .engine import Job, choose_prompts, end_tokens, refused
from .errors import ApiError, prompts_changed, stopping, too_long, too_many
from .requests import Limits
from .sampling import RowChooser
from .served import ServedPrompts

logger = logging.getLogger(__name__)

T = TypeVar("T")


class _Row:
    """A job in the worker's hands; what it sends is read in the event loop that the job came from."""

    def __init__(self, job: Job, tokenizer: Any, ends: frozenset[int]) -> None:
        self.job, self.is_gone, self.is_done = job, False, False
        self.parts = job.parts(tokenizer, ends)
        self._loop, self._sent = asyncio.get_running_loop(), asyncio.Queue[Piece | ApiError]()

    def send(self, event: Piece | ApiError) -> None:
        with suppress(RuntimeError):  # the loop has closed, and nobody reads
            self._loop.call_soon_threadsafe(self._sent.put_nowait, event)

    async def received(self) -> Piece:
        event = await self._sent.get()
        if isinstance(event, ApiError):
            raise event
        return event

    def fail(self, error: ApiError) -> None:
        self.is_done = True
        self.send(error)

    def take(self, piece: Piece | None) -> None:
        """Send a part of the answer, if there is one."""
        self.is_done |= self.parts.is_done
        if piece is not None:
            self.send(piece)

    def push(self, token: int) -> None:
        """Take one more token, and send what can be sent."""
        self.take(self.parts.push(token))

    def end(self) -> None:
        """End an answer that generation has left."""
        if not self.is_done:
            self.take(self.parts.end())


class _Rows(StoppingCriteria):
    """Hands each new token to its row; a row stops where its answer ends, or nobody waits for it."""

    def __init__(self, rows: Sequence[_Row]) -> None:
        self.rows = rows

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        for row, token in zip(self.rows, input_ids[:, -1].tolist(), strict=True):
            row.is_done |= row.is_gone
            if not row.is_done:
                row.push(token)
        return torch.tensor([row.is_done for row in self.rows], device=input_ids.device)


class TransformersEngine:
    """Answers requests in this process: one thread takes what waits, asks the gates, and generates the batch.

    Prompts are changed by the same thread between two batches. So a request that is being answered keeps its prompt,
    and one that waits meets the prompts as they are when its turn comes.

    Args:
        served: the prompts.
        limits: of the server.

    Raises:
        ValueError: if the base's own generation settings do not go with a prompt.
    """

    name = "transformers"

    def __init__(self, served: ServedPrompts, limits: Limits) -> None:
        self.served, self.limits = served, limits
        base = served.gated.get_base_model()
        self.room = max_positions(base)
        self._tokenizer = copy.deepcopy(served.gated.tokenizer)  # fast tokenizers are for one thread at a time
        self._ends = end_tokens(base, self._tokenizer)
        self._settings = _settings(base, self._tokenizer, self._ends)
        generation_settings(base, {"generation_config": self._settings})
        self._waiting: deque[_Row] = deque()
        self._changes: deque[Callable[[], None]] = deque()
        self._stopping = False
        self._wake = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="spul-serving", daemon=True)

    # ---- in the event loop ----

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    async def stop(self) -> None:
        """Answer what waits, and end."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.ident is not None:
            await asyncio.to_thread(self._thread.join)

    @property
    def num_waiting(self) -> int:
        """Requests that wait."""
        return len(self._waiting)

    @property
    def is_alive(self) -> bool:
        """Whether requests are answered."""
        return self._thread.is_alive() and not self._stopping

    async def answer(self, job: Job) -> AsyncGenerator[Piece, None]:
        """The parts of an answer; closing the iterator ends the generation.

        Raises:
            ApiError: 429 if too many wait, 503 if the engine has stopped.
        """
        row = _Row(job, self._tokenizer, self._ends)
        with self._wake:
            if not self.is_alive:
                raise stopping()
            if len(self._waiting) >= self.limits.max_waiting:
                raise too_many()
            self._waiting.append(row)
            self._wake.notify()
        try:
            while True:
                piece = await row.received()
                yield piece
                if piece.finish_reason is not None:
                    return
        finally:
            row.is_gone = True
            with self._wake, suppress(ValueError):
                self._waiting.remove(row)

    async def change(self, function: Callable[[ServedPrompts], T]) -> T:
        """Call a function that changes the prompts, between two batches.

        Raises:
            ApiError: 503 if the engine has stopped.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def call() -> None:
            try:
                found = function(self.served)
            except Exception as error:
                loop.call_soon_threadsafe(_settle, future, future.set_exception, error)
            else:
                loop.call_soon_threadsafe(_settle, future, future.set_result, found)

        with self._wake:
            if not self.is_alive:
                raise stopping()
            self._changes.append(call)
            self._wake.notify()
        return await future

    # ---- in the worker's thread ----

    def _work(self) -> None:
        with self.served.gated.cached_prompts():
            while True:
                with self._wake:
                    while not (self._waiting or self._changes or self._stopping):
                        self._wake.wait()
                    if not (self._waiting or self._changes):
                        return
                if not self._changes and len(self._waiting) < self.limits.max_batch:
                    time.sleep(self.limits.gather_seconds)
                while self._changes:
                    self._changes.popleft()()
                if rows := self._taken():
                    self._answer(rows)

    def _taken(self) -> list[_Row]:
        """The next batch: the first row that waits, and those after it that have room beside it.

        A row goes on, unread, until the longest answer of its batch has ended, for which it needs positions.
        """
        rows: list[_Row] = []
        longest, most = 0, 0
        with self._wake:
            for row in list(self._waiting):
                if len(rows) == self.limits.max_batch:
                    break
                both = max(longest, len(row.job.token_ids)), max(most, row.job.max_tokens)
                if rows and self.room is not None and self.served.longest + sum(both) > self.room:
                    continue
                self._waiting.remove(row)
                rows.append(row)
                longest, most = both
        return [row for row in rows if not row.is_gone]

    def _answer(self, rows: list[_Row]) -> None:
        try:
            names = choose_prompts(self.served, [row.job for row in rows])
        except Exception as error:  # without a choice there is no answer
            for row in rows:
                self._failed(row, error)
            return
        chosen: dict[_Row, str] = {}
        for row, name in zip(rows, names, strict=True):
            if isinstance(name, ApiError):
                row.fail(name)
            elif name in self.served.refusals:
                self._refuse(row, self.served.refusals[name])
            else:
                chosen[row] = name
        if chosen:
            self._generate_or_part(list(chosen), list(chosen.values()))

    def _refuse(self, row: _Row, refusal: FixedRefusal) -> None:
        """Answer a row at once, without the model."""
        try:
            for piece in refused(refusal, row.parts, row.job):
                row.take(piece)
        except Exception as error:
            self._failed(row, error)

    def _generate_or_part(self, rows: list[_Row], names: list[str]) -> None:
        """Generate rows together, or each alone where that fails: one row must not decide for the others."""
        try:
            self._generate(rows, names)
        except Exception as error:
            for row in rows:
                if row.is_done:
                    continue
                if len(rows) == 1 or row.parts.num_tokens:
                    self._failed(row, error)
                else:
                    self._answer([row])  # whose prompt may be revoked by now

    def _failed(self, row: _Row, error: Exception) -> None:
        logger.error("A request failed: %s: %s", type(error).__name__, error)
        row.fail(error if isinstance(error, ApiError) else ApiError(500, "the request failed."))

    def _generate(self, rows: list[_Row], names: list[str]) -> None:
        """Generate rows, each under the prompt named; whatever does not go with one raises."""
        unlearner = self.served.gated.unlearner
        if not unlearner.enabled and set(names) != {NO_PROMPT}:
            raise RuntimeError("prompts are disabled, and the base would answer in their place.")
        width, most = max(len(row.job.token_ids) for row in rows), max(row.job.max_tokens for row in rows)
        if self.room is not None and self.served.longest + width + most > self.room:
            raise too_long(self.room - self.served.longest, width, most)
        pad = self._settings.pad_token_id
        pads = [width - len(row.job.token_ids) for row in rows]
        ids = torch.tensor([[pad] * num + row.job.token_ids for num, row in zip(pads, rows, strict=True)])
        mask = torch.tensor([[0] * num + [1] * (width - num) for num in pads])
        settings = copy.deepcopy(self._settings)
        settings.max_new_tokens = most
        positions = [row.job.prompt_position for row in rows]
        if self.served.stands_inside:
            if None in positions:
                raise prompts_changed()
            inside = {"prompt_position": torch.tensor(positions, device=unlearner.device)}
        else:
            inside = {}
        with _as_defaults(self.served.gated.get_base_model(), settings):
            unlearner.generate(
                ids.to(unlearner.device),
                attention_mask=mask.to(unlearner.device),
                adapter_names=names,
                generation_config=settings,
                logits_processor=LogitsProcessorList([RowChooser([row.job.sampling for row in rows])]),
                stopping_criteria=StoppingCriteriaList([_Rows(rows)]),
                **inside,
            )
        for row in rows:
            row.end()


def _settle(future: asyncio.Future, settle: Callable[[Any], None], value: Any) -> None:
    if not future.done():  # cancelled by a client that has gone
        settle(value)


@contextmanager
def _as_defaults(base: Any, settings: GenerationConfig) -> Iterator[None]:
    """Context manager: settings of the base itself do not stand in for those that are None."""
    before, base.generation_config = base.generation_config, settings
    try:
        yield
    finally:
        base.generation_config = before


def _settings(base: Any, tokenizer: Any, ends: frozenset[int]) -> GenerationConfig:
    """The base's generation settings, greedy: `RowChooser` draws, and `_Rows` stops, also at the base's own texts.

    What ends or forces an answer by the clock, or by the length of its whole batch, is not of a row.
    """
    found = copy.deepcopy(base.generation_config)
    found.eos_token_id = sorted(ends)
    pads = (found.pad_token_id, tokenizer.pad_token_id, *found.eos_token_id, 0)
    found.pad_token_id = next(one for one in pads if one is not None)
    found.update(do_sample=False, num_beams=1, num_return_sequences=1, return_dict_in_generate=False, max_length=None)
    found.update(temperature=1.0, top_p=1.0, top_k=50, typical_p=1.0, epsilon_cutoff=0.0, eta_cutoff=0.0, min_p=None)
    found.update(stop_strings=None, max_time=None, forced_bos_token_id=None, forced_eos_token_id=None)
    found.update(is_assistant=False)
    return found
