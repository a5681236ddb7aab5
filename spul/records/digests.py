"""Digests (SHA-256) of a model's weights, of rows, of a tokenizer, and of settings.

Whoever can guess a set of rows confirms the guess by a plain digest of it. What is shared (adapter folder, card,
report, `evaluation.json`) therefore holds `summarize_rows` alone, whose digest is keyed by a secret of the owner and
ignores the rows' order. `digest_of_rows` is plain and depends on the order; it stays in files by which an evaluation
or a training resumes.
"""

from __future__ import annotations

import hashlib
import hmac
import itertools
import json
import os
import re
import secrets
import weakref
from collections.abc import Iterable, Mapping, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # rows and settings need no torch, which is slow to import
    from torch import nn
    from transformers import PreTrainedTokenizerBase

DigestKey = bytes | str | os.PathLike  # the key itself, or the path of a file of `make_digest_key`
MIN_KEY_BYTES = 16
SAMPLES_PER_TENSOR = 256  # entries that a fingerprint reads of a parameter; another number makes others of all bases


@dataclass
class DataSummary:
    """Number of rows of a set and a keyed digest of them, without the rows.

    Only who has the key can compare the digest with a guess of the rows (`is_summary_of`).

    Args:
        rows: number of rows.
        digest: HMAC-SHA256 over the sorted SHA-256 of the rows, whatever their order; None without a key.
    """

    rows: int
    digest: str | None = None


@dataclass
class RewrittenRows:
    """Numbers of rewritten rows that a training had beside those given, and the ways by which they were made.

    Args:
        forget: number of rewritten forget rows.
        retain: number of rewritten retain rows.
        ways: names of the ways, such as `"capitals"`.
    """

    forget: int
    retain: int
    ways: list[str]

    @classmethod
    def of(cls, flags: Iterable[bool], made_by: Iterable[str | None]) -> RewrittenRows | None:
        """The rewritten ones of a set of rows; None if there are none.

        Args:
            flags: the rows' `is_forget`.
            made_by: the way by which each was rewritten; None for one that was given.
        """
        made = [(flag, by) for flag, by in zip(flags, made_by, strict=True) if by is not None]
        sides = [flag for flag, _ in made]
        ways = list(dict.fromkeys(by for _, by in made))
        return cls(sides.count(True), sides.count(False), ways) if made else None

    def in_words(self) -> str:
        """Numbers and ways for a reader."""
        return f"{self.forget:,} made of forget rows, {self.retain:,} made of retain rows ({', '.join(self.ways)})"


# ---- settings ----


def canonical_json(value: Any) -> str:
    """JSON with sorted keys; sets become sorted lists, other objects that JSON lacks their `str`."""
    # A set of strings has another order in each process.
    return json.dumps(value, sort_keys=True, default=lambda x: sorted(x) if isinstance(x, set) else str(x))


