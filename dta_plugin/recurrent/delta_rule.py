"""Gated delta rules over a prefix tree: the state at a fork goes to every child, and its gradient is their sum.

    state = decay * state;  state += key outer (beta * (value - key @ state));  out = query @ state

`tree_gated_delta_rule` has one decay per head (Qwen3-Next, Qwen3.5), `tree_kda` one per channel of the keys (Kimi
Delta Attention). Both are computed in float32 (float64 for float64) in blocks that never cross a fork: what happens
inside of blocks for all at once, then one batched step per level of blocks, each from its parent's state.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from dta_plugin.dtypes import accumulation_dtype
from dta_plugin.recurrent.blocked import places, to_blocks, to_tokens
from dta_plugin.recurrent.plan import StatePlan
from dta_plugin.upload import upload


def tree_gated_delta_rule(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    plan: StatePlan,
    initial: torch.Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """transformers' chunked gated delta rule on one row.

    Args:
        query, key: [1, T, Hk, Dk]; value: [1, T, Hv, Dv], Hv a multiple of Hk.
        g: [1, T, Hv] logarithms of the decays, at most 0; beta: [1, T, Hv].
        initial: [1, Hv, Dk, Dv] the state that comes in, None for zeros.

    Returns:
        [1, T, Hv, Dv] in the dtype of query, and the states [K, Hv, Dk, Dv] behind `plan.leaves`.
    """
    return _delta_rule(query, key, value, g.unsqueeze(-1), beta, plan, initial, use_qk_l2norm_in_kernel)


def tree_kda(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    plan: StatePlan,
    initial: torch.Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """transformers' chunked Kimi Delta Attention on one row. As above, with Hk = Hv = H and g [1, T, H, Dk]."""
    return _delta_rule(query, key, value, g, beta, plan, initial, use_qk_l2norm_in_kernel)


