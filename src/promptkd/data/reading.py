"""Files of requests, row by row: JSON, CSV, Parquet, folders, hub data sets. No torch."""

import csv
import glob
import gzip
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from promptkd.data.columns import Example, example_of, unread_columns
from promptkd.errors import UserError

Row = dict[str, Any]
Located = tuple[str, Row]
"""A row and where it stands: ``file:line`` in text files, ``file:row`` otherwise."""

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
FORMATS = "JSONL, JSON, CSV, TSV (each also as .gz) or Parquet"


def read_examples(
    sources: Iterable[Any], columns: Mapping[str, str] | None = None
) -> list[Example]:
    """Read every row of every source, in order; see ``read_noted``."""
    return read_noted(sources, columns)[0]


def read_noted(
    sources: Iterable[Any], columns: Mapping[str, str] | None = None
) -> tuple[list[Example], list[str]]:
    """The examples of every source, and a sentence for each source with columns nobody reads.

    Args:
        sources: paths, folders, globs, or hub ids (``owner/name`` or ``owner/name:split``); from
            Python also rows as dictionaries, and ``datasets.Dataset`` objects.
        columns: what a request, response, input, system message or conversation is called there,
            as in ``{"request": "question"}``; names that are known need no entry.

    Raises:
        UserError: for a missing or empty file or a broken row, with file and line number.
    """
    examples: list[Example] = []
    notes = []
    given = list(sources)
    if given and all(isinstance(source, dict) for source in given):
        given = [given]
    for source in given:
        name, rows = _rows_of(source)
        if not rows:
            raise UserError(f"{name} holds no rows. Give a file with at least one request.")
        examples.extend(example_of(row, where, columns or {}) for where, row in rows)
        unread = unread_columns((row for _, row in rows), columns or {})
        if unread:
            notes.append(f"{name}: the columns {', '.join(unread)} are not read")
    return examples, notes


def _rows_of(source: Any) -> tuple[str, list[Located]]:
    if isinstance(source, str):
        rows = [row for path in _expand(source) for row in _read(path)]
        return source, rows
    if isinstance(source, list):
        return "the rows", [(f"row {number}", row) for number, row in enumerate(source, 1)]
    if hasattr(source, "column_names") and hasattr(source, "__getitem__"):
        if isinstance(source.column_names, dict):
            splits = ", ".join(source.column_names)
            raise UserError(f"A DatasetDict has several splits ({splits}). Give one of them.")
        return "the data set", [(f"row {i}", dict(row)) for i, row in enumerate(source, 1)]
    raise UserError(
        f"Data can't be a {type(source).__name__}. Give paths, hub ids, dictionaries or a "
        "datasets.Dataset."
    )


def _expand(source: str) -> list[str]:
    """A path that exists is that path, whatever signs it holds; only then it may be a pattern."""
    if Path(source).exists() or not glob.has_magic(source):
        return [source]
    paths = sorted(glob.glob(source))
    if not paths:
        raise UserError(f"No file matches {source}.")
    return paths


def _read(path: str) -> list[Located]:
    place = Path(path)
    try:
        if place.is_dir():
            return _folder(place)
        if place.is_file():
            return list(_file(place))
    except (ValueError, csv.Error, EOFError, gzip.BadGzipFile, RecursionError) as error:
        raise UserError(f"{path} can't be read: {error}. Mend or convert it.") from None
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror or error}.") from None
    if place.suffix or place.is_absolute() or path.count("/") != 1:
        raise UserError(
            f"{path} does not exist. Give a file, a folder, a glob, or a hub id (owner/name)."
        )
    return list(_hub(path))


def _file(path: Path) -> Iterator[Located]:
    suffix = _suffix(path)
    if suffix in (".jsonl", ".json"):
        yield from _json(path)
    elif suffix in (".csv", ".tsv"):
        yield from _csv(path, "\t" if suffix == ".tsv" else ",")
    elif suffix == ".parquet":
        import pyarrow.parquet

        for number, row in enumerate(pyarrow.parquet.read_table(path).to_pylist(), 1):
            yield f"{path}:{number}", row
    else:
        raise UserError(f"{path}: the format '{path.suffix}' is unknown. Use {FORMATS}.")


def _suffix(path: Path) -> str:
    name = path.with_suffix("") if path.suffix.lower() == ".gz" else path
    return name.suffix.lower()