def digest(value: Any) -> str:
    """SHA-256 of a value's `canonical_json`, as 64 hexadecimal digits."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


# ---- weights ----


def fingerprint(model: nn.Module) -> str | None:
    """Cheap digest of a model's weights, by which another base is noticed.

    Hashes the name, the shape and up to 256 evenly spaced entries, rounded to bfloat16, of every
    parameter. A checkpoint has one fingerprint in float32 and bfloat16; in float16 or quantized it may have another.
    Another model, another revision and a fine-tuned copy have other fingerprints. Not noticed: changes confined to
    entries between the samples, changes below bfloat16's precision, and changes of buffers. A sharded base has that of
    the whole one; the first time, all processes must ask for it.

    Args:
        model: the base model, without adapters.

    Returns:
        64 hexadecimal digits; None if some weights are not in memory (meta device, disk offload).
    """
    from ..models.compat import is_sharded, own_parameters, uncompiled

    model = uncompiled(model)
    is_fixed = is_sharded(model) and not any(parameter.requires_grad for _, parameter in own_parameters(model))
    if is_fixed and model in _of_sharded:
        return _of_sharded[model]
    found = digest_of_parameters(own_parameters(model))
    if is_fixed:
        _of_sharded[model] = found
    return found


# Fingerprints of sharded, frozen models: the first is taken by all processes together, later ones by any of them.
_of_sharded: weakref.WeakKeyDictionary[nn.Module, str | None] = weakref.WeakKeyDictionary()


def digest_of_parameters(parameters: Iterable[tuple[str, nn.Parameter]]) -> str | None:
    """Digest of named parameters, as `fingerprint` computes it for a base's own ones."""
    import torch

    from ..models.compat import packed_bytes, whole

    found = hashlib.sha256()
    for name, parameter in sorted(parameters, key=lambda item: item[0]):
        if parameter.device.type == "meta":
            return None
        stored = whole(packed_bytes(parameter)).detach()
        flat = stored.reshape(-1)
        indices = torch.linspace(0, flat.numel() - 1, min(SAMPLES_PER_TENSOR, flat.numel()), dtype=torch.float64)
        values = flat[indices.round().long().to(flat.device)]
        if values.is_floating_point():
            values = values.to(torch.bfloat16).view(torch.uint8)
        found.update(f"{name}{tuple(stored.shape)}".encode())
        found.update(values.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


# ---- rows ----


def is_transformed(rows: Any) -> bool:
    """Whether rows are a data set whose values a function of the user's makes when they are read."""
    return _has_format(rows) and rows.format["type"] == "custom"


def plain_rows(rows: Any) -> Any:
    """A data set with values of Python, whatever type its format makes of them; what is none, as it is."""
    if not _has_format(rows) or is_transformed(rows):
        return rows
    is_plain = rows.format["type"] is None and rows.format["columns"] == rows.column_names
    return rows if is_plain else rows.with_format(None)


def _has_format(rows: Any) -> bool:
    return isinstance(getattr(rows, "format", None), Mapping)  # a stream's is not known, a string's is a method


def make_digest_key(path: str | os.PathLike) -> Path:
    """Write a new random key of 32 bytes to a file that only its owner may read (mode 0600).

    Keep it where the rows are kept, and out of every folder that you share. Without it no digest can be recomputed.

    Args:
        path: the file; it holds 64 hexadecimal digits.

    Returns:
        The path, for `digest_key=`.

    Raises:
        FileExistsError: if there is one, which a new key would make useless.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError as error:
        raise FileExistsError(
            f"{str(path)!r} exists: digests under the key in it could not be recomputed with another. Use it, or name "
            "a new file."
        ) from error
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(secrets.token_hex(32) + "\n")
    return Path(path)


_KEY_FILE = re.compile(rb"(?:[0-9a-f]{2}){%d,}" % MIN_KEY_BYTES)


def read_digest_key(key: DigestKey) -> bytes:
    """The bytes of a key.

    Args:
        key: at least 16 random bytes, or the path of a file that `make_digest_key` wrote. The bytes of such a file
            are read as the file is.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the key is shorter, or the file holds none.
    """
    if isinstance(key, bytes):
        if len(key) < MIN_KEY_BYTES:
            raise ValueError(
                f"digest_key has {len(key)} bytes; expected at least {MIN_KEY_BYTES} random ones, such as "
                "secrets.token_bytes(32), or the path of a file of spul.records.make_digest_key."
            )
        return bytes.fromhex(key.strip().decode()) if _KEY_FILE.fullmatch(key.strip()) else key
    if not isinstance(key, (str, os.PathLike)):
        raise TypeError(f"digest_key is a {type(key).__name__}; expected bytes, or the path of a key file.")
    path = Path(key)
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no file {str(path)!r} with a digest_key; make one with spul.records.make_digest_key."
        )
    text = path.read_bytes().strip()
    if not _KEY_FILE.fullmatch(text):
        raise ValueError(  # without the content, which may be a secret
            f"{str(path)!r} holds no digest_key; expected at least {2 * MIN_KEY_BYTES} hexadecimal digits, as "
            "spul.records.make_digest_key writes them."
        )
    return bytes.fromhex(text.decode("ascii"))


def summarize_rows(rows: Iterable[Mapping[str, Any]], key: DigestKey | None = None) -> DataSummary:
    """Number and keyed digest of rows, in any order.

    Args:
        rows: rows with `prompt` and `completion`, or tokenized ones with `input_ids` and `completion_mask`; other
            columns do not count.
        key: the owner's secret, see `read_digest_key`; None leaves out the digest.
    """
    if key is None:
        return DataSummary(len(rows) if isinstance(rows, Sized) else sum(1 for _ in rows))
    return summarize_groups(rows, itertools.repeat(True), key)[0]


def summarize_groups(
    rows: Iterable[Mapping[str, Any]], flags: Iterable[bool], key: DigestKey
) -> tuple[DataSummary, DataSummary]:
    """`summarize_rows` of the rows whose flag is True, and of the others, in one pass.

    Args:
        rows: as in `summarize_rows`.
        flags: one for each row, such as `is_forget`; further ones are not read.
        key: the owner's secret.

    Raises:
        ValueError: if there are fewer flags than rows.
    """
    groups, key, flags = (bytearray(), bytearray()), read_digest_key(key), iter(flags)
    for row in plain_rows(rows):
        flag = next(flags, None)
        if flag is None:
            raise ValueError("there are more rows than flags; expected a flag for each row.")
        groups[not flag].extend(_row_digest(row))
    forget, retain = (
        DataSummary(len(digests) // 32, hmac.new(key, _ordered(digests), hashlib.sha256).hexdigest())
        for digests in groups
    )
    return forget, retain


def is_summary_of(summary: DataSummary, rows: Iterable[Mapping[str, Any]], key: DigestKey) -> bool:
    """Whether a summary is that of these rows under this key, compared in constant time.

    By this the owner proves later which rows an adapter was trained on; the key is then no secret any more to whoever
    checks.

    Args:
        summary: `forget`, `retain` or a part of `combined_from` of a `SpulConfig`.
        rows: the rows, as in the training: text, or tokenized if they were tokenized.
        key: the key of the training.

    Raises:
        ValueError: if the summary has no digest.
    """
    if summary.digest is None:
        raise ValueError("the summary has no digest, as of a training without digest_key: no rows can be compared.")
    found = summarize_rows(rows, key)
    return found.rows == summary.rows and hmac.compare_digest(str(found.digest).encode(), summary.digest.encode())


def sorted_digests(rows: Iterable[Mapping[str, Any]]) -> bytes:
    """The SHA-256 of every row, sorted and joined: 32 bytes a row, equal for one set in any order. Not to be shared.

    Args:
        rows: as in `summarize_rows`.
    """
    return _ordered(bytearray(b"".join(map(_row_digest, plain_rows(rows)))))


_encode_row = json.JSONEncoder(sort_keys=True, ensure_ascii=False).encode


def _row_digest(row: Mapping[str, Any]) -> bytes:
    """The SHA-256 of a row, 32 bytes. Not to be shared."""
    content: list[Any] = [row.get("prompt"), row.get("completion")]
    if content[0] is None:
        content = [[int(i) for i in row[key]] for key in ("input_ids", "completion_mask")]
    return hashlib.sha256(_encode_row(content).encode()).digest()


def _ordered(digests: bytearray) -> bytes:
    """Digests sorted and joined: equal for one set of rows in any order."""
    return np.sort(np.frombuffer(digests, dtype="S32")).tobytes()  # of one width, so that zeros at an end count


def digest_of_rows(rows: Any, more_columns: Iterable[str] = ()) -> str:
    """Plain digest of rows or texts in their order, on which an evaluation's random draws depend. Not to be shared.

    Args:
        rows: texts or rows; of a dataset with a column `prompt`, only `prompt`, `completion` and `more_columns` count.
        more_columns: names of further columns; those that it lacks are left out.
    """
    rows, columns = plain_rows(rows), getattr(rows, "column_names", ())
    if "prompt" not in columns:
        return digest(list(rows))
    counted = {"prompt", "completion", *more_columns}
    if not is_transformed(rows):  # a transform may read all columns
        rows = rows.select_columns([name for name in columns if name in counted])
    return digest([{name: value for name, value in row.items() if name in counted} for row in rows])


# ---- tokenizer ----


def digest_of_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Digest of all that determines a text's tokens: vocabulary, rules, special tokens and chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        rules = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    else:
        rules = json.loads(backend.to_str())
    for changing in ("padding", "truncation"):  # state of the last call
        rules.pop(changing, None)
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return digest([rules, special, tokenizer.chat_template])
