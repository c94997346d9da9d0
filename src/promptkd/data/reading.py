"""Reading every row of what users bring: files, folders, globs, hub data sets, rows of Python."""

import glob
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from promptkd.config import ColumnsSection
from promptkd.data.columns import ColumnReader
from promptkd.data.examples import Example
from promptkd.data.text_files import SUFFIXES, Row, Rows, text_rows
from promptkd.errors import UserError
from promptkd.given import GivenRows, refuse_lost

PLACES = "Give a file, a folder, a glob, or a hub id (owner/name or owner/name:split)"
UNREADABLE = (".arrow", ".bz2", ".feather", ".gz", ".tar", ".tgz", ".xlsx", ".xz", ".zip", ".zst")
"""Data in these forms isn't read; other files of a folder are something else."""
KNOWN = "Use JSONL, JSON, CSV, TSV (each also as .gz) or Parquet."
_SLICE = re.compile(r"[\w.-]+/[\w.-]+:\w+\[[\d:%-]*\]")
"""Of a split on the hub, as ``datasets`` writes it: owner/name:train[:100]."""
_SPLIT = re.compile(
    r"(?<![a-z])(train|validation|valid|val|dev|eval|test)(?:ing|uation)?(?![a-z])", re.IGNORECASE
)
"""In the name of a file, or of a folder that it is in."""


def read_examples(
    sources: Any, columns: ColumnsSection | None = None, teacher_context: str | None = None
) -> list[Example]:
    """Read every row of every source, in order; what isn't read is said on standard error.

    See ``read_noted``.
    """
    examples, notes = read_noted(sources, columns, teacher_context)
    for note in notes:
        print(note, file=sys.stderr)
    return examples


def read_noted(
    sources: Any, columns: ColumnsSection | None = None, teacher_context: str | None = None
) -> tuple[list[Example], list[str]]:
    """The examples of every source, and a sentence for whatever of a source isn't read.

    Args:
        sources: paths, folders, globs, or hub ids (``owner/name`` or ``owner/name:split``); from
            Python also lists of dictionaries, and ``datasets.Dataset``. One of them or several.
        columns: which column is what, where the names aren't known ones.
        teacher_context: the column that only the teacher reads.

    Raises:
        UserError: for a missing or empty source or a broken row, with file and line number.
    """
    examples: list[Example] = []
    notes: list[str] = []
    read: Counter[str] = Counter()
    for source in _each(sources):
        for name, rows in _expand(source, notes):
            place = os.path.realpath(_at_home(name))  # one file has many names
            read[place] += 1
            if read[place] == 2 and not isinstance(source, GivenRows):
                notes.append(f"{name} is read more than once")
            reader = ColumnReader(columns or ColumnsSection(), teacher_context)
            found = [reader.example(row, where) for where, row in rows]
            if not found:
                raise UserError(f"{name} holds no rows. Give a file with at least one request.")
            if unmapped := reader.check_mapping(name):
                notes.append(f"{name} {unmapped}: it is read by its own column names")
            if teacher_context and (without := sum(not e.teacher_context for e in found)):
                notes.append(
                    f"{name}: {without} of {len(found)} rows have no '{teacher_context}', which "
                    "teacher.context names: there the teacher reads the request alone"
                )
            if reader.unread:
                notes.append(f"{name}: {_listed(reader.unread, len(found))} not read")
            examples.extend(found)
    return examples, notes


def _listed(unread: Counter[str], num_rows: int) -> str:
    names = {name: name or "without a name" for name in unread}
    shares = [
        names[name] if count >= num_rows else f"{names[name]} (in {count} of {num_rows} rows)"
        for name, count in unread.items()
    ]
    if len(shares) == 1:
        return f"the column {shares[0]} is"
    return f"the columns {', '.join(shares)} are"


def _each(sources: Any) -> list[Any]:
    """The sources, whether one was given or several."""
    if isinstance(sources, Mapping):
        raise UserError(
            f"The data is a mapping of the splits {', '.join(map(repr, sources))} (a DatasetDict?)"
            f". Give one of them: data[{next(iter(sources), 'train')!r}]."
        )
    if not isinstance(sources, (list, tuple)):
        return [sources]
    if not sources:
        raise UserError("The list of data holds no rows. Give at least one request.")
    return [sources] if isinstance(sources[0], Mapping) else list(sources)


