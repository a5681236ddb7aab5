"""Rows from files and from the Hugging Face Hub, with checked columns."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.csv
import pyarrow.parquet
from datasets import Dataset, load_dataset

from ..records.files import check_is_file
from .checks import check_rows, fault_of_text
from .rows import shortened

ENCODING = "utf-8-sig"  # UTF-8; a byte order mark, which some editors write, is no character of the first row
FILE_TYPES = (".tsv", ".tsv.gz", ".json", ".jsonl", ".csv", ".parquet")


def read_hub(name: str, split: str, columns: Sequence[str] = (), config: str | None = None) -> Dataset:
    """Read one split of a data set on the Hub.

    Args:
        name: owner and name, such as `"stanfordnlp/sst2"`.
        split: name of the split, such as `"train"`.
        columns: columns to read; all unless given.
        config: configuration, for data sets with several.

    Raises:
        ValueError: if a column is missing, or there are no rows.
    """
    rows = load_dataset(name, config, split=split)
    return _with_columns(rows, columns, f"split {split!r} of {name} on the Hub")


def read_file(path: str | os.PathLike[str], columns: Sequence[str] = (), as_written: bool = False) -> Dataset:
    """Read the rows of a file: `.tsv`, `.tsv.gz`, `.jsonl`, `.json` (a list, or lines), `.csv` or `.parquet`.

    The extension sets the type. A `.tsv` file has a header and no quoting; all its values are text. A column of a
    `.csv` has numbers, booleans or dates where Python writes them as the file does, as 7 and not 007, and else texts.

    Args:
        path: path of the file.
        columns: columns to read; all unless given.
        as_written: whether a column of JSON with both whole numbers and fractions has them as texts, for templates
            that write them: as numbers, 3 beside 1.8 is 3.0.

    Raises:
        FileNotFoundError: if there is no such file; the message lists its folder.
        ValueError: if the ending is another one, the file has no rows, a row has other columns than the first, a
            column is missing, or two have one name; with `as_written`, if one has numbers beside true or false.
    """
    path = Path(path)
    check_is_file(path)
    if not path.name.endswith(FILE_TYPES):
        raise ValueError(f"{path}: expected a file that ends in one of {', '.join(FILE_TYPES)}.")
    with said_of(path):
        if path.name.endswith((".tsv", ".tsv.gz")):
            rows = _from_rows(_tsv_rows(path), path)
        elif path.suffix in (".json", ".jsonl"):
            rows = _from_rows(_json_rows(path), path, as_written)
        elif path.suffix == ".csv":
            rows = Dataset(_csv_table(path))
        else:
            _check_different(pyarrow.parquet.read_schema(path).names, path)
            rows = Dataset(pyarrow.parquet.read_table(path))
    return _with_columns(rows, columns, str(path))


@contextmanager
def said_of(path: str | os.PathLike[str]) -> Iterator[None]:
    """Context manager: errors of decoding a file, which do not name it, as a ValueError that does.

    Args:
        path: the file that is read within.
    """
    try:
        yield
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}); save it in that encoding.") from error
    except UnicodeEncodeError as error:  # "\\ud83d" of JSON, which is valid there
        raise ValueError(f"{path}: the text {shortened(repr(error.object))} {fault_of_text(error.object)}") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is no whole gzip file ({error}); copy it again.") from error
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deep; expected rows with texts, numbers and messages.") from error
    except (pyarrow.ArrowException, OverflowError) as error:
        raise ValueError(
            f"{path} cannot be read as a table ({error}); expected columns of one type each, such as text."
        ) from error


def check_folder(source: str | os.PathLike[str], expected: str) -> Path:
    """`source` as the path of a folder.

    Raises:
        FileNotFoundError: if there is no such folder; the message includes `expected`, its contents.
    """
    folder = Path(source)
    if not folder.is_dir():
        raise FileNotFoundError(f"source={str(source)!r} is not a folder; expected one with {expected}.")
    return folder


def _check_different(names: Sequence[str], path: Path) -> None:
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{path} has more than one column {', '.join(map(repr, twice))}; expected a name for each.")


def _tsv_rows(path: Path) -> Iterator[dict[str, str]]:
    # Only "\n" ends a line: texts hold other characters that Python takes for line breaks by default.
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding=ENCODING, newline="\n") as lines:
        header = next(lines, "").rstrip("\r\n").split("\t")
        _check_different(header, path)
        for number, line in enumerate(lines, start=2):
            values = line.rstrip("\r\n").split("\t")
            if len(values) != len(header):
                raise ValueError(
                    f"{path}, line {number}: {len(values)} values; expected {len(header)}, one for each of {header}, "
                    "with tabs between them."
                )
            yield dict(zip(header, values, strict=True))


def _csv_table(path: Path) -> pyarrow.Table:
    parsing = pyarrow.csv.ParseOptions(newlines_in_values=True)
    table = pyarrow.csv.read_csv(path, parse_options=parsing)
    _check_different(table.column_names, path)
    if bad := [field.name for field in table.schema if pyarrow.types.is_binary(field.type)]:  # as Arrow reads others
        raise ValueError(f"{path} is not UTF-8 (the column {bad[0]!r}); save it in that encoding.")
    # Arrow reads 007 as 7 and true as True: texts of a prompt or a completion, which stay as they are written.
    guessed = [one.name for one in table.schema if not pyarrow.types.is_string(one.type) and one.name != "is_forget"]
    texts = pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(guessed, pyarrow.string()))
    as_written = pyarrow.csv.read_csv(path, parse_options=parsing, convert_options=texts) if guessed else table
    for name in guessed:
        found = ["" if value is None else str(value) for value in table[name].to_pylist()]
        if found != as_written[name].to_pylist():
            table = table.set_column(table.column_names.index(name), name, as_written[name])
    return table


def _json_rows(path: Path) -> Iterator[Any]:
    def row_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        row = dict(pairs)
        if len(row) < len(pairs):  # the last would be taken
            _check_different([name for name, _ in pairs], path)
        return row

    def parsed(text: str, line: int = 1) -> Any:
        try:
            return json.loads(text, object_pairs_hook=row_of)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}, line {line + error.lineno - 1}, is not JSON ({error.msg}, character {error.colno}); "
                "expected a row a line, or a list of rows."
            ) from error

    with path.open(encoding=ENCODING, newline="\n") as lines:
        while (first := lines.read(1)).isspace():
            pass
        lines.seek(0)
        if first == "[":
            yield from parsed(lines.read())
            return
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield parsed(line, number)


def _from_rows(found: Iterator[Any], path: Path, as_written: bool = False) -> Dataset:
    rows = list(found)
    for number, row in enumerate(rows, start=1):
        # datasets would fill a column that a row lacks with None, and drop one that only a later row has.
        if not isinstance(row, dict):
            raise ValueError(f"{path}, row {number}: found {shortened(repr(row))}; expected values by column.")
        if row.keys() != rows[0].keys():
            raise ValueError(
                f"{path}, row {number}: found {sorted(row)}; expected the columns of the first row: {rows[0]}."
            )
    for name in rows[0] if as_written and rows else ():
        _keep_numbers(rows, name, path)
    return Dataset.from_list(rows)


def _keep_numbers(rows: list[dict[str, Any]], name: str, path: Path) -> None:
    """Make a column's numbers texts where they are of two types: Arrow reads 3 beside 1.8 as 3.0, true as 1.0."""
    first: dict[type, int] = {}  # the first row with a number of each type
    for number, row in enumerate(rows, start=1):
        for one in _numbers(row[name]):
            first.setdefault(type(one), number)
    if bool in first and len(first) > 1:
        number = max(first.values())
        raise ValueError(
            f"{path}, row {number}: {name} is {shortened(repr(rows[number - 1][name]))}; expected either numbers or "
            "true and false in all rows. Write texts for both."
        )
    if len(first) > 1:
        for row in rows:
            row[name] = _with_texts(row[name])


def _numbers(value: Any) -> Iterator[Any]:
    """Numbers and booleans of a value, and of the lists in it."""
    if isinstance(value, list):
        for one in value:
            yield from _numbers(one)
    elif isinstance(value, (int, float)):
        yield value


def _with_texts(value: Any) -> Any:
    """A value with texts for its numbers."""
    if isinstance(value, list):
        return [_with_texts(one) for one in value]
    return str(value) if isinstance(value, (int, float)) else value


def _with_columns(rows: Dataset, columns: Sequence[str], where: str) -> Dataset:
    check_rows(rows, columns, where)
    return rows.select_columns(list(columns)) if columns else rows
