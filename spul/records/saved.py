"""A saved object of some kind, such as a gate or a rival: its JSON file, in a folder or on the Hub, and checked."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from .fields import Checks, check_format, check_values, read_object
from .files import HUB_ARGUMENTS, find_file

S = TypeVar("S", bound="Saved")


@dataclass(frozen=True)
class Saved:
    """A file of a kind, read and checked as far as all kinds share it.

    Attributes:
        folder: the folder, or the Hub repository.
        hub: arguments of `find_file`.
        path: the path of the file.
        fields: the fields in it.
    """

    folder: str
    hub: Mapping[str, Any]
    path: Path
    fields: dict[str, Any]

    # The last sentence where a field is missing or damaged, whose object cannot be loaded to be saved again.
    remedy: ClassVar[str] = "Copy or download the folder again, or make it anew."

    @classmethod
    def read(
        cls: type[S], folder: str | os.PathLike, name: str, latest: int, writer: str, hub: Mapping[str, Any]
    ) -> S:
        """A file, read and checked.

        Args:
            folder: a local folder or a Hub repository's name.
            name: name of the file.
            latest: the latest format that is known.
            writer: what writes such a folder, for the message.
            hub: arguments of `find_file`.

        Raises:
            FileNotFoundError: if there is none.
            TypeError: if an argument is not one of the Hub's.
            ValueError: if it is not JSON, of a later format, or names no kind.
        """
        if unknown := sorted(set(hub) - set(HUB_ARGUMENTS)):
            raise TypeError(f"unknown arguments {unknown}; expected the Hub's: {', '.join(HUB_ARGUMENTS)}.")
        path = find_file(folder, name, **hub)
        if path is None:
            where = "/".join(filter(None, (hub.get("subfolder"), name)))
            raise FileNotFoundError(f"{str(folder)!r} has no {where}; expected a folder that {writer} wrote.")
        saved = cls(str(folder), hub, path, read_object(path))
        check_format(saved.fields.get("format_version"), latest, path)
        saved.check({"kind": (lambda value: isinstance(value, str), "the name of a kind")})
        return saved

    @property
    def kind(self) -> str:
        """The name of its kind."""
        return self.fields["kind"]

    def check(self, checks: Checks) -> None:
        """Raise unless every field has a value that its check accepts.

        Args:
            checks: for each field, a check and the words for what is expected.

        Raises:
            ValueError: if one is missing or has not.
        """
        check_values(self.fields, checks, self.path, self.remedy)
