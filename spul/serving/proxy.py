"""The engine in front of a running vLLM: requests are sent on, with the embeddings of the prompt that they get."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

import torch

from ..gates.gated import GatedUnlearner
from ..models.compat_devices import device_of
from ..prompts.names import NO_PROMPT
from ..prompts.row_prompts import under
from ..records.fields import is_count
from .answers import Piece
from .engine import Job, choose_prompts, end_tokens, refused
from .errors import ApiError, prompts_changed, stopping, too_many
from .requests import Limits, check_header_text
from .served import ServedPrompts
from .vllm_client import encoded

logger = logging.getLogger(__name__)

T = TypeVar("T")
CONNECT_SECONDS = 10.0
MOST_SAID, LONGEST_LINE = 500, 1 << 20  # bytes of an error that are read, and of a line of a stream


class Payload(Protocol):
    """Fields of a completion that put a prompt's embeddings to a request's tokens."""

    def __call__(self, token_ids: Sequence[int], prompt: str, position: int) -> dict[str, Any]:
        """The fields, as JSON.

        Args:
            token_ids: of the request.
            prompt: name of the prompt.
            position: number of the request's tokens that stand before the prompt.
        """


class EmbeddingPayload:
    """`prompt_embeds` of a completion: prompt and tokens as embeddings (p + n, d), a saved tensor in base64.

    Args:
        gated: the prompts, on the base whose embeddings are sent.
    """

    def __init__(self, gated: GatedUnlearner) -> None:
        self.gated = gated

    @torch.no_grad()
    def __call__(self, token_ids: Sequence[int], prompt: str, position: int) -> dict[str, Any]:
        """The field `prompt_embeds`."""
        base = self.gated.get_base_model()
        embeds = base.get_input_embeddings()(torch.tensor(token_ids, device=device_of(base)))
        virtual = under(self.gated.unlearner, prompt).get_prompt(batch_size=1)[0].to(embeds)
        return {"prompt_embeds": encoded(torch.cat([embeds[:position], virtual, embeds[position:]]).cpu())}


class VllmEngine:
    """Sends requests to a vLLM server (`vllm serve MODEL --enable-prompt-embeds`), and its answers back.

    Gates are asked here, and prompts changed here, by one thread: a request whose payload is made keeps its prompt.

    Args:
        served: the prompts; the base is here for its embeddings and gates.
        limits: of the server; at most `max_batch + max_waiting` requests are with vLLM at a time.
        url: of vLLM, such as `http://127.0.0.1:8000`.
        model: the model's name there.
        api_key: vLLM's, if it has one.
        payload: makes the fields of a prompt's embeddings; `EmbeddingPayload` unless given.

    Raises:
        ValueError: if a prompt is a prefix, whose keys and values vLLM does not take, or `url` is no address.
    """

    name = "vllm"

    def __init__(
        self,
        served: ServedPrompts,
        limits: Limits,
        url: str,
        model: str,
        api_key: str | None = None,
        payload: Payload | None = None,
    ) -> None:
        check_address(url)
        if api_key is not None:
            check_header_text(api_key, "vLLM's key")
        served.take_embeddings_only()
        self.served, self.limits, self.model = served, limits, model
        self.url = f"{url.rstrip('/')}/v1/completions"
        self.headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self.payload: Payload = EmbeddingPayload(served.gated) if payload is None else payload
        self._routing = ThreadPoolExecutor(1, "spul-routing")
        self._num, self._idle = 0, asyncio.Event()
        self._client: Any = None

    def start(self) -> None:
        """Open the connections."""
        import httpx

        timeout, unlimited = httpx.Timeout(None, connect=CONNECT_SECONDS), httpx.Limits(max_connections=None)
        self._client = httpx.AsyncClient(timeout=timeout, limits=unlimited, trust_env=False)  # `answer` counts them

    async def stop(self) -> None:
        """Wait for the answers that are under way, and close the connections."""
        client, self._client = self._client, None
        while self._num:
            self._idle.clear()
            await self._idle.wait()
        if client is not None:
            await client.aclose()
        self._routing.shutdown()

    @property
    def num_waiting(self) -> int:
        """Requests that are with vLLM."""
        return self._num

    @property
    def is_alive(self) -> bool:
        """Whether requests are sent on."""
        return self._client is not None

    async def change(self, function: Callable[[ServedPrompts], T]) -> T:
        """Call a function that changes the prompts."""
        return await self._in_thread(lambda: function(self.served))

    async def answer(self, job: Job) -> AsyncGenerator[Piece, None]:
        """The parts of an answer; closing the iterator closes the connection, at which vLLM stops.

        Raises:
            ApiError: 429 if too many requests are under way, 502 if vLLM refuses or fails, 503 if it is not there.
        """
        client = self._client
        if client is None:
            raise stopping()
        if self._num >= self.limits.max_batch + self.limits.max_waiting:
            raise too_many()
        import httpx

        self._num += 1
        try:
            body = await self._in_thread(lambda: self._body(job))
            if isinstance(body, list):
                for piece in body:
                    yield piece
                return
            async with client.stream("POST", self.url, json=body, headers=self.headers) as response:
                await _check(response)
                async for piece in _pieces(response):
                    yield piece
        except httpx.HTTPError as error:
            logger.error("vLLM: %s: %s", type(error).__name__, error)
            raise ApiError(503, "the model's server does not answer.") from error
        finally:
            self._num -= 1
            self._idle.set()

    def _body(self, job: Job) -> dict[str, Any] | list[Piece]:
        """Ask the gates, choose the prompt, and make the payload; of a fixed refusal the parts of the answer."""
        [name] = choose_prompts(self.served, [job])
        if isinstance(name, ApiError):
            raise name
        if (refusal := self.served.refusals.get(name)) is not None:
            tokenizer = self.served.gated.tokenizer
            ends = end_tokens(self.served.gated.get_base_model(), tokenizer)
            return list(refused(refusal, job.parts(tokenizer, ends), job))
        sampling = job.sampling
        fields: dict[str, Any] = {"prompt": job.token_ids}
        if name != NO_PROMPT:
            inside = self.served.gated.unlearner.spul_configs[name].prompt_position == "message"
            if inside and job.prompt_position is None:
                raise prompts_changed()
            fields = self.payload(job.token_ids, name, job.prompt_position or 0 if inside else 0)
        return {
            "model": self.model,
            "max_tokens": job.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            **({} if sampling.seed is None else {"seed": sampling.seed}),
            **({"stop": list(sampling.stop)} if sampling.stop else {}),
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
            **fields,
        }

    async def _in_thread(self, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._routing, function)


def check_address(url: str, argument: str = "url") -> None:
    """Raise unless a path of vLLM's can be added to an address.

    Args:
        url: the address.
        argument: the argument's name, for the message.

    Raises:
        ValueError: if none can.
    """
    try:
        parts = urlsplit(url)
        is_whole = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number
        is_whole = False
    if not is_whole or parts.query or parts.fragment or parts.path.rstrip("/").endswith("/v1"):
        raise ValueError(f"{argument}={url!r}; expected vLLM's address without /v1, such as http://127.0.0.1:8000.")


async def _check(response: Any) -> None:
    if response.status_code == 200:
        return
    said = b""
    async for part in response.aiter_bytes():
        said += part
        if len(said) >= MOST_SAID:
            break
    logger.error("vLLM answered %d: %r", response.status_code, said[:MOST_SAID])
    if response.status_code in (429, 503):
        raise ApiError(response.status_code, "the model's server is busy; try later.")
    raise ApiError(502, "the model's server refused the request.")


async def _pieces(response: Any) -> AsyncGenerator[Piece, None]:
    """The parts of a stream of vLLM; the last waits for the number of all tokens, which vLLM sends after it."""
    reason, num, last = None, None, ""
    async for line in _lines(response):
        if not line.startswith(b"data:"):
            continue
        data = line[len(b"data:") :].strip()
        if data == b"[DONE]":
            break
        try:
            chunk = json.loads(data)
            num = _count(chunk["usage"]["completion_tokens"]) if chunk.get("usage") else num
            texts = []
            for choice in chunk["choices"]:
                reason = choice["finish_reason"] or reason
                text = "" + (choice["text"] or "")
                text.encode()  # half of a surrogate pair, which JSON may escape, is no character
                if reason:
                    last += text
                else:
                    texts.append(text)
        except Exception as error:  # whatever it sent
            logger.error("vLLM sent %r", data[:500])
            raise ApiError(502, "the model's server failed.") from error
        for text in filter(None, texts):
            yield Piece(text, num or 0)
    if reason not in ("stop", "length") or num is None:
        raise ApiError(502, "the model's server ended too early.")
    yield Piece(last, num, reason)


def _count(value: Any) -> int:
    if not is_count(value):
        raise ValueError(f"{value!r} is no number of tokens.")
    return int(value)


async def _lines(response: Any) -> AsyncGenerator[bytes, None]:
    """Lines of a body. Only a line feed ends one: httpx's also end at characters that answers may have, as U+2028."""
    rest = b""
    async for part in response.aiter_bytes():
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            yield line
        if len(rest) > LONGEST_LINE:
            logger.error("vLLM sent a line of more than %d bytes", LONGEST_LINE)
            raise ApiError(502, "the model's server failed.")
    yield rest
