"""Prompts that are served: added, revoked, withheld and restored. What is unclear is refused."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from ..gates.gate import Gate, request_texts
from ..gates.gated import GatedUnlearner
from ..gates.routes import Routes
from ..models.unlearner import PREFIX_TYPES
from ..records.digests import fingerprint
from ..records.spul_config import read_spul_config
from .errors import ApiError
from .loading import ALWAYS, always, check_fits, check_gate, check_name

NO_TEXT = "the prompt was not added: name or folder is no text, or always no boolean."


class ServedPrompts:
    """Prompts behind gates, as a server uses them. One thread routes, adds, revokes, withholds and restores.

    Args:
        gated: the prompts.
        allowed: the folder within which `add` reads; None to refuse every addition.
        allow_other_base: as in `load_prompts`.

    Attributes:
        served: what is served: of each prompt, by its name, its adapter (the folder's last part, or the Hub name), its
            digest, the base's, its gate, and since when.
        revoked: what was revoked or withheld, in order, with `until`.
        withheld: prompts that no request gets until they are restored, by name, as they were in `served`.
        idle: names of combined prompts that no request gets until a part of them is restored.
        routes: from requests to what is served.
        withdrawn: asked as requests that waited are routed: names of prompts that are served and must not be.
        longest: virtual tokens of the longest prompt.
        stands_inside: whether a prompt stands at the message.

    Raises:
        ValueError: if there is no prompt, `allowed` is no folder, or a prompt has no gate.
    """

    def __init__(
        self, gated: GatedUnlearner, allowed: str | os.PathLike | None = None, allow_other_base: bool = False
    ) -> None:
        gated.route([])  # raises where a prompt has no gate
        if not gated.gates:
            raise ValueError("there is no prompt to serve, and the base alone is not served; load one.")
        if allowed is not None and not Path(allowed).is_dir():
            raise ValueError(f"{str(allowed)!r}, from which prompts are to be added, is no folder.")
        self.gated, self.allow_other_base = gated.eval(), allow_other_base
        self.allowed = None if allowed is None else Path(allowed).resolve()
        self.base_fingerprint = fingerprint(gated.get_base_model())
        self._embeddings_only = False
        self._since = dict.fromkeys(gated.unlearner.peft_config, time.time())
        self.revoked: list[dict[str, Any]] = []
        self.served: dict[str, dict[str, Any]] = {}
        self.withheld: dict[str, dict[str, Any]] = {}
        self.idle: list[str] = []
        self.withdrawn: Callable[[], Collection[str]] = tuple
        self._refresh()

    def route(self, requests: Sequence[Sequence[int]]) -> list[str]:
        """The name of the prompt of each request, as token ids; `"__base__"` for none."""
        return self._routes().names(request_texts(self.gated.tokenizer, requests))

    def choose(self, requests: Sequence[Sequence[int]], before: Sequence[Routes | None]) -> list[str | None]:
        """As `route`, for requests that waited; None for one whose prompt was revoked or replaced meanwhile.

        Args:
            requests: token ids of each.
            before: `routes` as they were when each came; None for those of now.
        """
        texts, routes = request_texts(self.gated.tokenizer, requests), self._routes()
        found: list[str | None] = [*routes.names(texts)]
        if gone := set(self.withdrawn()):  # asked last, since gates take their time
            routes = self._routes(gone)
            found = [*routes.names(texts)]
        for i, own in enumerate(before):
            own = self.routes if own is None else own
            if (gone or own is not self.routes) and not routes.has_same(own.names([texts[i]])[0], own):
                found[i] = None
        return found

    def _routes(self, gone: Collection[str] = ()) -> Routes:
        """The routes of now, without what is withheld, and without others that are gone."""
        return self.gated.routes.without({*self.withheld, *gone})

    def add(self, name: Any, folder: Any, is_always: Any = False) -> dict[str, Any]:
        """Load a prompt and its gate; requests that are routed from now on get it. On an error what is served stays.

        Args:
            name: its name; one that is withheld by the same name goes.
            folder: within the allowed folder: a path relative to it.
            is_always: whether every request gets it, whatever gate is in its folder.

        Raises:
            ApiError: 400 for what does not fit or is no safe folder, 409 for a name that is taken.
        """
        if not (isinstance(name, str) and isinstance(folder, str) and isinstance(is_always, bool)):
            raise ApiError(400, NO_TEXT)
        if self._has(name) and name not in self.withheld:
            raise ApiError(409, "there is a prompt of this name; revoke it first, or take another name.", "name")
        others = {**self.served, **(self.withheld if is_always else {})}
        if any(one["gate"] == ALWAYS for key, one in others.items() if key != name):
            raise ApiError(
                409, "a prompt is always on, so that one behind it would never be; revoke that first, and add it last."
            )
        path = self._within(folder)
        try:
            check_name(name)
            if not is_always:
                check_gate(path)
            check_fits(read_spul_config(path), self.base_fingerprint, self.allow_other_base, folder)
            gate = always if is_always else None
            if name in self.withheld:  # its place is taken, by a prompt that is known to load
                trial = next(one for one in map("trial-{}".format, itertools.count()) if not self._has(one))
                try:
                    self.gated.load_adapter(path, trial, gate=gate)
                    self._check_kind(trial)
                finally:
                    if self._has(trial):
                        self.gated.delete_adapter(trial)
                self.withheld = {key: one for key, one in self.withheld.items() if key != name}
                self.gated.delete_adapter(name)
            self.gated.load_adapter(path, name, gate=gate)
            self._check_kind(name)
        except Exception as error:  # whatever a strange folder holds: nothing was changed
            self._refresh()
            raise ApiError(400, f"the prompt was not added: {error}", "folder") from error
        self._since[name] = time.time()
        self._refresh()
        return self.served[name]

    def _has(self, name: str) -> bool:
        return name in self.gated.unlearner.peft_config

    def weights_of(self, name: Any, folder: Any) -> str | None:
        """SHA-256 of the weights of a prompt that `add` would load, as its record says; None if it does not.

        Raises:
            ApiError: 400 if name or folder is no text, the folder is no safe one, or its record is damaged.
        """
        if not (isinstance(name, str) and isinstance(folder, str)):
            raise ApiError(400, NO_TEXT)
        try:
            return read_spul_config(self._within(folder)).weights_sha256
        except (OSError, ValueError) as error:
            raise ApiError(400, f"the prompt was not added: {error}", "folder") from error

    def revoke(self, name: str) -> list[dict[str, Any]]:
        """Remove a prompt and its gate, and combined prompts of which it is a part; all that were removed.

        Of one that no request got any more, `until` is the time since when none did.

        Raises:
            ApiError: 404 if there is no such prompt.
        """
        if not self._has(name):
            raise ApiError(404, "there is no prompt of this name.", "name")
        off = [*self.withheld, *self.idle]
        self.gated.delete_adapter(name)
        return [*self._without_gone(), *(self._last(key) for key in off if not self._has(key))]

    def withhold(self, name: str) -> list[dict[str, Any]]:
        """Give a prompt to no request until it is restored; as `revoke`, which removes it, says what went.

        One that is idle, so that nothing goes, does not come back with its parts then.
        """
        if name not in (*self.served, *self.idle):
            raise ApiError(404, "there is no prompt of this name.", "name")
        self.withheld = {**self.withheld, name: self.served.get(name) or self._last(name)}
        return self._without_gone()

    def _last(self, name: str) -> dict[str, Any]:
        """A prompt that no request gets any more, as it went."""
        return next(one for one in reversed(self.revoked) if one["name"] == name)

    def restore(self, name: str) -> list[dict[str, Any]]:
        """Serve a prompt again that was withheld, where it stood; all that are served again with it.

        One that is always on stands last, since others may have been added.
        """
        before, own = self.served, self.withheld[name]
        self.withheld = {key: one for key, one in self.withheld.items() if key != name}
        if own["gate"] == ALWAYS:
            self.gated.precedence = [*(one for one in self.gated.precedence if one != name), name]
        self._since |= {key: time.time() for key in self.gated.unlearner.peft_config if key not in before}
        self._refresh()
        return [one for key, one in self.served.items() if key not in before]

    def _without_gone(self) -> list[dict[str, Any]]:
        """Find what is still served; what is not any more, with `until`."""
        before, now = self.served, time.time()
        self._refresh()
        gone = [{**one, "until": now} for key, one in before.items() if key not in self.served]
        self.revoked = [*self.revoked, *gone]
        return gone

    @property
    def gate_failures(self) -> int:
        """Number of texts that got a prompt because a gate failed on them."""
        return sum(sum(gate.failures.values()) for gate in list(self.gated.gates.values()))

    def take_embeddings_only(self) -> None:
        """Refuse, from now on, prompts that are keys and values, as an engine does that takes embeddings.

        Raises:
            ValueError: if there is one.
        """
        self._embeddings_only = True
        for name in self.served:
            self._check_kind(name)

    def _check_kind(self, name: str) -> None:
        configs: Any = self.gated.unlearner.peft_config
        if self._embeddings_only and configs[name].peft_type in PREFIX_TYPES:
            if name not in self.served:  # just added
                self.gated.delete_adapter(name)
            raise ValueError(
                f"the prompt {name!r} is a prefix of keys and values; this engine takes embeddings alone."
            )

    def _within(self, folder: str) -> Path:
        if self.allowed is None:
            raise ApiError(403, "the server was started without a folder to add prompts from.", "folder")
        try:
            path = (self.allowed / folder).resolve()
            is_fine = path.is_relative_to(self.allowed) and path != self.allowed and path.is_dir()
            is_fine = is_fine and all(one.resolve().is_relative_to(self.allowed) for one in path.rglob("*"))
        except (OSError, ValueError, RuntimeError):  # a zero byte, a circle of links
            is_fine = False
        if not is_fine:
            raise ApiError(
                400, "folder is none within the one that prompts are added from, or links out of it.", "folder"
            )
        return path

    def _refresh(self) -> None:
        """Replace the prompts that are served, by name, as a whole, so that other threads may read them."""
        unlearner, found = self.gated.unlearner, {}
        self.withheld = {name: one for name, one in self.withheld.items() if name in unlearner.spul_configs}
        self.routes = self._routes()
        there = {*self.routes.gates, *self.routes.combined.values()}
        for name, record in unlearner.spul_configs.items():
            if name not in there:
                continue
            gate = self.gated.gates.get(name)
            found[name] = self.served.get(name) or {
                "name": name,
                "adapter": record.name,
                "prompt_sha256": record.weights_sha256,
                "base_fingerprint": self.base_fingerprint,
                "gate": _kind(gate),
                "since": self._since[name],
            }
        self.idle = [name for name in unlearner.spul_configs if name not in {*found, *self.withheld}]
        self.longest = unlearner.longest_prompt
        self.stands_inside = any(one.prompt_position == "message" for one in unlearner.spul_configs.values())
        self.served = found


def _kind(gate: Gate | None) -> str:
    if gate is None:
        return "combined"
    return ALWAYS if getattr(gate, "function", None) is always else gate.kind or "function"
