"""Log-probs and entropies from hidden states and a weight, without [rows, vocabulary] logits of a large batch.

Tile by tile over rows and vocabulary, with an online log-sum-exp in float32 (float64 for float64 models). Up to
`KEEP_BYTES` of logits are kept for the backward pass, which then costs no more matrix products than the naive form;
beyond that the backward pass recomputes them tile by tile.

With z the scaled logits of a row, p = softmax(z), L = logsumexp(z) and H = L - sum(p z):
d log p_t / dz = onehot_t - p and dH/dz = -p (z - L + H).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.autograd.function import once_differentiable

from dta_plugin.dtypes import accumulation_dtype

KEEP_BYTES = 512 * 2**20
_TILE_ROWS = 1024
_TILE_VOCAB = 32768
_CACHE_ELEMENTS = 2**17


@dataclass(frozen=True, slots=True)
class LogitTransform:
    """Raw logits y -> scaled logits z, and the slope dz/dy. temperature: a number, or one per row."""

    scale: float
    softcap: float | None
    temperature: float | torch.Tensor

    def at(self, rows: slice | torch.Tensor) -> LogitTransform:
        """Those of some rows."""
        if not isinstance(self.temperature, torch.Tensor):
            return self
        return LogitTransform(self.scale, self.softcap, self.temperature[rows])

    def apply_(self, y: torch.Tensor) -> torch.Tensor:
        """y -> z, in place."""
        temperature = self._like(y)
        if self.softcap is None:
            factor = self.scale / temperature
            return y if isinstance(factor, float) and factor == 1.0 else y.mul_(factor)
        return y.mul_(self.scale / self.softcap).tanh_().mul_(self.softcap / temperature)

    def slope(self, z: torch.Tensor) -> torch.Tensor | float:
        """dz/dy at z."""
        temperature = self._like(z)
        factor = self.scale / temperature
        return factor if self.softcap is None else factor * (1 - (z * (temperature / self.softcap)) ** 2)

    def _like(self, z: torch.Tensor) -> float | torch.Tensor:
        """The temperature such that it broadcasts with z, [rows] or [rows, columns]."""
        return (
            self.temperature[:, None]
            if isinstance(self.temperature, torch.Tensor) and z.ndim == 2
            else self.temperature
        )


@dataclass(frozen=True, slots=True, eq=False)
class Edges:
    """Edges sorted by row, so that those of a tile of rows are a slice that the CPU knows.

    order: [E] their places in the caller's order. row, target: [E]. starts: where each tile of rows begins, then E.
    """

    order: torch.Tensor
    row: torch.Tensor
    target: torch.Tensor
    starts: list[int]

    @classmethod
    def from_targets(
        cls, targets: torch.Tensor, row_of_edge: torch.Tensor, rows: int, host: np.ndarray | None
    ) -> Edges:
        host = row_of_edge.cpu().numpy() if host is None else host
        tiles = np.bincount(host // _TILE_ROWS, minlength=max(1, -(-rows // _TILE_ROWS)))
        order = row_of_edge.argsort(stable=True)
        return cls(order, row_of_edge[order], targets[order], [0, *tiles.cumsum().tolist()])

    def of_rows(self, r: slice) -> slice:
        """Those of a tile of rows."""
        tile = r.start // _TILE_ROWS
        return slice(self.starts[tile], self.starts[tile + 1])

    def within(self, r: slice, c: slice) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of those: bool, whether the target lies in the columns c, and row and column in the tile, where it does."""
        mine, width = self.of_rows(r), c.stop - c.start
        column = self.target[mine] - c.start
        inside = (column >= 0) & (column < width)
        return inside, self.row[mine] - r.start, column.clamp(0, width - 1)


