"""Files and folders -> rows: whatever holds rollouts, recognised by its first bytes, not by its name.

JSONL, JSON arrays; Parquet, Arrow      each also compressed by gzip, bzip2 or xz, twice even
a folder                                its files in natural order: TRL's completion logs, verl's dumps, a data set
                                        that `datasets` saved
-                                       standard input
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from dta_plugin.cli.file_kinds import folder_refused, kind_refused
from dta_plugin.cli.json_rows import Row, json_rows
from dta_plugin.cli.tables import table_kind, table_rows
from dta_plugin.cli.terminal import reason
from dta_plugin.errors import InvalidInputError

_COMPRESSED: dict[bytes, Callable[[Any], Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}
_HEAD = 512  # bytes that say what a file is
_SUFFIXES = (".jsonl", ".json", ".ndjson", ".parquet", ".arrow", ".gz", ".bz2", ".xz")
_ABOUT_DATASET = ("state.json", "dataset_info.json", "dataset_dict.json")


def rows(path: str | Path) -> Iterator[Row]:
    """(file and line, value) of every row. Raises InvalidInputError for what cannot be read, naming file and line."""
    name = str(path)
    try:
        for file in _files_in(Path(path)) if Path(path).is_dir() else [Path(path)]:
            is_input = str(file) == "-"
            name = "standard input" if is_input else str(file)
            with closing(_standard_input() if is_input else file.open("rb")) as stream:
                yield from _rows_of(name, stream, is_array=".json" in file.suffixes)
    except (OSError, ValueError) as error:
        if isinstance(error, InvalidInputError):
            raise
        why = error.strerror if isinstance(error, OSError) and error.strerror else reason(error)
        raise InvalidInputError(f"{name} cannot be read: {why}. Expected a file of rollouts.") from error


def _standard_input() -> io.BufferedReader:
    if sys.stdin is None:
        raise InvalidInputError("standard input is closed. Expected rollouts, as in: dta inspect - < rollouts.jsonl")
    return io.BufferedReader(io.FileIO(sys.stdin.fileno(), closefd=False))


def _rows_of(name: str, stream: io.BufferedReader, is_array: bool) -> Iterator[Row]:
    where = name
    head = stream.peek(32)[:32]
    try:
        while opener := next((opener for magic, opener in _COMPRESSED.items() if head.startswith(magic)), None):
            stream = io.BufferedReader(opener(stream))
            head = stream.peek(32)[:32]
        refusal = kind_refused(name, stream.peek(_HEAD)[:_HEAD])
        if refusal is not None:
            raise InvalidInputError(f"{name} is {refusal}.")
        kind = table_kind(head)
        for where, row in table_rows(name, stream, kind) if kind else json_rows(name, stream, is_array):
            yield where, row
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        place = where if where == name else f"{where}: what follows"
        raise InvalidInputError(f"{place} cannot be decompressed: {reason(error)}. Is it complete?") from error


def _files_in(folder: Path) -> list[Path]:
    """A folder's files of rollouts: step 2 comes before step 10."""
    if refusal := folder_refused(folder):
        raise InvalidInputError(f"{folder} is {refusal}.")
    entries = [entry for entry in folder.iterdir() if not entry.name.startswith((".", "_"))]
    files = [entry for entry in entries if entry.is_file() and _holds_rollouts(entry.name)]
    if files:
        return sorted(files, key=_natural)
    folders = sorted((entry for entry in entries if entry.is_dir()), key=_natural)
    if len(folders) == 1:
        return _files_in(folders[0])
    found = f"the folders {', '.join(entry.name for entry in folders[:8])}; name one" if folders else "none"
    raise InvalidInputError(
        f"{folder} is a folder. Expected files of rollouts ({', '.join(_SUFFIXES)}), found {found}."
    )


def _holds_rollouts(name: str) -> bool:
    is_cache = name.startswith("cache-") and name.endswith(".arrow")  # what `datasets` computed from the others
    return name.lower().endswith(_SUFFIXES) and name not in _ABOUT_DATASET and not is_cache


def _natural(path: Path) -> list[Any]:
    """Digits compare as numbers."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path.name)]