def _expand(source: Any, notes: list[str]) -> Iterator[tuple[str, Rows]]:
    """(name, rows) of each file, folder or data set that a source stands for."""
    if isinstance(source, GivenRows):
        yield source.called, _python_rows(source.thing, source.called)
        return
    if not isinstance(source, (str, Path)):
        yield "the data", _python_rows(source, "the data")
        return
    name = str(source)
    refuse_lost(name)
    path = _at_home(name)
    try:
        path.lstat()
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:  # the latter of what no name can hold, as NUL
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{name[:80]!r} can't be read: {reason}. {PLACES}.") from None
    if path.exists() or not glob.has_magic(name) or _SLICE.fullmatch(name):
        yield name, _rows(path, name, notes)
        return
    paths = sorted(glob.glob(str(path), recursive=True))
    if "**" in name:  # matches folders beside the files in them, which count once
        paths = [found for found in paths if not Path(found).is_dir()]
    if not paths:
        raise UserError(f"No file matches {name}.")
    for found in paths:
        yield found, _rows(Path(found), found, notes)


def given_rows(sources: Any, called: str) -> tuple[str, ...]:
    """Sources as names, of which those of Python's rows carry the rows.

    Args:
        sources: as ``read_noted`` takes them.
        called: the argument that they are, for the messages.

    Raises:
        UserError: for what are no rows.
    """
    each = _each(sources)
    names = [called] if len(each) == 1 else [f"{called}[{i}]" for i in range(len(each))]
    return tuple(map(_named, each, names))


def _named(source: Any, called: str) -> str:
    if isinstance(source, (str, Path)):
        return source if isinstance(source, str) else str(source)
    _refuse_no_rows(source)
    rows = source if hasattr(source, "__len__") else list(source)
    named = GivenRows(f"{len(rows)} rows ({type(source).__name__})", rows)
    named.called = called
    return named


def _refuse_no_rows(source: Any) -> None:
    if isinstance(source, Mapping):
        _each(source)  # refuses it
    if not isinstance(source, Iterable):
        raise UserError(
            f"Data can't be a {type(source).__name__}. Give paths, hub ids, lists of dictionaries "
            "or a datasets.Dataset."
        )


def _python_rows(source: Any, called: str) -> Rows:
    _refuse_no_rows(source)
    plain = source.with_format(None) if hasattr(source, "with_format") else source
    for number, row in enumerate(plain, 1):
        where = f"row {number} of {called}"
        if not isinstance(row, Mapping):
            raise UserError(f"{where} is {row!r:.80}. Give dictionaries of columns.")
        if nameless := [name for name in row if not isinstance(name, str)]:
            raise UserError(
                f"{where} has {row[nameless[0]]!r:.80} under {nameless[0]!r}, which is no column's "
                "name (csv.DictReader puts surplus fields under None). Name or remove it."
            )
        yield where, dict(row)


def _rows(path: Path, name: str, notes: list[str]) -> Rows:
    if not name.strip():
        raise UserError(f"The name of the data is empty. {PLACES}.")
    if path.is_dir():
        return _folder_rows(path, None, notes)
    if path.is_file():
        return _file_rows(path)
    if path.exists():  # a pipe gives its rows once only, and may never give any
        raise UserError(f"{name} is neither a file nor a folder. {PLACES}.")
    if path.is_symlink():
        raise UserError(f"{name} is a link that leads nowhere. {PLACES}.")
    whole, _, split = name.rpartition(":")
    if whole and _at_home(whole).is_dir():
        return _folder_rows(_at_home(whole), split, notes)
    if _format(path) or path.is_absolute() or name.count("/") != 1:
        raise UserError(f"{name} does not exist. {PLACES}.")
    return _hub_rows(name)


def _at_home(name: str) -> Path:
    return Path(os.path.expanduser(name))


def _format(path: Path) -> str | None:
    """The suffix that says how a file is read; None if it isn't one of ours."""
    name = path.name.lower()
    suffix = Path(name.removesuffix(".gz")).suffix
    if suffix in SUFFIXES or (suffix == ".parquet" and not name.endswith(".gz")):
        return suffix
    return None


def _file_rows(path: Path) -> Rows:
    suffix = _format(path)
    if suffix is None:
        raise UserError(f"{path}: the format '{''.join(path.suffixes[-2:])}' is unknown. {KNOWN}")
    try:
        return _parquet_rows(path) if suffix == ".parquet" else text_rows(str(path), suffix)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{path} can't be read: {reason}. Mend or convert it.") from None


