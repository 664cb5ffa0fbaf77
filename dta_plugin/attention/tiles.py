"""Which key tiles each query tile visits, and the other way round: the schedule of the GPU kernels.

Made once per tree with numpy on the CPU, which knows the tree first, and sent to the device in one copy that nobody
waits for; shared by all layers, the forward and the backward pass. Pairs of tiles in which every pair of tokens is
visible ("full") are listed apart from those that need the mask; pairs of tiles without a visible pair are not listed at
all (with a window: tiles that its depth range rules out).

In depth-first layout the queries that see a key tile ``[k0, k1)`` are the one interval ``[k0, max exit)``, so the
pairs follow from a maximum per tile, without looking at pairs of tokens. Where blocks attend both ways, the interval
begins with the block that has k0.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import numpy as np
import torch

from dta_plugin.attention.blocks import Blocks
from dta_plugin.errors import InvalidInputError
from dta_plugin.upload import upload

# A key tile is cut where its work exceeds this share of what one multiprocessor would do under a perfectly even split,
# but never below the fewest visits, which pay for loading the keys and for the reduction.
_SHARE_OF_FAIR_LOAD = 1 / 8
_FEWEST_VISITS = 8


@dataclass(frozen=True, slots=True, eq=False)
class TilePairs:
    """All pairs of tiles with visible pairs, sorted by key tile, then query tile. [P] each: int32, int32, bool."""

    query: np.ndarray
    key: np.ndarray
    full: np.ndarray


@dataclass(frozen=True, slots=True, eq=False)
class Visits:
    """For each row tile the column tiles it visits, full ones first; int32 tensors.

    start: [rows + 1] where each row's visits begin in `column`. masked: [rows] where those that need the mask begin.
    column: [P + 1], with one spare entry because the kernels read one ahead. order: [rows] the longest rows first.
    """

    start: torch.Tensor
    masked: torch.Tensor
    column: torch.Tensor
    order: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class KeyWork:
    """Programs of the dK/dV kernel: each takes a stretch of one key tile's visits; int32 tensors, heaviest first.

    A key tile with F full and M masked visits has ``groups * (F + M)`` units of work: the full visits of every query
    head of its group, then the masked ones. tile, begin, end: [programs] key tile and stretch of its units.
    slot: [programs] row of the partial sums, or -1 where the program owns its key tile.
    split_tile, split_start: [splits], [splits + 1] key tiles with several programs, and where their slots begin.
    slots: how many partial sums there are.
    """

    tile: torch.Tensor
    begin: torch.Tensor
    end: torch.Tensor
    slot: torch.Tensor
    split_tile: torch.Tensor
    split_start: torch.Tensor
    slots: int


Lists = TypeVar("Lists", Visits, KeyWork)


def tile_pairs(
    exit: np.ndarray,
    depth: np.ndarray,
    window: int | None,
    query_tile: int,
    key_tile: int,
    first_query: int = 0,
    blocks: Blocks | None = None,
) -> TilePairs:
    """Pairs of tiles to compute. exit, depth: int64 [N] of the keys; queries are tokens first_query..N - 1."""
    keys = len(exit)
    key_start = np.arange(0, keys, key_tile)
    key_stop = key_start + key_tile
    sees_first, sees_last = key_start, key_stop - 1  # the first queries that see a tile's first key, and its last
    if blocks is not None:
        sees_first = np.searchsorted(blocks.reach, key_start, side="right")
        sees_last = np.searchsorted(blocks.reach, key_stop)
    begin = np.maximum(sees_first - first_query, 0) // query_tile
    end = np.maximum(-((first_query - _largest(exit, key_tile)) // query_tile), begin)
    counts = end - begin
    _check_size("pairs of tiles", int(counts.sum()))
    key = np.repeat(np.arange(len(key_start), dtype=np.int32), counts)
    query = np.arange(len(key), dtype=np.int32)
    query += np.repeat((begin - counts.cumsum() + counts).astype(np.int32), counts)

    # Full are the query tiles from the first that sees the key tile's last token up to the first exit of its tokens.
    full_begin = np.clip(-((first_query - sees_last) // query_tile), begin, end)
    full_end = np.clip((_smallest(exit, key_tile) - first_query) // query_tile, full_begin, end)
    full_end = np.where(key_stop <= keys, full_end, full_begin)
    stretches = np.stack([full_begin - begin, full_end - full_begin, end - full_end], axis=1)
    full = np.repeat(np.tile([False, True, False], len(key_start)), stretches.ravel())
    if window is not None:
        query_depth = depth[first_query:]
        farthest = _largest(query_depth, query_tile)[query] - _smallest(depth, key_tile)[key]
        nearest = _smallest(query_depth, query_tile)[query] - _largest(depth, key_tile)[key]
        full &= farthest < window
        near = nearest < window
        if blocks is not None and blocks.is_whole:  # the last key's block goes on among the queries
            last_key = np.minimum(key_stop, keys) - 1
            near |= blocks.reach[last_key][key] > first_query + query * query_tile
        query, key, full = query[near], key[near], full[near]
    return TilePairs(query, key, full)


def visits(row: np.ndarray, column: np.ndarray, full: np.ndarray, rows: int) -> Visits:
    """Group pairs [P] by `row`, full ones first, columns in ascending order within (pairs come sorted by column)."""
    place = 2 * row + ~full
    if 2 * rows <= 2**16:  # numpy sorts these in linear time
        place = place.astype(np.uint16)
    order = place.argsort(kind="stable")
    ends = np.bincount(place, minlength=2 * rows).cumsum()  # of each row's full visits, and of its masked ones
    start = np.concatenate([[0], ends[1::2]])
    return _tensors(
        Visits,
        start=start,
        masked=ends[0::2],
        column=np.append(column[order], 0),
        order=(-np.diff(start)).argsort(kind="stable"),
    )


def key_work(by_key: Visits, groups: int, kv_heads: int, processors: int) -> KeyWork:
    """Cut the work of long key tiles, so that `processors` multiprocessors are busy to the end.

    groups: query heads per key/value head. kv_heads: how often the whole list is run, once per head.
    """
    lengths = np.diff(by_key.start.numpy()).astype(np.int64) * groups
    _check_size("units of one key tile's work", int(lengths.max()))
    fair = int(lengths.sum()) * kv_heads / processors
    limit = max(_FEWEST_VISITS, int(fair * _SHARE_OF_FAIR_LOAD))
    pieces = np.maximum(-(-lengths // limit), 1)
    first = pieces.cumsum() - pieces
    tile = np.repeat(np.arange(len(lengths)), pieces)
    part = np.arange(len(tile)) - first[tile]
    begin = lengths[tile] * part // pieces[tile]
    end = lengths[tile] * (part + 1) // pieces[tile]
    is_split = pieces[tile] > 1
    slot = np.where(is_split, is_split.cumsum() - 1, -1)
    order = (begin - end).argsort(kind="stable")
    split_tile = np.flatnonzero(pieces > 1)
    split_start = np.concatenate([[0], pieces[split_tile].cumsum()])
    return _tensors(
        KeyWork,
        tile=tile[order],
        begin=begin[order],
        end=end[order],
        slot=slot[order],
        split_tile=split_tile,
        split_start=split_start,
        slots=int(split_start[-1]),
    )


def on_device(device: torch.device, *lists: Visits | KeyWork) -> tuple[Any, ...]:
    """The same lists on `device`, all of them in one copy."""
    tensors = [{f.name: x for f in fields(one) if isinstance(x := getattr(one, f.name), torch.Tensor)} for one in lists]
    sent = iter(upload([x.numpy() for named in tensors for x in named.values()], device))
    parts = ({name: next(sent) for name in named} for named in tensors)
    return tuple(replace(one, **part) for one, part in zip(lists, parts, strict=True))  # type: ignore[arg-type]


def _tensors(kind: type[Lists], **values: np.ndarray | int) -> Lists:
    """Arrays as int32 tensors."""
    fields_: dict[str, Any] = {
        name: torch.from_numpy(value.astype(np.int32, copy=False)) if isinstance(value, np.ndarray) else value
        for name, value in values.items()
    }
    return kind(**fields_)


def _check_size(what: str, count: int) -> None:
    if count >= 2**31 - 1:
        raise InvalidInputError(
            f"The tree has {count:,} {what}. Expected fewer than 2**31, which the kernels count; use "
            "executor='streamed', or a smaller max_tree_tokens_per_chunk."
        )


def _largest(values: np.ndarray, tile: int) -> np.ndarray:
    """[tiles] maximum of each tile of int64 [N]."""
    return np.maximum.reduceat(values, np.arange(0, len(values), tile))


def _smallest(values: np.ndarray, tile: int) -> np.ndarray:
    return np.minimum.reduceat(values, np.arange(0, len(values), tile))