class TiledLogProbs(torch.autograd.Function):
    """(hidden [R, d], weight [V, d], bias [V]) -> (log-probs [E] in the caller's order, entropies [R])."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, edges: Edges, transform: LogitTransform, returns_entropy: bool):
        accumulate = accumulation_dtype(hidden.dtype)
        rows, vocab = hidden.shape[0], weight.shape[0]
        keep = any(ctx.needs_input_grad) and rows * vocab * accumulate.itemsize <= KEEP_BYTES
        kept: dict[tuple[int, int], torch.Tensor] = {}

        lse = hidden.new_full((rows,), float("-inf"), dtype=accumulate)
        mean_logit = hidden.new_zeros(rows, dtype=accumulate)  # sum of p * z
        chosen = hidden.new_zeros(len(edges.order), dtype=accumulate)  # sorted by row
        for r, c in _tiles(rows, vocab):
            z = transform.at(r).apply_(_raw_logits(hidden, weight, bias, r, c, accumulate))
            tile_lse, tile_mean = _row_statistics(z, returns_entropy)
            new_lse = torch.logaddexp(lse[r], tile_lse)
            if returns_entropy:
                mean_logit[r] = mean_logit[r] * torch.exp(lse[r] - new_lse) + tile_mean * torch.exp(tile_lse - new_lse)
            lse[r] = new_lse
            mine = edges.of_rows(r)
            inside, in_row, in_col = edges.within(r, c)
            chosen[mine] = torch.where(inside, z[in_row, in_col], chosen[mine])
            if keep:
                kept[r.start, c.start] = z

        entropy = lse - mean_logit
        ctx.save_for_backward(hidden, weight, bias, lse, entropy)
        ctx.edges, ctx.transform, ctx.kept = edges, transform, kept
        ctx.set_materialize_grads(False)
        return torch.empty_like(chosen).index_copy_(0, edges.order, chosen - lse[edges.row]), entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprobs, grad_entropy):
        hidden, weight, bias, lse, entropy = ctx.saved_tensors
        edges: Edges = ctx.edges
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        accumulate = lse.dtype
        grad_hidden = torch.zeros_like(hidden, dtype=accumulate) if wants_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=accumulate) if wants_weight else None
        grad_bias = torch.zeros_like(bias, dtype=accumulate) if wants_bias and bias is not None else None
        grad_chosen = lse.new_zeros(len(edges.order)) if grad_logprobs is None else grad_logprobs[edges.order]
        row_grad = torch.zeros_like(lse).index_add_(0, edges.row, grad_chosen)

        kept, ctx.kept = ctx.kept, {}  # consumed in place below; a second backward pass recomputes
        for r, c in _tiles(hidden.shape[0], weight.shape[0]):
            z = kept.pop((r.start, c.start), None)
            transform = ctx.transform.at(r)
            if z is None:
                z = transform.apply_(_raw_logits(hidden, weight, bias, r, c, accumulate))
            inside, in_row, in_col = edges.within(r, c)
            at_edges = grad_chosen[edges.of_rows(r)] * transform.at(in_row).slope(z[in_row, in_col])
            row_entropy_grad = None if grad_entropy is None else grad_entropy[r]
            _gradient_(z, lse[r], row_grad[r], row_entropy_grad, entropy[r], transform)
            z.index_put_((in_row, in_col), at_edges.masked_fill(~inside, 0), accumulate=True)
            grad = z.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[r] += grad @ weight[c]
            if grad_weight is not None:
                grad_weight[c] += grad.mT @ hidden[r]
            if grad_bias is not None:
                grad_bias[c] += grad.sum(dim=0, dtype=accumulate)
        grads = (None if g is None else g.to(hidden.dtype) for g in (grad_hidden, grad_weight, grad_bias))
        return *grads, None, None, None


def row_tiles(rows: int) -> Iterator[slice]:
    for start in range(0, rows, _TILE_ROWS):
        yield slice(start, min(start + _TILE_ROWS, rows))


def _tiles(rows: int, vocab: int) -> Iterator[tuple[slice, slice]]:
    for r in row_tiles(rows):
        for c in range(0, vocab, _TILE_VOCAB):
            yield r, slice(c, min(c + _TILE_VOCAB, vocab))


def _row_statistics(z: torch.Tensor, returns_mean: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-sum-exp of each row of z [rows, columns], and the mean of z under its softmax (zeros unless asked for)."""
    lse, mean = z.new_empty(len(z)), z.new_zeros(len(z))
    for rows in _cache_blocks(z):
        block = z[rows]
        top = block.amax(dim=-1, keepdim=True)
        exp = (block - top).exp_()
        total = exp.sum(dim=-1)
        lse[rows] = top[:, 0] + total.log()
        if returns_mean:
            mean[rows] = exp.mul_(block).sum(dim=-1) / total
    return lse, mean


def _gradient_(
    z: torch.Tensor,
    lse: torch.Tensor,
    logprob_grad: torch.Tensor,
    entropy_grad: torch.Tensor | None,
    entropy: torch.Tensor,
    transform: LogitTransform,
) -> None:
    """z [rows, columns] -> d(loss)/d(raw logits) of everything but the chosen logits, in place."""
    for rows in _cache_blocks(z):
        slope = transform.at(rows).slope(z[rows])
        log_p = z[rows].sub_(lse[rows, None])
        factor = -logprob_grad[rows, None]
        if entropy_grad is not None:
            factor = factor - entropy_grad[rows, None] * (log_p + entropy[rows, None])
        log_p.exp_().mul_(factor * slope)


def _cache_blocks(z: torch.Tensor) -> Iterator[slice]:
    """Rows of z in blocks that stay in a CPU's cache over several passes; all at once on other devices."""
    step = max(1, _CACHE_ELEMENTS // max(1, z.shape[1])) if z.device.type == "cpu" else max(1, len(z))
    for start in range(0, len(z), step):
        yield slice(start, start + step)


def _raw_logits(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, r: slice, c: slice, dtype: torch.dtype
) -> torch.Tensor:
    """A fresh [rows, columns] tile of unscaled logits."""
    return torch.nn.functional.linear(hidden[r], weight[c], None if bias is None else bias[c]).to(dtype)