def _parquet_rows(path: Path) -> Rows:
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
        rows = table.to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:  # the last of a value
        reason = str(error).partition("\n")[0]
        raise UserError(f"{path} can't be read: {reason}. Mend or convert it.") from None
    return _numbered(str(path), rows)


def _numbered(name: str, rows: Iterable[Any]) -> Rows:
    for number, row in enumerate(rows, 1):
        yield f"{name}:{number}", dict(row)


def _folder_rows(folder: Path, split: str | None, notes: list[str]) -> Rows:
    """A folder of ``save_to_disk``, or one of data files; of several splits, one is read."""
    if any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return _saved_rows(folder, split, notes)
    inside = [
        path
        for path in sorted(folder.rglob("*"))
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    for path in inside:
        if path.suffix.lower() in UNREADABLE and not _format(path):
            raise UserError(
                f"{path} would be left out: promptkd doesn't read '{path.suffix}'. {KNOWN}"
            )
        if path.is_symlink() and not path.is_file():
            raise UserError(
                f"{path} is a link to a folder, or leads nowhere, and would be left out. Name what "
                "it leads to beside the folder, or remove it."
            )
    data = [path for path in inside if path.is_file() and _format(path)]
    if not data:
        raise UserError(
            f"{folder} holds no data: neither JSONL, JSON, CSV, TSV or Parquet files, nor what "
            "datasets' save_to_disk writes. Name another folder, or a file."
        )
    if others := [path.name for path in inside if path.is_file() and not _format(path)]:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        notes.append(f"{folder}: not read: {', '.join(others[:3])}{more}")
    by_split: dict[str, list[Path]] = {}
    for path in data:
        by_split.setdefault(_split_in(path.relative_to(folder)), []).append(path)
    chosen = by_split[_split_of(str(folder), list(by_split), split, notes)]
    return chain.from_iterable(map(_some_rows, chosen))


def _split_in(path: Path) -> str:
    """The split that a file belongs to by its name, else by that of the nearest folder."""
    named = (match[1].lower() for part in reversed(path.parts) if (match := _SPLIT.search(part)))
    return next(named, "")


def _some_rows(path: Path) -> Rows:
    """Those of one file among several, which would be missed."""
    rows = _file_rows(path)
    first = next(rows, None)
    if first is None:
        raise UserError(f"{path} holds no rows. Remove it, or bring it again.")
    yield from chain([first], rows)


def _saved_rows(folder: Path, split: str | None, notes: list[str]) -> Rows:
    import datasets

    try:
        saved = datasets.load_from_disk(str(folder))
    except Exception as error:  # of every kind, as the files may be damaged in any way
        raise UserError(f"{folder} can't be read: {error}. Save it again.") from None
    if isinstance(saved, datasets.DatasetDict):
        name = _split_of(str(folder), [str(key) for key in saved], split, notes)
        return _numbered(f"{folder}:{name}", saved[name])
    if split is not None:
        raise UserError(f"{folder} has no splits, so '{split}' isn't one. Name {folder} alone.")
    return _numbered(str(folder), saved)


def _split_of(name: str, splits: list[str], asked: str | None, notes: list[str]) -> str:
    """The split that was asked for, else the only one, else ``train``; the others are named."""
    known = ", ".join(split or "(files without the name of a split)" for split in splits)
    if asked is None and len(splits) > 1 and "train" not in splits:
        raise UserError(
            f"{name} has the splits {known}. Name one: {name}:{next(filter(None, splits))}."
        )
    split = asked if asked is not None else "train" if "train" in splits else splits[0]
    if split not in splits:
        raise UserError(f"{name} has no split '{split}'; there are: {known}.")
    if asked is None and len(splits) > 1:
        notes.append(f"{name} has the splits {known}: train is read; name another as {name}:SPLIT")
    return split


def _hub_rows(source: str) -> Iterator[tuple[str, Row]]:
    import datasets

    name, _, split = source.partition(":")
    try:
        rows = datasets.load_dataset(name, split=split or "train")
    except Exception as error:  # of every kind: the hub's, the network's, a builder's
        raise UserError(
            f"{source} is neither a file nor a data set that the hub gives ({error}). {PLACES}."
        ) from None
    yield from _numbered(source, rows)
