"""Parquet and Arrow files -> rows, a few at a time, by pyarrow where it is installed."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

from dta_plugin.cli.json_rows import Row
from dta_plugin.cli.terminal import reason
from dta_plugin.errors import InvalidInputError

_KINDS = {b"PAR1": "Parquet", b"ARROW1": "Arrow", b"\xff\xff\xff\xff": "Arrow"}
_ROWS = 64  # read at a time


def table_kind(head: bytes) -> str | None:
    """ "Parquet" or "Arrow" for the first bytes of such a file."""
    return next((kind for magic, kind in _KINDS.items() if head.startswith(magic)), None)


def table_rows(name: str, stream: io.BufferedReader, kind: str) -> Iterator[Row]:
    try:
        import pyarrow
    except ImportError as error:
        raise InvalidInputError(f"{name} is a {kind} file, which needs pyarrow. Run: pip install pyarrow") from error
    number = 0
    try:
        for batch in _batches(stream):
            batch.validate(full=True)  # damaged offsets would lead out of its memory
            for start in range(0, batch.num_rows, _ROWS):
                for row in _readable(batch.slice(start, _ROWS)).to_pylist():
                    number += 1
                    yield f"{name}, row {number}", row
    except (pyarrow.ArrowException, OSError, ValueError, ArithmeticError, TypeError) as error:
        raise InvalidInputError(
            f"{name} cannot be read as {kind} after row {number}: {reason(error)}. Is it complete?"
        ) from error


def _readable(batch: Any) -> Any:
    """The batch without dates and times, which Python may not be able to hold, and which no rollout needs."""
    from pyarrow import types

    kept = [index for index, column in enumerate(batch.schema) if not types.is_temporal(column.type)]
    return batch if len(kept) == batch.num_columns else batch.select(kept)


def _batches(stream: io.BufferedReader) -> Iterator[Any]:
    """The record batches of a file; what cannot be sought in, such as a pipe, is read whole."""
    from pyarrow import ipc, parquet

    head = stream.peek(6)[:6]
    source = stream if stream.seekable() else io.BytesIO(stream.read())
    if table_kind(head) == "Parquet":
        yield from parquet.ParquetFile(source).iter_batches(batch_size=_ROWS)
    elif head.startswith(b"ARROW1"):
        reader = ipc.open_file(source)
        yield from (reader.get_batch(index) for index in range(reader.num_record_batches))
    else:
        yield from ipc.open_stream(source)
