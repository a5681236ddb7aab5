"""Prompts and refusals that are served: added, revoked, withheld and restored. What is unclear is refused."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..gates.gate import Gate, parts_of, request_texts
from ..gates.gated import GatedUnlearner
from ..gates.routes import Routes
from ..models.unlearner import PREFIX_TYPES
from ..records.digests import fingerprint
from ..records.spul_config import read_spul_config
from ..rivals.refusal import FixedRefusal
from .errors import ApiError
from .loading import (
    ALWAYS,
    always,
    check_fits,
    check_folders,
    check_gate,
    check_name,
    is_rival,
    load_prompts,
    load_refusal,
    without_prompts,
)

PROMPT, REFUSAL = "prompt", FixedRefusal.kind  # kinds of what is served
NO_TEXT = "the prompt was not added: name or folder is no text, or always no boolean."


class ServedPrompts:
    """Prompts and fixed refusals behind gates, as a server uses them.

    A refusal is a prompt here in all but what it answers with: a text, in place of the base under virtual tokens. One
    thread routes, adds, revokes, withholds and restores.

    Args:
        gated: the prompts.
        allowed: the folder within which `add` reads; None to refuse every addition.
        allow_other_base: as in `load_prompts`.
        refusals: fixed refusals on the same base, by their names; of their models only the gates and texts are used.
        precedence: names of prompts and refusals with gates, the first first: a request that several gates flag gets
            the first. Prompts in their own order, then refusals, unless given.

    Attributes:
        served: what is served: of each prompt or refusal, by its name, its kind, its adapter (the folder's last part,
            or the Hub name), its digest (a refusal has none: a text could be guessed by it), the base's, its gate, and
            since when.
        revoked: what was revoked or withheld, in order, with `until`.
        withheld: prompts that no request gets until they are restored, by name, as they were in `served`.
        idle: names of combined prompts that no request gets until a part of them is restored.
        routes: from requests to what is served.
        withdrawn: asked as requests that waited are routed: names of prompts that are served and must not be.
        longest: virtual tokens of the longest prompt.
        stands_inside: whether a prompt stands at the message.

    Raises:
        TypeError: if a refusal is another object.
        ValueError: if there is no prompt and no refusal, `allowed` is no folder, a prompt has no gate, or `precedence`
            or `refusals` have names that they may not.
    """

    def __init__(
        self,
        gated: GatedUnlearner,
        allowed: str | os.PathLike | None = None,
        allow_other_base: bool = False,
        refusals: Mapping[str, FixedRefusal] | None = None,
        precedence: Sequence[str] | None = None,
    ) -> None:
        gated.route([])  # raises where a prompt has no gate
        self.refusals = dict(refusals or {})
        if wrong := [name for name, one in self.refusals.items() if not isinstance(one, FixedRefusal)]:
            raise TypeError(f"refusals has {wrong}, which are none; expected a FixedRefusal by each name.")
        if both := sorted({*self.refusals} & {*gated.unlearner.peft_config}):
            raise ValueError(f"refusals has {both}, which are names of prompts; expected other names.")
        if not (gated.gates or self.refusals):
            raise ValueError("there is no prompt to serve, and the base alone is not served; load one.")
        if allowed is not None and not Path(allowed).is_dir():
            raise ValueError(f"{str(allowed)!r}, from which prompts are to be added, is no folder.")
        self.gated, self.allow_other_base = gated.eval(), allow_other_base
        self.allowed = None if allowed is None else Path(allowed).resolve()
        self.base_fingerprint = fingerprint(gated.get_base_model())
        self._embeddings_only = False
        default = [*gated.precedence, *self.refusals]
        self._order = list(default if precedence is None else precedence)
        if sorted(self._order) != sorted(default):
            raise ValueError(f"precedence is {self._order}; expected the names {default}, each once.")
        self._since = dict.fromkeys(self._names(), time.time())
        self.revoked: list[dict[str, Any]] = []
        self.served: dict[str, dict[str, Any]] = {}
        self.withheld: dict[str, dict[str, Any]] = {}
        self.idle: list[str] = []
        self.withdrawn: Callable[[], Collection[str]] = tuple
        self._refresh()

    @classmethod
    def from_folders(
        cls,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        folders: Mapping[str, str | os.PathLike],
        always_on: Sequence[str] = (),
        allow_other_base: bool = False,
        allowed: str | os.PathLike | None = None,
    ) -> ServedPrompts:
        """Prompts and fixed refusals of one base, each behind the gate in its folder; all of them, or an error.

        Args:
            model: the base.
            tokenizer: its tokenizer.
            folders: of each prompt or refusal, by its name; the first is first where several gates flag a request.
            always_on: names of those that every request gets, whatever gate is in their folders.
            allow_other_base: as in `load_prompts`.
            allowed: as in the class.

        Raises:
            FileNotFoundError: if a folder or a gate is missing.
            ValueError: if there is none, or one does not fit the base.
        """
        check_folders(folders, always_on)
        prompts = {name: folder for name, folder in folders.items() if not is_rival(folder)}
        if prompts:
            on = [name for name in always_on if name in prompts]
            gated = load_prompts(model, tokenizer, prompts, on, allow_other_base)
        else:
            gated = without_prompts(model, tokenizer)
        refusals = {
            name: load_refusal(gated.get_base_model(), tokenizer, folder, name in always_on)
            for name, folder in folders.items()
            if name not in prompts
        }
        return cls(gated, allowed, allow_other_base, refusals, list(folders))

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
        own = self.gated.routes
        gates = {**own.gates, **{name: one.gate for name, one in self.refusals.items()}}
        order = [name for name in self._names() if name in gates]
        return Routes(gates, order, own.combined).without({*self.withheld, *gone})

    def _names(self) -> list[str]:
        """All that there is, by name, in order of precedence; also what no request gets, and combined prompts."""
        there = {**dict.fromkeys(self.gated.unlearner.spul_configs), **dict.fromkeys(self.refusals)}
        return list({**{name: None for name in self._order if name in there}, **there})

    def add(self, name: Any, folder: Any, is_always: Any = False) -> dict[str, Any]:
        """Load a prompt or refusal and its gate, for requests from now on. On an error what is served stays.

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
            if is_rival(path):
                refusal = load_refusal(self.gated.get_base_model(), self.gated.tokenizer, path, is_always)
                self._make_room(name)
                self.refusals = {**self.refusals, name: refusal}
            else:
                self._load(name, path, folder, is_always)
        except Exception as error:  # whatever a strange folder holds: nothing was changed
            self._refresh()
            raise ApiError(400, f"the prompt was not added: {error}", "folder") from error
        self._since[name] = time.time()
        self._refresh()
        return self.served[name]

    def _load(self, name: str, path: Path, folder: str, is_always: bool) -> None:
        """Load a prompt and its gate."""
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
        self._make_room(name)
        self.gated.load_adapter(path, name, gate=gate)
        self._check_kind(name)

    def _make_room(self, name: str) -> None:
        """Remove what is withheld by a name; what takes it stands last."""
        if name in self.withheld:
            self.withheld = {key: one for key, one in self.withheld.items() if key != name}
            self._delete(name)
            self._order = [one for one in self._order if one != name]

    def _delete(self, name: str) -> None:
        if name in self.refusals:
            self.refusals = {key: one for key, one in self.refusals.items() if key != name}
        else:
            self.gated.delete_adapter(name)

    def _has(self, name: str) -> bool:
        return name in self.gated.unlearner.peft_config or name in self.refusals

    def weights_of(self, name: Any, folder: Any) -> tuple[str | None, bool]:
        """SHA-256 of the weights of a prompt that `add` would load, and whether it has any: a refusal has none.

        The SHA-256 is that of its record; None if that has none.

        Raises:
            ApiError: 400 if name or folder is no text, the folder is no safe one, or its record is damaged.
        """
        if not (isinstance(name, str) and isinstance(folder, str)):
            raise ApiError(400, NO_TEXT)
        try:
            path = self._within(folder)
            return (None, False) if is_rival(path) else (read_spul_config(path).weights_sha256, True)
        except (OSError, ValueError) as error:
            raise ApiError(400, f"the prompt was not added: {error}", "folder") from error

    def revoke(self, name: str) -> list[dict[str, Any]]:
        """Remove a prompt or refusal and its gate, and combined prompts of which it is a part; all that were removed.

        Of one that no request got any more, `until` is the time since when none did.

        Raises:
            ApiError: 404 if there is no such prompt.
        """
        if not self._has(name):
            raise ApiError(404, "there is no prompt of this name.", "name")
        off = [*self.withheld, *self.idle]
        self._delete(name)
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
            self._order = [*(one for one in self._order if one != name), name]
        self._since |= {key: time.time() for key in self._names() if key not in before}
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
        """Number of failures on texts, which got a prompt or a refusal; each of joined gates counts its own."""
        gates = [*list(self.gated.gates.values()), *(one.gate for one in list(self.refusals.values()))]
        return sum(sum(part.failures.values()) for part in parts_of(gates))  # one may serve several prompts

    def take_embeddings_only(self) -> None:
        """Refuse, from now on, prompts that are keys and values, as an engine does that takes embeddings.

        Raises:
            ValueError: if there is one.
        """
        self._embeddings_only = True
        for name in self.served:
            if name not in self.refusals:
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
        unlearner, self._order = self.gated.unlearner, self._names()
        self.withheld = {name: one for name, one in self.withheld.items() if name in self._order}
        self.routes = self._routes()
        there = {*self.routes.gates, *self.routes.combined.values()}
        found = {name: self.served.get(name) or self._entry(name) for name in self._order if name in there}
        others = {*found, *self.withheld}
        self.idle = [name for name in self._order if name not in others]
        self.longest = unlearner.longest_prompt
        self.stands_inside = any(one.prompt_position == "message" for one in unlearner.spul_configs.values())
        self.served = found

    def _entry(self, name: str) -> dict[str, Any]:
        """The entry of a prompt or a refusal in `served`."""
        refusal, record = self.refusals.get(name), self.gated.unlearner.spul_configs.get(name)
        return {
            "name": name,
            "kind": PROMPT if refusal is None else REFUSAL,
            "adapter": getattr(record if refusal is None else refusal, "name", None),
            "prompt_sha256": None if record is None else record.weights_sha256,
            "base_fingerprint": self.base_fingerprint,
            "gate": _kind(self.gated.gates.get(name) if refusal is None else refusal.gate),
            "since": self._since[name],
        }


def _kind(gate: Gate | None) -> str:
    if gate is None:
        return "combined"
    return ALWAYS if getattr(gate, "function", None) is always else gate.kind or "function"
