"""Which key tiles each query tile visits, and the other way round: the schedule of the GPU kernels.

Made once per tree with vectorised torch code on the tree's device, shared by all layers, the forward and the backward
pass. Pairs of tiles in which every pair of tokens is visible ("full") are listed apart from those that need the mask;
pairs of tiles without a visible pair are not listed at all (with a window: tiles that its depth range rules out).

In depth-first layout the queries that see a key tile ``[k0, k1)`` are the one interval ``[k0, max exit)``, so the
pairs follow from a maximum per tile, without looking at pairs of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# A key tile is cut where its work exceeds this share of what one multiprocessor would do under a perfectly even split,
# but never below the fewest visits, which pay for loading the keys and for the reduction.
_SHARE_OF_FAIR_LOAD = 1 / 8
_FEWEST_VISITS = 8


@dataclass(frozen=True, slots=True, eq=False)
class TilePairs:
    """All pairs of tiles with visible pairs, sorted by key tile, then query tile. [P] each: int64, int64, bool."""

    query: torch.Tensor
    key: torch.Tensor
    full: torch.Tensor


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


def tile_pairs(
    exit: torch.Tensor, depth: torch.Tensor, window: int | None, query_tile: int, key_tile: int, first_query: int = 0
) -> TilePairs:
    """Pairs of tiles to compute. exit, depth: int64 [N] of the keys; queries are tokens first_query..N - 1."""
    keys, device = len(exit), exit.device
    key_start = torch.arange(0, keys, key_tile, device=device)
    last_exit, first_exit = _largest(exit, key_tile), _smallest(exit, key_tile)
    begin = (key_start - first_query).clamp(min=0) // query_tile
    end = torch.maximum((last_exit - first_query + query_tile - 1) // query_tile, begin)
    counts = end - begin
    key = torch.repeat_interleave(torch.arange(len(key_start), device=device), counts)
    query = torch.arange(len(key), device=device) + (begin - counts.cumsum(0) + counts)[key]

    query_first = first_query + query * query_tile
    query_stop = query_first + query_tile
    key_stop = (key + 1) * key_tile
    full = (query_first >= key_stop - 1) & (query_stop <= first_exit[key]) & (key_stop <= keys)
    if window is not None:
        query_depth = depth[first_query:]
        farthest = _largest(query_depth, query_tile)[query] - _smallest(depth, key_tile)[key]
        nearest = _smallest(query_depth, query_tile)[query] - _largest(depth, key_tile)[key]
        full &= farthest < window
        near = nearest < window
        query, key, full = query[near], key[near], full[near]
    return TilePairs(query, key, full)


def visits(row: torch.Tensor, column: torch.Tensor, full: torch.Tensor, rows: int) -> Visits:
    """Group pairs [P] by `row`, full ones first, columns in ascending order within (pairs come sorted by column)."""
    order = (2 * row + ~full).int().argsort(stable=True)
    start = torch.zeros(rows + 1, dtype=torch.int64, device=row.device)
    start[1:] = torch.bincount(row, minlength=rows).cumsum(0)
    masked = start[:-1] + torch.bincount(row[full], minlength=rows)
    return Visits(
        start=start.int(),
        masked=masked.int(),
        column=torch.nn.functional.pad(column[order], (0, 1)).int(),
        order=start.diff().argsort(descending=True, stable=True).int(),
    )


def key_work(by_key: Visits, groups: int, kv_heads: int, processors: int) -> KeyWork:
    """Cut the work of long key tiles, so that `processors` multiprocessors are busy to the end.

    groups: query heads per key/value head. kv_heads: how often the whole list is run, once per head.
    """
    lengths = by_key.start.diff().long() * groups
    fair = int(lengths.sum()) * kv_heads / processors
    limit = max(_FEWEST_VISITS, int(fair * _SHARE_OF_FAIR_LOAD))
    pieces = ((lengths + limit - 1) // limit).clamp(min=1)
    first = pieces.cumsum(0) - pieces
    tile = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), pieces)
    part = torch.arange(len(tile), device=lengths.device) - first[tile]
    begin = lengths[tile] * part // pieces[tile]
    end = lengths[tile] * (part + 1) // pieces[tile]
    is_split = pieces[tile] > 1
    slot = torch.where(is_split, is_split.cumsum(0) - 1, -1)
    order = (end - begin).argsort(descending=True, stable=True)
    split_tile = (pieces > 1).nonzero()[:, 0]
    split_start = torch.nn.functional.pad(pieces[split_tile].cumsum(0), (1, 0))
    return KeyWork(
        tile=tile[order].int(),
        begin=begin[order].int(),
        end=end[order].int(),
        slot=slot[order].int(),
        split_tile=split_tile.int(),
        split_start=split_start.int(),
        slots=int(split_start[-1]),
    )


def _largest(values: torch.Tensor, tile: int) -> torch.Tensor:
    """[tiles] maximum of each tile of int64 [N]."""
    return _padded(values, tile, values.min()).amax(dim=1)


def _smallest(values: torch.Tensor, tile: int) -> torch.Tensor:
    return _padded(values, tile, values.max()).amin(dim=1)


def _padded(values: torch.Tensor, tile: int, filler: torch.Tensor) -> torch.Tensor:
    """[tiles, tile]"""
    return torch.cat([values, filler.expand(-len(values) % tile)]).view(-1, tile)