def _delta_rule(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    plan: StatePlan,
    initial: torch.Tensor | None,
    is_normalised: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """g: [1, T, Hv, 1 or Dk]. Below, C is the size of blocks and G = Hv / Hk; tensors are [B, Hk, 1 or G, C, ...]."""
    device, dtype = query.device, accumulation_dtype(query.dtype)
    per_key, heads = key.shape[2], value.shape[2]
    size = _block_size(plan, key.shape[-1], g.shape[-1] > 1)
    of_keys, of_values = (places(plan, size, count, device) for count in (per_key, heads))
    with torch.autocast(device.type, enabled=False):
        q, k = (to_blocks(x.squeeze(0), of_keys).to(dtype).unsqueeze(2) for x in (query, key))
        v, g, beta = (
            to_blocks(x.squeeze(0), of_values).to(dtype).unflatten(1, (per_key, -1))
            for x in (value, g, beta.unsqueeze(-1))
        )
        if is_normalised:
            q, k = _normalised(q), _normalised(k)
        q = q * q.shape[-1] ** -0.5
        total = g.cumsum(-2)
        since_start, since_token = total.exp(), (total[..., -1:, :] - total).exp()
        queries_keys, keys_keys = _products(q, k, total)
        solved = torch.linalg.solve_triangular(
            keys_keys * beta, torch.cat([v * beta, k * (beta * since_start)], -1), upper=False, unitriangular=True
        )
        known, read = solved.flatten(1, 2).split([v.shape[-1], k.shape[-1]], -1)
        above, leaves = plan.cached(("states", size, device), lambda: _state_rows(plan, size, device))
        came_in = v.new_zeros(1, heads, k.shape[-1], v.shape[-1]) if initial is None else initial.to(dtype)
        decay = since_start[..., -1:, :].transpose(-1, -2).flatten(1, 2)
        behind, written = _Scan.apply(
            came_in, known, read, (k * since_token).flatten(1, 2), decay, above, plan.blocks(size).levels
        )
        inside = queries_keys.flatten(1, 2) @ written
        out = (q * since_start).flatten(1, 2) @ behind.index_select(0, above) + inside
        return to_tokens(out, of_values).to(query.dtype).unsqueeze(0), behind.index_select(0, leaves)


def _block_size(plan: StatePlan, width: int, is_per_channel: bool) -> int:
    """The size whose blocks take least: products inside of a block, of its tokens with states, and states alone."""
    lengths = plan.nodes().length

    def cost(size: int) -> int:
        return int((-(-lengths // size)).sum()) * (size * size + size * (width + 32) + 3 * width * width // 4)

    sizes = (16, 32, 64) if is_per_channel else range(64, 8, -8)
    return plan.cached(("delta rule", width, is_per_channel), lambda: min(sizes, key=cost))


def _state_rows(plan: StatePlan, size: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of the states behind all blocks, of which the first came in: those before every block, and of leaves."""
    blocks = plan.blocks(size)
    above, leaves = upload([blocks.parent + 1, blocks.leaves + 1], device)
    return above, leaves


def _normalised(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6)


def _products(q: torch.Tensor, k: torch.Tensor, total: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys with the keys up to them, decayed since then: two [..., C, C], zero above the diagonal."""
    if total.shape[-1] > 1:
        both = _per_channel(torch.stack([q, k], -3), k, total)
        return both[..., 0, :, :], both[..., 1, :, :]
    later = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool, device=q.device).triu(1)
    decay = (total - total.transpose(-1, -2)).masked_fill(later, -torch.inf).exp()
    return (q @ k.transpose(-1, -2)) * decay, (k @ k.transpose(-1, -2)) * decay


def _per_channel(x: torch.Tensor, k: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """[..., N, C, D] with [..., C, D] -> [..., N, C, C].

    Later and earlier halves meet at the decay up to the border between them, so that no exponent is above 0.
    """
    size = k.shape[-2]
    if size == 1:
        return (x * k.unsqueeze(-3)).sum(-1, keepdim=True)
    half = size // 2
    border = total[..., half - 1 : half, :]
    late = x[..., half:, :] * (total[..., half:, :] - border).exp().unsqueeze(-3)
    early = k[..., :half, :] * (border - total[..., :half, :]).exp()
    across = (late.flatten(-3, -2) @ early.transpose(-1, -2)).unflatten(-2, (-1, half))
    inside = _per_channel(
        x.unflatten(-2, (2, half)).transpose(-3, -4), k.unflatten(-2, (2, half)), total.unflatten(-2, (2, half))
    )
    first, second = inside.unbind(-4)
    return torch.cat([torch.cat([first, torch.zeros_like(first)], -1), torch.cat([across, second], -1)], -2)


class _Scan(torch.autograd.Function):
    """The states behind all blocks, level by level, in one buffer; and what each token writes into the state."""

    @staticmethod
    def forward(
        ctx: Any,
        came_in: torch.Tensor,
        known: torch.Tensor,
        read: torch.Tensor,
        keys: torch.Tensor,
        decay: torch.Tensor,
        above: torch.Tensor,
        levels: list[slice],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """came_in: [1, H, Dk, Dv]; known: [B, H, C, Dv]; read, keys: [B, H, C, Dk]; decay: [B, H, 1 or Dk, 1].

        Returns [1 + B, H, Dk, Dv], the first what came in, and [B, H, C, Dv].
        """
        behind = came_in.new_empty(1 + len(known), *came_in.shape[1:])
        behind[:1] = came_in
        written = known.clone(memory_format=torch.contiguous_format)
        for level in levels:
            before = behind.index_select(0, above[level])
            new, state = written[level], behind[1:][level]
            _flat(new).baddbmm_(_flat(read[level]), _flat(before), alpha=-1)
            torch.mul(before, decay[level], out=state)
            _flat(state).baddbmm_(_flat(keys[level]).mT, _flat(new))
        ctx.save_for_backward(behind, written, read, keys, decay, above)
        ctx.levels = levels
        return behind, written

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_behind: torch.Tensor, d_written: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        behind, written, read, keys, decay, above = ctx.saved_tensors
        d_behind, d_written = d_behind.clone(), d_written.clone()
        for level in reversed(ctx.levels):
            d_state, d_new = d_behind[1:][level], d_written[level]
            _flat(d_new).baddbmm_(_flat(keys[level]), _flat(d_state))
            d_before = d_state * decay[level]
            _flat(d_before).baddbmm_(_flat(read[level]).mT, _flat(d_new), alpha=-1)
            d_behind.index_add_(0, above[level], d_before)
        before, d_states = behind.index_select(0, above), d_behind[1:]
        d_decay = (before * d_states).sum_to_size(decay.shape)
        return d_behind[:1], d_written, (d_written @ before.mT).neg_(), written @ d_states.mT, d_decay, None, None


def _flat(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(0, 1)
