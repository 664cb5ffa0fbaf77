"""JSON text -> rows: a value per line (JSONL), or an array, or values over several lines; UTF-8, UTF-16 or UTF-32.

Nothing is read further than the rows that are asked for, and no value may be longer than MAX_VALUE characters.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from typing import Any, TextIO

from dta_plugin.cli.file_kinds import READ
from dta_plugin.errors import InvalidInputError

Row = tuple[str, Any]  # (where: file and line, value)

MAX_VALUE = 1 << 26  # characters; a million token ids have 8 million
_CHUNK = 1 << 16
_BLANK = " \t\r\n\ufeff"
_GAP = re.compile(f"[{_BLANK},]*")
_TAIL = 16  # an error so close to the end of what was read may come from where reading stopped


def json_rows(name: str, stream: io.BufferedReader, is_array: bool) -> Iterator[Row]:
    """The rows of `name`, whose bytes are `stream`.

    is_array: whether lists within a list on the first line are rollouts of their own (.json) or one row (.jsonl).
    """
    encoding = json.detect_encoding(stream.peek(4)[:4])
    # Halves of surrogate pairs are read, as they are where JSON escapes them; what is not UTF-8 is found line by line.
    file = io.TextIOWrapper(stream, encoding, errors="surrogateescape" if "8" in encoding else "surrogatepass")
    line, is_first = 0, True
    try:
        for line, text in enumerate(iter(lambda: file.readline(MAX_VALUE + 1), ""), 1):
            where = f"{name}, line {line}"
            _check_encoding(text, file, where)
            value = text.strip(_BLANK)
            if not value:
                continue
            if is_first and _goes_on(value, len(text)):
                yield from _array_or_row(_values(name, file, text, line), value)
                return
            row = _parse(value, where)
            if is_first and isinstance(row, list) and _holds_rows(row, is_array):
                yield from ((f"{where}, element {number}", item) for number, item in enumerate(row, 1))
            else:
                yield where, row
            is_first = False
    except UnicodeDecodeError as error:
        raise InvalidInputError(
            f"{name} is not {encoding} from line {line + 1} on: {error.reason}. Expected {READ}, whole, in UTF-8 or "
            "UTF-16."
        ) from error
    finally:
        file.detach()


def _check_encoding(text: str, file: TextIO, where: str) -> None:
    if text.isascii() or file.errors == "surrogatepass":
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        byte = ord(text[error.start]) & 0xFF
        raise InvalidInputError(
            f"{where} is not UTF-8: byte 0x{byte:02x} at character {error.start + 1}. Expected {READ}; JSON in UTF-8 "
            "or UTF-16; text of another encoding: iconv -f latin1 -t utf8."
        ) from error


def _goes_on(value: str, length: int) -> bool:
    """Whether the first line begins a value that does not end on it."""
    if value[0] not in "[{":
        return False
    if length > MAX_VALUE:
        return value[0] == "["
    try:
        json.loads(value)
    except json.JSONDecodeError as error:
        return error.pos >= len(value)
    except (ValueError, RecursionError):
        return False
    return False


def _parse(value: str, where: str) -> Any:
    if len(value) > MAX_VALUE:
        raise _too_long(where)
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise InvalidInputError(
            f"{where} is not JSON: {error}. Expected {READ}; in JSONL, one JSON value per line.{_python_hint(value)}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise _unusable(where, error) from error


def _python_hint(value: str) -> str:
    is_python = value.startswith(("{'", "[{'", "['"))
    return " This looks like Python's repr: write rows by json.dumps." if is_python else ""


def _holds_rows(row: list[Any], is_array: bool) -> bool:
    """Whether a list is an array of rows: not one rollout's token ids, nor one rollout's messages."""
    if is_array and any(isinstance(item, list) for item in row):
        return True
    return any(isinstance(item, dict) and not _is_message(item) for item in row)


def _is_message(item: Any) -> bool:
    return isinstance(item, dict) and bool({"role", "from"} & item.keys())


def _array_or_row(values: Iterator[Row], beginning: str) -> Iterator[Row]:
    """The values; those of an array of messages or token ids are one row."""
    first = next(values, None)
    if first is None:
        return
    where, value = first
    if beginning.startswith("[") and (_is_message(value) or type(value) is int):
        yield where, [value, *(item for _, item in values)]
    else:
        yield first
        yield from values


def _values(name: str, file: TextIO, buffer: str, line: int) -> Iterator[Row]:
    """The elements of an array, or values one after the other, read piece by piece.

    buffer: what has been read; line: that of its beginning.
    """
    decoder, at, number = json.JSONDecoder(), 0, 0
    in_array = buffer.lstrip(_BLANK).startswith("[")
    if in_array:
        at = buffer.index("[") + 1
    has_ended = False
    while True:
        start = _GAP.match(buffer, at).end()  # type: ignore[union-attr]  # it matches the empty string, too
        line += buffer.count("\n", at, start)
        at = start
        where = f"{name}, line {line}, element {number + 1}"
        if in_array and buffer.startswith("]", at):
            if (buffer[at + 1 :] + file.read(_CHUNK)).strip(_BLANK):
                raise InvalidInputError(f"{name}, line {line} goes on after the array's end. Expected one array.")
            return
        if at == len(buffer) and has_ended and not in_array:
            return
        try:
            value, end = decoder.raw_decode(buffer, at)
            is_whole = has_ended or end < len(buffer)  # 12 may be the beginning of 123
        except json.JSONDecodeError as error:
            is_cut = error.pos >= len(buffer) - _TAIL or error.msg.startswith("Unterminated string")
            if has_ended or not is_cut:
                at_line = line + buffer.count("\n", at, error.pos)
                raise InvalidInputError(f"{name}, line {at_line} is not JSON: {error.msg}.") from error
            is_whole = False
        except (ValueError, RecursionError) as error:
            raise _unusable(where, error) from error
        if is_whole:
            number += 1
            yield where, value
            line += buffer.count("\n", at, end)
            at = end
        elif len(buffer) - at > MAX_VALUE:
            raise _too_long(where)
        else:
            more = file.read(max(_CHUNK, len(buffer) - at))
            _check_encoding(more, file, f"{name}, after line {line}")
            buffer, at, has_ended = buffer[at:] + more, 0, not more


def _too_long(where: str) -> InvalidInputError:
    return InvalidInputError(f"{where} is longer than {MAX_VALUE >> 20} Mi characters. Expected one rollout per line.")


def _unusable(where: str, error: Exception) -> InvalidInputError:
    why = "is nested too deeply" if isinstance(error, RecursionError) else f"cannot be read: {error}"
    return InvalidInputError(f"{where} {why}. Expected token ids, texts or messages.")
