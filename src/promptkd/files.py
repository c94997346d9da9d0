"""Writing files so that they are whole or not there, and JSON lines. No torch."""

import gzip
import json
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from promptkd.errors import UserError, out_of_space


def check_place(path: Path) -> None:
    """Refuse, before any work, a directory that can't be written.

    Raises:
        UserError: naming what stands in the way.
    """
    nearest = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not nearest.is_dir():
        raise UserError(f"{path}: {nearest} is a file, no directory. Choose another output.")
    if not os.access(nearest, os.W_OK):
        raise UserError(f"{path}: {nearest} can't be written to. Choose another output.")


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file, whole or not at all; a file that was there before is replaced.

    Text that is no UTF-8 (half a character, cut by a model) is written with ``?`` in its place.

    Raises:
        UserError: if there is no space; what was there before is kept.
    """
    write_bytes(path, text.encode("utf-8", "replace"))


def write_bytes(path: Path, content: bytes) -> None:
    """The same for bytes."""
    partial = path.with_name(f".writing-{path.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with _space_for(path.name, path.parent, partial):
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)


def write_json(path: Path, content: Any) -> None:
    """Write JSON; numbers that are not finite are a defect of ours, since JSON has none."""
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    write_text(path, text)


def read_json(path: Path, notes: list[str]) -> dict[str, Any] | None:
    """A JSON object; None if the file doesn't exist, or is damaged, which is noted."""
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        notes.append(f"{path} is damaged and not shown.")
        return None
    return content


def write_json_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object a line; compressed if the name ends in .gz."""
    text = "".join(map(json_line, rows))
    if path.suffix == ".gz":
        write_bytes(path, gzip.compress(text.encode("utf-8", "replace"), mtime=0))
    else:
        write_text(path, text)


def append_json_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Add lines to a file that a run keeps writing to; only the last one can be cut by a kill.

    Raises:
        UserError: if there is no space.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        _space_for(path.name, path.parent),
        open(path, "a", encoding="utf-8", errors="replace") as file,
    ):
        file.write("".join(map(json_line, rows)))


def json_line(row: dict[str, Any]) -> str:
    """A row as a line; what ends a line elsewhere (U+2028, say) is escaped or kept inside it."""
    return json.dumps(row, ensure_ascii=False) + "\n"


def read_json_lines(path: Path) -> tuple[dict[int, dict[str, Any]], list[int]]:
    """The objects of a file by line number (from 1), and the numbers of lines that hold none.

    A process that was killed leaves at most its last line unfinished; other damage is somebody
    else's, and what stands around it is still good.
    """
    rows: dict[int, dict[str, Any]] = {}
    damaged: list[int] = []
    content = path.read_bytes()
    if path.suffix == ".gz":
        content = _decompressed(content)
    lines = content.decode("utf-8", "replace").replace("\r\n", "\n").split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            rows[number] = row
        else:
            damaged.append(number)
    return rows, damaged


def _decompressed(content: bytes) -> bytes:
    """What a .gz file holds; a damaged one ends where the damage begins."""
    inflate = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
    try:
        return inflate.decompress(content) + inflate.flush()
    except zlib.error:
        return b"damaged"


@contextmanager
def whole_directory(final: Path, what: str) -> Iterator[Path]:
    """A temporary directory that takes the name ``final`` when all was written, replacing it.

    Raises:
        UserError: if there is no space; the temporary directory is removed, ``final`` is kept.
    """
    temporary = final.parent / f".writing-{final.name}"
    old = final.parent / f".replaced-{final.name}"
    final.parent.mkdir(parents=True, exist_ok=True)
    with _space_for(what, final.parent, temporary):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        yield temporary
        for path in temporary.rglob("*"):
            if path.is_file():
                _sync(path)
        shutil.rmtree(old, ignore_errors=True)
        if final.exists():
            final.rename(old)
        temporary.rename(final)
        _sync(final.parent)
        shutil.rmtree(old, ignore_errors=True)


def recover_replaced(final: Path) -> None:
    """Finish a replacement that was interrupted between its two renames."""
    old = final.parent / f".replaced-{final.name}"
    if old.exists() and not final.exists():
        old.rename(final)


@contextmanager
def _space_for(what: str, place: Path, partial: Path | None = None) -> Iterator[None]:
    """Remove what was half written if anything fails, and say so in a sentence if space is out."""
    try:
        yield
    except BaseException as error:
        if partial is not None and partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        elif partial is not None:
            partial.unlink(missing_ok=True)
        if isinstance(error, Exception) and out_of_space(error):
            free = shutil.disk_usage(place).free / 1e6
            raise UserError(
                f"No space left while writing the {what} ({free:.0f} MB free in {place}). What "
                "was saved before is intact: free some space and run the same command again."
            ) from None
        raise


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
