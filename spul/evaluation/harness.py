"""spul as a model of EleutherAI's lm-evaluation-harness: `--model spul`.

Requests are tokenized, padded and scored as everywhere in spul, so that log-likelihoods are those of
`score_completions`, whatever the batch. `SpulLM` is the class that the harness looks up by the entry point; it is made
when it is asked for, since the harness is an optional library.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from datasets import Dataset
from tqdm.auto import tqdm

from ..data.batching import by_length
from ..data.encoded import Encoded
from ..data.encoder import RowEncoder
from ..models.causal_lm import bare_model, max_positions
from ..models.compat import PartialState
from ..models.compat_devices import device_of
from ..models.loading import load_causal_lm, load_tokenizer
from ..models.unlearner import unlearner_of
from .loading import load_unlearned
from .metrics.free_form import answering
from .metrics.likelihood import check_has_likelihoods, response_likelihoods

NAME = "spul"
TARGET = f"{__name__}:SpulLM"
# Tokens of a row where the model has no limit of its own.
USUAL_LENGTH = 2048
# Settings of a request's generation that are the harness's, or come under other names; all others go to `generate`.
NOT_PASSED_ON = ("until", "max_gen_toks", "max_new_tokens", "max_length", "temperature", "do_sample")


class Requests:
    """Answers to the harness's requests by an unlearned model, or by a base; `SpulLM` adds the harness's own class.

    Args:
        pretrained: the base, or a whole model, by name or folder; or a causal LM or unlearner in memory.
        adapter: folder or Hub name of a prompt, prompts behind gates, unlearning layers or LoRA; None for none.
        tokenizer: an object, or its name or folder; the base's unless given.
        dtype: type of the base's weights, `"auto"` (default), `"float32"`, `"bfloat16"` or `"float16"`.
        bits: 8 or 4 to quantize the base.
        batch_size: requests of a forward pass.
        max_length: most tokens of a request and its answer, without virtual tokens; as many as the model has positions
            beside these unless given.
        max_gen_toks: most tokens of a generated answer, unless the task says.
        trust_remote_code: whether code in the model's repository may run.
        device: the device of the process is taken, whichever is named here: the harness always names one.
        max_batch_size: not read: batches have `batch_size` rows.

    Raises:
        ValueError: if there are several processes, `batch_size` is no number, `max_length` has no room in the model,
            or the prompt stands at `"message"`: the harness gives text, which does not say where that is.
        TypeError: if a model in memory comes without its tokenizer.
    """

    def __init__(
        self,
        pretrained: Any,
        adapter: str | None = None,
        tokenizer: Any = None,
        dtype: Any = "auto",
        bits: int | None = None,
        batch_size: int | str = 1,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        trust_remote_code: bool = False,
        device: str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        if PartialState().num_processes > 1:
            raise ValueError("the model runs in one process; start the harness without accelerate launch.")
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ValueError(f"batch_size={batch_size!r}; expected a whole number of at least 1.")
        self.batch_size, self.max_gen_toks = int(batch_size), int(max_gen_toks)
        if not isinstance(pretrained, str):
            if adapter is not None or tokenizer is None or isinstance(tokenizer, str):
                raise TypeError(
                    "a model in memory comes with its tokenizer, an object, and without an adapter's name."
                )
            self.model, self.tokenizer, self._name = pretrained, tokenizer, type(pretrained).__name__
        else:

            def load(name: Any) -> Any:
                return load_causal_lm(name, dtype, bits, trust_remote_code=trust_remote_code)

            self._name = str(tokenizer or pretrained)
            if adapter is not None:
                self.model, self.tokenizer, _ = load_unlearned(adapter, pretrained, tokenizer, load, trust_remote_code)
            else:
                self.tokenizer = load_tokenizer(self._name, trust_remote_code)
                self.model = load(pretrained)
        unlearner = unlearner_of(self.model)
        check_has_likelihoods(self.model)
        if getattr(unlearner.spul_config, "prompt_position", "start") != "start":
            raise ValueError(
                'the prompt stands inside the rows (prompt_position="message"), and the harness gives texts, which do '
                "not say where: score it by spul evaluate or score_completions, on rows."
            )
        limit = max_positions(bare_model(self.model))
        room = None if limit is None else limit - unlearner.longest_prompt
        self.max_length = int(max_length or room or USUAL_LENGTH)
        if room is not None and self.max_length > room:
            raise ValueError(f"max_length={max_length}; beside its virtual tokens the model has {room} positions.")
        self.encoder = RowEncoder(self.tokenizer, self.max_length)
        self._whole = self.encoder.with_max_length(10**9)  # rows are cut when they are batched

    # ---- what the harness asks of a model ----

    @property
    def eot_token_id(self) -> int:
        """The end-of-sequence token."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that is scored as a whole."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def device(self) -> Any:
        """The model's device."""
        return device_of(self.model)

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer, by which the harness caches requests."""
        return self._name.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids of a text, with what the tokenizer puts around one unless told otherwise."""
        own = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer(string, **own)["input_ids"])

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Messages as text, by the tokenizer's chat template."""
        own = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        return str(self.tokenizer.apply_chat_template(chat_history, tokenize=False, **own))

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Token ids of a request as in training: the continuation after its context, white space where it stands."""
        prompt = self._whole.prompts([{"prompt": context}])["input_ids"][0].tolist()
        return prompt, self._whole.completion_ids(continuation)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
        are_texts: bool = False,
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether greedy decoding gives it; contexts lose their start.

        With `are_texts` contexts are no requests, but parts of running texts; an empty context never is a request.
        """
        if not requests:
            return []
        rows = Dataset.from_list(
            [
                {
                    "input_ids": [*context, *own],
                    "completion_mask": [0] * len(context) + [1] * len(own),
                    "is_running_text": are_texts or context == [self.prefix_token_id],
                }
                for _, context, own in requests
            ]
        )
        progress = None if disable_tqdm else "log-likelihoods"
        found = response_likelihoods(self.model, rows, self.encoder, override_bs or self.batch_size, progress)
        scores = [(float(one.log_probs.sum(dtype="float64")), bool(one.is_greedy.all())) for one in found]
        for (request, _, _), score in zip(requests, scores, strict=True):
            if request is not None:
                self._remember("loglikelihood", request, score)
        return scores

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each text as a whole, in windows of the model's length, each token predicted once."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        found = []
        for request in requests:
            (text,) = request.args
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text, add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length - 1,  # what is predicted last is in the row, too
                context_len=1,
            )
            parts = [(None, *make_disjoint_window(window)) for window in windows]
            found.append(sum(score for score, _ in self._loglikelihood_tokens(parts, True, are_texts=True)))
            self._remember("loglikelihood_rolling", (text,), found[-1])
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """An answer to each request, cut before the first of its stop texts.

        Rows are generated to their end and then cut, so that what is beside a row in its batch does not matter.
        """
        answers = [""] * len(requests)
        given = [request.args for request in requests]
        settings = [_generation(options, self.max_gen_toks) for _, options in given]
        bar = tqdm(total=len(given), desc="answers", disable=disable_tqdm)
        with answering(self.model, self.tokenizer) as answers_to:
            for num_new, stops, options in dict.fromkeys(settings):
                if num_new >= self.max_length:
                    raise ValueError(
                        f"max_gen_toks={num_new} leaves no room for a request in the {self.max_length} tokens that "
                        "the model has beside its virtual ones; ask for fewer (--gen_kwargs max_gen_toks=...)."
                    )
                same = [i for i, one in enumerate(settings) if one == (num_new, stops, options)]
                prompts = [self._prompt(given[i][0], num_new) for i in same]
                for batch in by_length([len(one.prompt_ids) for one in prompts], self.batch_size):
                    some = [prompts[k] for k in batch]
                    texts = answers_to(some, num_new, None, **dict(options))
                    for k, text in zip(batch, texts, strict=True):
                        answers[same[k]] = _before(text, stops)
                        self._remember("generate_until", given[same[k]], answers[same[k]])
                    bar.update(len(batch))
        bar.close()
        return answers

    def _prompt(self, context: str, num_new: int) -> Encoded:
        """A request that leaves room for an answer."""
        ids = self.encoder.prompts([{"prompt": context or self.tokenizer.decode([self.prefix_token_id])}], num_new)
        return Encoded(ids["input_ids"][0].tolist(), [])

    def _remember(self, kind: str, request: Any, answer: Any) -> None:
        """Tell the harness's cache of an answer, if there is one."""
        if (hook := getattr(self, "cache_hook", None)) is not None:
            hook.add_partial(kind, request, answer)