def _open(path: Path, newline: str | None = None) -> io.TextIOWrapper:
    if path.suffix.lower() == ".gz":
        return io.TextIOWrapper(gzip.open(path), encoding="utf-8-sig", newline=newline)
    return open(path, encoding="utf-8-sig", newline=newline)


def _folder(path: Path) -> list[Located]:
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        import datasets

        saved = datasets.load_from_disk(str(path))
        if isinstance(saved, datasets.DatasetDict):
            if len(saved) > 1 and "train" not in saved:
                raise UserError(
                    f"{path} holds the splits {', '.join(map(str, saved))}. Name one's folder."
                )
            saved = saved["train"] if "train" in saved else next(iter(saved.values()))
        return [(f"{path}:{number}", dict(row)) for number, row in enumerate(saved, 1)]
    files = sorted(file for file in path.iterdir() if _suffix(file) in SUFFIXES)
    if not files:
        raise UserError(f"{path} is a folder without data files. Use {FORMATS}.")
    return [row for file in files for row in _file(file)]


def _json(path: Path) -> Iterator[Located]:
    """Lines of objects, one array of objects, or an object whose ``data`` is such an array."""
    with _open(path) as file:
        text = file.read()
    start = text.lstrip()[:1]
    if start == "[":
        yield from _items(path, text)
        return
    if start == "{" and _suffix(path) == ".json":
        try:
            whole = json.loads(text)
        except json.JSONDecodeError:  # several objects: lines
            whole = None
        if isinstance(whole, dict) and isinstance(whole.get("data"), list):
            for number, row in enumerate(whole["data"], 1):
                yield f"{path}:{number}", _object(row, f"{path}: item {number} of 'data'")
            return
        if isinstance(whole, dict):
            yield f"{path}:1", whole
            return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"{path}:{number}", _object(_parsed(line, path, number), f"{path}:{number}")


def _items(path: Path, text: str) -> Iterator[Located]:
    """The objects of an array, with the lines on which they begin."""
    decoder, position = json.JSONDecoder(), text.index("[") + 1
    line = text.count("\n", 0, position) + 1
    while True:
        begin = len(text) - len(text[position:].lstrip(" \t\r\n,"))
        line += text.count("\n", position, begin)
        if text[begin : begin + 1] == "]":
            return
        try:
            row, end = decoder.raw_decode(text, begin)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{error.lineno}: broken JSON ({error.msg}). Mend it.") from None
        yield f"{path}:{line}", _object(row, f"{path}:{line}")
        line, position = line + text.count("\n", begin, end), end


def _parsed(line: str, path: Path, number: int) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        reason = f"{error.msg} at column {error.colno}"
        raise UserError(f"{path}:{number}: broken JSON ({reason}). Mend it.") from None


def _object(row: Any, where: str) -> Row:
    if not isinstance(row, dict):
        raise UserError(f"{where}: not a JSON object. Each row is one object.")
    return row


def _csv(path: Path, delimiter: str) -> Iterator[Located]:
    """Strict: a quote that isn't closed, a field too many or too few is an error with its line."""
    with _open(path, newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        header: list[str] | None = None
        try:
            for fields in reader:
                where = f"{path}:{reader.line_num}"
                if not fields:
                    continue
                if header is None:
                    header = fields
                    twice = sorted({name for name in header if header.count(name) > 1})
                    if twice:
                        raise UserError(f"{where}: the column {twice[0]!r} stands there twice.")
                    continue
                if len(fields) != len(header):
                    raise UserError(
                        f"{where}: {len(fields)} fields under {len(header)} columns. Quote fields "
                        "that hold the separator, or mend the row."
                    )
                yield where, dict(zip(header, fields, strict=True))
        except csv.Error as error:
            raise UserError(f"{path}:{reader.line_num}: broken CSV ({error}). Mend it.") from None


def _hub(source: str) -> Iterator[Located]:
    import datasets

    name, _, split = source.partition(":")
    try:
        rows = datasets.load_dataset(name, split=split or "train")
    except Exception as error:
        raise UserError(
            f"{source} is neither a file nor a data set that the hub gives ({error}). "
            "Give a path, a folder, a glob, or a hub id (owner/name or owner/name:split)."
        ) from None
    for number, row in enumerate(rows, 1):
        yield f"{source}:{number}", dict(row)  # pyright: ignore[reportArgumentType, reportCallIssue]
