"""Rows of text files, each with its line: JSON lines, JSON, CSV and TSV, also compressed by gzip.

Strict: what would silently lose rows or columns elsewhere (an unclosed quote, a doubled key, a
surplus field) is an error that names the line.
"""

import codecs
import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from promptkd.errors import UserError

Row = dict[str, Any]
Rows = Iterator[tuple[str, Row]]
"""(where, row) pairs; where is ``file:line``."""

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
LONGEST_FIELD = 2**31 - 1  # csv's own limit of 131072 characters would refuse long documents
GZIP = b"\x1f\x8b"
"""What a compressed file begins with, whatever its name."""
OTHER_FORMS = {
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x03\x04": "zip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"PAR1": "Parquet",
}
"""What files in other forms begin with."""
_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def text_rows(path: str, suffix: str) -> Rows:
    """The rows of one file; ``suffix`` is that of its format, without ``.gz``.

    Raises:
        UserError: with the line, for whatever isn't well-formed.
    """
    text = _text(path)
    if not text.strip():
        return iter(())
    if suffix in {".csv", ".tsv"}:
        return _delimited(path, text, "\t" if suffix == ".tsv" else ",")
    if text.lstrip()[:1] == "[":
        return _array(path, text, text.index("["))
    if suffix == ".json" and (whole := _single_object(path, text)) is not None:
        return iter(whole)
    return _lines(path, text)


def _text(path: str) -> str:
    data = Path(path).read_bytes()
    if path.lower().endswith(".gz") or data.startswith(GZIP):
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{path} can't be decompressed: {error}. Compress it again.") from None
    for mark, form in OTHER_FORMS.items():
        if data.startswith(mark):
            raise UserError(f"{path} is in the form of {form}, not text. Convert or rename it.")
    encoding = next((name for mark, name in _BYTE_ORDER_MARKS if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line} can't be read: {error}. Convert it to UTF-8.") from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise UserError(
            f"{path}:{line} holds a NUL byte, so it is damaged, or UTF-16 without its mark. "
            "Mend it, or convert it to UTF-8."
        )
    return text


def _lines(path: str, text: str) -> Rows:
    """One object a line. Only CR and LF end a line: U+2028 and its like stand inside texts."""
    for number, line in enumerate(io.StringIO(text, newline=None), 1):
        if line.strip():
            where = f"{path}:{number}"
            yield where, _object(where, _value(where, line.rstrip("\n")))


def _array(path: str, text: str, start: int) -> Rows:
    """``[{...}, {...}]``, item by item, so that each is known by its line."""
    decoder = json.JSONDecoder(object_pairs_hook=_unique)
    line, counted, position = 1, 0, _skip_space(text, start + 1)
    if text[position : position + 1] == "]":
        return
    while True:
        line += text.count("\n", counted, position)
        counted, where = position, f"{path}:{line}"
        try:
            item, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise _broken(f"{path}:{error.lineno}", error) from None
        except (ValueError, RecursionError) as error:
            raise _broken(where, error) from None
        yield where, _object(where, item)
        position = _skip_space(text, position)
        closing = text[position : position + 1]
        if closing == "]" and not text[position + 1 :].strip():
            return
        if closing != ",":
            found = "the end of the file" if not closing else repr(text[position : position + 10])
            line += text.count("\n", counted, position)
            raise UserError(
                f"{path}:{line}: broken JSON (expected ',' or the closing ']' of the array, found "
                f"{found}). Mend it."
            )
        position = _skip_space(text, position + 1)


def _skip_space(text: str, position: int) -> int:
    while text[position : position + 1] in {" ", "\t", "\n", "\r"}:
        position += 1
    return position


def _single_object(path: str, text: str) -> list[tuple[str, Row]] | None:
    """A file that is one object: the rows of its ``data`` list if it has one, else its only row.

    What stands beside ``data`` holds for each of its rows. None if several objects follow.
    """
    try:
        whole = json.loads(text, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            return None
        raise _broken(f"{path}:{error.lineno}", error) from None
    except (ValueError, RecursionError) as error:
        raise _broken(f"{path}:1", error) from None
    whole = _object(f"{path}:1", whole)
    if not isinstance(whole.get("data"), list):
        return [(f"{path}:1", whole)]
    shared = {name: value for name, value in whole.items() if name != "data"}
    places = [(f"{path}:data[{i}]", item) for i, item in enumerate(whole["data"])]
    return [(where, shared | _object(where, item)) for where, item in places]


def _value(where: str, line: str) -> Any:
    try:
        return json.loads(line, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _broken(where, error) from None


def _unique(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key '{twice}' occurs twice in one object")
    return row


def _broken(where: str, error: Exception) -> UserError:
    reason = str(error)
    if isinstance(error, json.JSONDecodeError):
        reason = f"{error.msg} at column {error.colno}"
    elif isinstance(error, RecursionError):
        reason = "nested too deeply"
    return UserError(f"{where}: broken JSON ({reason}). Mend it.")


def _object(where: str, value: Any) -> Row:
    if not isinstance(value, dict):
        raise UserError(f"{where}: not a JSON object. Each row is one object.")
    return value


def _delimited(path: str, text: str, delimiter: str) -> Rows:
    csv.field_size_limit(LONGEST_FIELD)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    names: list[str] | None = None
    first_line = 1
    try:
        for fields in reader:
            where = f"{path}:{reader.line_num}"
            if names is None and fields:
                names = _header(where, fields, delimiter)
            elif names is not None and fields:
                if len(fields) != len(names):
                    raise UserError(
                        f"{where}: {len(fields)} fields under {len(names)} columns, in the row "
                        f"that begins in line {first_line}. Quote fields that hold the separator, "
                        "and close every quote."
                    )
                yield where, dict(zip(names, fields, strict=True))
            first_line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"{path}:{reader.line_num}: broken CSV ({error}). The row begins in line {first_line}: "
            "is a quote left unclosed there?"
        ) from None


def _header(where: str, fields: list[str], delimiter: str) -> list[str]:
    names = [name.strip() for name in fields]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{where}: the column '{name}' stands there twice. Rename one.")
    if len(names) == 1 and delimiter == "," and any(mark in names[0] for mark in ";\t|"):
        raise UserError(
            f"{where}: the header is the single column {names[0]!r}. Fields of a .csv are "
            "separated by commas; name a file with tabs .tsv, and convert others."
        )
    return names