def _generation(options: dict[str, Any], usual: int) -> tuple[int, tuple[str, ...], tuple[tuple[str, Any], ...]]:
    """Most new tokens, stop texts, and settings of `generate`, of a request's settings."""
    stops = options.get("until") or ()
    stops = (stops,) if isinstance(stops, str) else tuple(stops)
    named = (options.get(name) for name in ("max_gen_toks", "max_new_tokens"))
    num_new = int(next((number for number in named if number is not None), usual))
    temperature = float(options.get("temperature") or 0.0)
    sampled = bool(options.get("do_sample", temperature > 0))
    own = {name: value for name, value in options.items() if name not in NOT_PASSED_ON}
    own |= {"do_sample": True, "temperature": temperature or 1.0} if sampled else {"do_sample": False}
    return num_new, tuple(stop for stop in stops if stop), tuple(sorted(own.items()))


def _before(text: str, stops: Sequence[str]) -> str:
    """A text up to the first of the stop texts."""
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]


@cache
def harness_class() -> type:
    """`SpulLM`, the harness's class of models that are scored by token ids, answered by `Requests`.

    Raises:
        ImportError: if lm-evaluation-harness is not installed.
    """
    try:
        from lm_eval.api.model import TemplateLM
    except ImportError as error:
        raise ImportError("lm-evaluation-harness is not installed: pip install lm_eval") from error
    return type("SpulLM", (Requests, TemplateLM), {"__module__": __name__, "__doc__": Requests.__doc__})


def register() -> None:
    """Make `--model spul` known to a harness that does not read entry points (0.4.13 and before).

    Raises:
        ImportError: if lm-evaluation-harness is not installed.
    """
    harness_class()
    from lm_eval.api.registry import model_registry

    if NAME not in model_registry:
        model_registry.register(NAME, target=TARGET)


def __getattr__(name: str) -> Any:
    if name == "SpulLM":
        return harness_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
