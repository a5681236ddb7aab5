"""GatedUnlearner: prompts that are on for the requests that their gates flag, and for no others."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.checks import checked_strings
from ..losses.positions import ends_before_labels, ends_before_responses, own_tokens
from ..models.protocol import Unlearner
from ..prompts.arguments import check_rows
from ..prompts.names import check_has_adapter
from ..prompts.position import check_any_row
from ..prompts.unlearner import SoftPromptUnlearner
from .gate import Gate, as_gate, request_texts
from .gated_files import check_saved_together, gate_of, read_gated, write_gated
from .routes import Routes

AnyKindOfGate = Gate | Callable[[list[str]], Any]
_routing = threading.RLock()  # routes are changed and read as a whole; no attribute, since a lock is not copied


class GatedUnlearner(nn.Module, Unlearner):
    """Prompts on one frozen base, each on only for the requests that its gate flags.

    `forward`, `generate`, scoring and `evaluate` read each request's text from its token ids, ask the gates, and run
    the row under the prompt of the gate that flags it, or under none. A gate that fails attaches its prompt.

    Args:
        unlearner: the prompts.
        tokenizer: its tokenizer, by which requests are read.
        gates: for each prompt its gate, or a function from a list of texts to a bool for each.
        precedence: names of the prompts, the first first: a row that several gates flag gets the first. The order of
            `gates` unless given.
        combined: for sets of names the one prompt for all of them, such as a distilled one (`combine`): a row that
            just these gates flag gets it.

    Raises:
        TypeError: if `unlearner` is no `SoftPromptUnlearner`, or a gate is neither a gate nor a function.
        ValueError: if a gate is for a prompt that there is not, a prompt has no gate and would never be on, or
            `precedence` or `combined` name others.

    Example:
        ```python
        gated = GatedUnlearner(unlearner, tokenizer, {"default": TextGate.fit(forget_texts, retain_texts)})
        out = gated.generate(**tokenizer(requests, return_tensors="pt", padding=True))
        ```
    """

    follows_embeddings = False
    reads_tokens = True
    takes_prompt_position = True
    hides_pads = True
    is_gated = True
    in_words = "the prompt behind its gate"

    def __init__(
        self,
        unlearner: SoftPromptUnlearner,
        tokenizer: PreTrainedTokenizerBase,
        gates: Mapping[str, AnyKindOfGate],
        precedence: Sequence[str] | None = None,
        combined: Mapping[tuple[str, ...], str] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(unlearner, SoftPromptUnlearner):
            raise TypeError(f"unlearner is a {type(unlearner).__name__}; expected a SoftPromptUnlearner.")
        if not isinstance(gates, Mapping):
            raise TypeError(f"gates is a {type(gates).__name__}; expected a dict from prompts' names to gates.")
        self.unlearner, self.tokenizer = unlearner, tokenizer
        self.gates = {name: as_gate(gate) for name, gate in gates.items()}
        self.precedence = list(self.gates if precedence is None else precedence)
        self.combined = {frozenset(names): name for names, name in (combined or {}).items()}
        Routes(self.gates, self.precedence, self.combined).check(unlearner.peft_config)

    def extra_repr(self) -> str:
        """The gates by their prompts' names, first first, and which sets of them have a prompt of their own."""
        lines = [f"{name}: {self.gates[name]!r}" for name in self.precedence]
        lines += [f"{name}: where just {', '.join(sorted(names))} flag" for names, name in self.combined.items()]
        return "\n".join(lines)

    # ---- routing ----

    def route(self, texts: Sequence[str]) -> list[str]:
        """The name of the prompt that each text gets, `"__base__"` for none.

        Args:
            texts: requests, whole.

        Raises:
            TypeError: if they are not strings.
            ValueError: if prompts were added or deleted since, and gates are not the prompts' any more.
        """
        return self.routes.names(checked_strings(texts))

    @property
    def routes(self) -> Routes:
        """The routes of all prompts as they are now.

        Raises:
            ValueError: if prompts were added or deleted since, and gates are not the prompts' any more.
        """
        with _routing:
            routes = Routes(dict(self.gates), list(self.precedence), dict(self.combined))
            routes.check(self.unlearner.peft_config)
            return routes

    def names_of(self, prompts: Sequence[Sequence[int]]) -> list[str]:
        """`route` of requests as token ids."""
        return self.route(request_texts(self.tokenizer, prompts))

    def _names_of_rows(self, rows: Sequence[list[int]], ends: Sequence[int]) -> list[str]:
        """`names_of` rows without pads; a row's request is its first `end` tokens, all of them for an end of 0."""
        return self.names_of([row[:end] if end else row for row, end in zip(rows, ends, strict=True)])

    # ---- prompts that come and go ----

    def load_adapter(
        self, model_id: str | os.PathLike, adapter_name: str, gate: AnyKindOfGate | None = None, **hub: Any
    ) -> None:
        """Load a prompt and its gate; requests that it flags get the prompt from now on. On an error nothing changes.

        Args:
            model_id: folder or Hub name of the prompt.
            adapter_name: its name in this model; the last in `precedence`.
            gate: its gate; the one in `gate/` of the folder unless given.
            hub: Hub arguments, such as `revision`, `token`, `subfolder`.

        Raises:
            ValueError: if there is a prompt of that name, a file is damaged or does not fit the base, or prompt and
                gate of a local folder are not those that were saved together.
            FileNotFoundError: if the folder has no gate, and none is given.
        """
        self._check_free(adapter_name)
        if gate is None:
            found = gate_of(model_id, self.unlearner, self.tokenizer, **hub)
            if (folder := Path(model_id, hub.get("subfolder") or "")).is_dir():
                check_saved_together(folder)
        else:
            found = as_gate(gate)
        with _routing:
            self._check_free(adapter_name)  # by now another thread may have taken it
            self.unlearner.load_adapter(model_id, adapter_name, **hub)
            self.gates, self.precedence = {**self.gates, adapter_name: found}, [*self.precedence, adapter_name]

    def _check_free(self, adapter_name: str) -> None:
        if adapter_name in self.unlearner.peft_config:
            raise ValueError(f"there is a prompt {adapter_name!r}; delete it first, or take another name.")

    def delete_adapter(self, adapter_name: str) -> None:
        """Revoke a prompt: remove it with its gate and its routes. Without any prompt, every request gets the base.

        Args:
            adapter_name: name of the prompt. A combined prompt of which it is a part goes too, since it would still
                forget for it.

        Raises:
            TypeError: if its name is no text.
            ValueError: if there is no prompt of that name.
        """
        with _routing:
            check_has_adapter(self.unlearner, adapter_name)
            parts = {name for names, name in self.combined.items() if adapter_name in names and name not in self.gates}
            gone = {adapter_name, *parts}
            left = Routes(self.gates, self.precedence, self.combined).without(gone)
            self.gates, self.precedence, self.combined = dict(left.gates), list(left.precedence), dict(left.combined)
            for name in gone:
                self.unlearner.delete_adapter(name)

    # ---- forward ----

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """A forward of the base in which each row has the prompt that its gate turns on, or none.

        Args:
            input_ids: (B, n), padded on either side.
            attention_mask: (B, n); all ones unless given.
            labels: (B, n), the response's token ids, -100 elsewhere. A row's request is then what stands before its
                first label.
            kwargs: as in `SoftPromptUnlearner.forward`, without `adapter_names`: the gates give them.

        Returns:
            The base's output; logits (B, n, V) at the rows' own tokens.

        Raises:
            ValueError: for arguments that do not go with a prompt.
            TypeError: for `is_forget` and `adapter_names`, which `unlearner` takes, without gates.
        """
        if kwargs.get("is_forget") is not None:
            raise TypeError("forward through gates takes no is_forget; train the prompts first: gated.unlearner.")
        ids = self._checked_ids("forward", input_ids, attention_mask, kwargs)
        mask = torch.ones_like(ids) if attention_mask is None else attention_mask
        ends = [0] * len(ids) if labels is None else ends_before_labels(labels, mask)
        kwargs["adapter_names"] = self._names_of_rows(own_tokens(ids, mask), ends)
        return self.unlearner(input_ids=input_ids, attention_mask=attention_mask, labels=labels, **kwargs)

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """Generate, each row under the prompt that its gate turns on, or under none.

        Args:
            inputs: (B, n) token ids, also as `input_ids`; each row is one request.
            args: as in `generate` of transformers.
            kwargs: the same, without `adapter_names`: the gates give them.

        Raises:
            ValueError: for arguments that do not go with a prompt, also where no gate flags a row.
            TypeError: for `adapter_names`, which `unlearner` takes, without gates.
        """
        given, mask = kwargs.pop("input_ids", None) if inputs is None else inputs, kwargs.get("attention_mask")
        ids = self._checked_ids("generate", given, mask, kwargs)
        kwargs["adapter_names"] = self.names_of(ids.tolist() if mask is None else own_tokens(ids, mask))
        kwargs.setdefault("tokenizer", self.tokenizer)  # by which stop texts are found, also those of the base
        return self.unlearner.generate(ids, *args, **kwargs)

    def _checked_ids(
        self, call: str, input_ids: Tensor | None, attention_mask: Tensor | None, kwargs: dict[str, Any]
    ) -> Tensor:
        """The token ids of a call, checked before gates read them; prompts that it names would go around the gates."""
        if kwargs.pop("adapter_names", None) is not None:
            raise TypeError("adapter_names would go around the gates; leave it out, or use gated.unlearner.")
        if input_ids is None:
            raise ValueError(f"{call} through gates needs input_ids, which the gates read.")
        check_rows(input_ids, attention_mask)
        check_any_row(self.unlearner, kwargs.get("prompt_position"))
        return input_ids

    def response_logits(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        positions: Tensor,
        prompt_position: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, K, V) at `positions` (B, K) of a right-padded batch, each row under the prompt of its request.

        A row's request ends at the first of its positions; a text without a request, whose first token has one of the
        `labels` (B, n), is one as a whole.
        """
        check_any_row(self.unlearner, prompt_position)
        names = self._names_of_rows(own_tokens(input_ids, attention_mask), ends_before_responses(positions, labels))
        return self.unlearner.response_logits(input_ids, attention_mask, positions, names, prompt_position)

    def base_logits(self, input_ids: Tensor, attention_mask: Tensor, positions: Tensor) -> Tensor:
        """Logits (B, K, V) of the base, without a prompt."""
        return self.unlearner.base_logits(input_ids, attention_mask, positions)

    def embedding_logits(self, inputs_embeds: Tensor, attention_mask: Tensor, positions: Tensor) -> Tensor:
        """Refused: a gate reads text, which embeddings are not.

        Raises:
            TypeError: always.
        """
        raise TypeError("gates read text, and input embeddings are none; pass input_ids, or use gated.unlearner.")

    def __getattr__(self, name: str) -> Any:
        """Attributes of the unlearner, such as `config` and `device`."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "unlearner":
                raise
            return getattr(self.unlearner, name)

    # ---- the protocol of an unlearner ----

    def get_base_model(self) -> Any:
        """The causal LM under the prompts."""
        return self.unlearner.get_base_model()

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Context manager: the model is the base, whatever the gates flag; for the calling thread or task alone."""
        with self.unlearner.disable_adapter():
            yield

    @contextmanager
    def cached_prompts(self) -> Iterator[None]:
        """Context manager: the prompts pass through the base once for all calls inside."""
        with self.unlearner.cached_prompts():
            yield

    @property
    def enabled(self) -> bool:
        """Whether the prompts are on for what the gates flag, in this thread."""
        return self.unlearner.enabled

    @property
    def virtual_tokens_in_use(self) -> int:
        """Virtual tokens of the longest prompt, which any row may get."""
        return self.unlearner.longest_prompt

    @property
    def spul_config(self) -> Any:
        """The record of the active prompt."""
        return self.unlearner.spul_config

    def check_trainable(self) -> None:
        """Refused: prompts are trained without gates.

        Raises:
            TypeError: always.
        """
        raise TypeError(
            "model is a GatedUnlearner; train its prompts first, by UnlearningTrainer(model=gated.unlearner)."
        )

    def adapter_parameters(self) -> list[nn.Parameter]:
        """The parameters of the prompts."""
        return self.unlearner.adapter_parameters()

    def adapter_settings(self) -> dict[str, dict[str, Any]]:
        """The configs of the prompts, and what each gate is, by name; empty where they are disabled."""
        if not self.enabled:
            return {}
        found = {name: self.unlearner.prompt_settings(name) for name in self.unlearner.peft_config}
        routing = {"precedence": self.precedence, "combined": sorted((sorted(s), n) for s, n in self.combined.items())}
        gates = {
            f"gate of {name}": {"peft_type": f"{gate.kind} gate", "gate": gate.identity(), **routing}
            for name, gate in self.gates.items()
        }
        return found | gates

    def on_base(self, base: PreTrainedModel, folder: Path) -> GatedUnlearner:
        """All prompts on another base, for inference, behind the same gates."""
        moved = self.unlearner.on_base(base, folder, all_prompts=True)
        combined = {tuple(names): name for names, name in self.combined.items()}
        return GatedUnlearner(moved, self.tokenizer, self.gates, self.precedence, combined).eval()

    # ---- saving and loading ----

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Write the prompts as `SoftPromptUnlearner.save_pretrained` does, and each gate to `gate/` in its folder.

        The prompts alone load with PEFT and with spul, and are then always on. A gate tells what it is for: a name
        gate its names, a text gate n-grams of the forget texts. Each prompt's card says how often its gate flags.

        Args:
            save_directory: the folder.
            kwargs: as in `SoftPromptUnlearner.save_pretrained`.

        Raises:
            ValueError: if a gate cannot be saved, such as a plain function, before anything is written.
        """
        write_gated(self, save_directory, **kwargs)

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module | str | os.PathLike,
        folder: str | os.PathLike,
        tokenizer: PreTrainedTokenizerBase,
        adapter_name: str | None = None,
        **hub: Any,
    ) -> GatedUnlearner:
        """Load prompts and their gates onto the base.

        Args:
            model: the base, or its name or folder.
            folder: folder or Hub name, which `save_pretrained` wrote.
            tokenizer: the base's tokenizer.
            adapter_name: name of the prompt in this model, of a folder with one prompt; the saved one unless given.
            hub: Hub arguments, such as `revision`, `token`, `cache_dir`.

        Raises:
            TypeError: if `folder` is no folder or name, such as a dict of several.
            FileNotFoundError: if the folder has no gates, or one of them lacks a file.
            ValueError: if a file is damaged, or prompt or gate does not fit the base or the tokenizer; also if
                `adapter_name` is given for a folder of several prompts.
        """
        unlearner, gates, precedence, combined = read_gated(model, folder, tokenizer, adapter_name, **hub)
        return cls(unlearner, tokenizer, gates, precedence, combined).eval()
