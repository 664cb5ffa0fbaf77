"""`_balance_batch` of verl's PPO trainers, v1 and v0, with groups kept together and tree cost as weight.

verl balances row by row: it pads the batch up to whole mini-batches (v1), deals rows out to ranks by their lengths, and
so tears almost every group apart. Its own function runs first, with all that it does; then rows are put into another
order by `place_rows`. That decides which rows share an optimizer step, as verl's order did: in v1 roughly the order in
which rollouts came in, in v0 their lengths. Here it is the order in which verl sampled the groups, whatever rows cost.
The rows of a batch, their number per rank and step, advantages (by uid) and what a loss divides by stay verl's.

This happens wherever verl balances: always in v1, whose trainers do not ask `trainer.balance_batch`; in v0 with
`trainer.balance_batch=True`, the default, without which siblings stay together anyway, in the order of the prompts.
`regroup=never` leaves verl's order.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable, MutableMapping
from typing import Any

import torch

from dta_plugin.adapters.verl_plugin.config import KEY, fall_back, tree_config
from dta_plugin.adapters.verl_plugin.groups import UnusableBatch, grouped_rows, uids_of
from dta_plugin.adapters.verl_plugin.protocols import Trainer
from dta_plugin.adapters.verl_plugin.run_checks import critic_obstacle
from dta_plugin.adapters.verl_plugin.upstream import TRAINERS, check_trainer
from dta_plugin.balance.costs import TYPICAL
from dta_plugin.config import TreeConfig
from dta_plugin.errors import UnsupportedError
from dta_plugin.training.notices import Notices
from dta_plugin.training.placement.steps import GroupedRows, Placement, place_rows

# Where verl's own methods come from: Ray puts copies into the classes of its actors, such as FullyAsyncTrainer.
_STOCK = ("verl.", "ray.")


def install() -> None:
    """Extend the trainer classes that have been imported. Call it again when more have been."""
    for module, name in TRAINERS.items():
        trainer = getattr(sys.modules.get(module), name, None)
        if trainer is not None:
            install_in(trainer)


def install_in(trainer: type) -> None:
    """Extend one trainer class: where a subclass of verl's has a `_balance_batch` of its own, our order comes last."""
    stock = getattr(trainer, "_balance_batch", None)
    if stock is None or hasattr(stock, "_dta_stock"):
        return
    trainer._balance_batch = keeping_groups(stock)  # type: ignore[attr-defined]


def uninstall() -> None:
    """Give trainer classes back what they had."""
    for module, name in TRAINERS.items():
        trainer = getattr(sys.modules.get(module), name, None)
        stock = getattr(getattr(trainer, "_balance_batch", None), "_dta_stock", None)
        if trainer is not None and stock is not None:
            trainer._balance_batch = stock


def keeping_groups(balance_batch: Callable[..., Any]) -> Callable[..., Any]:
    """verl's `_balance_batch`, or a trainer's own, followed by our order of rows."""

    @functools.wraps(balance_batch)
    def wrapped(trainer: Trainer, batch: Any, metrics: MutableMapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        config = tree_config(trainer.config.actor_rollout_ref.rollout)
        if config is None or config.regroup == "never":
            _notices(trainer).say_once(
                f"ranks get the rows that verl deals out ({KEY}.use_dta=false, .regroup=never or .diffusion)"
            )
            return balance_batch(trainer, batch, metrics, *args, **kwargs)
        try:
            order = uids_of(batch)
        except UnusableBatch as reason:
            _refuse(trainer, config, reason)
            return balance_batch(trainer, batch, metrics, *args, **kwargs)
        result = balance_batch(trainer, batch, metrics, *args, **kwargs)
        balanced = batch if result is None else result  # v0 reorders in place
        rows = grouped_rows(balanced, order)
        has_dense_critic = getattr(trainer, "use_critic", False) and critic_obstacle(trainer.config) is not None
        beside = TYPICAL if has_dense_critic else None
        placement = place_rows(rows, *_ranks_and_steps(trainer, balanced, len(rows)), beside)
        _reorder(balanced, [row for rank in placement.ranks for row in rank])
        prefix = kwargs.get("logging_prefix", args[0] if args else "global_seqlen")
        metrics.update(_metrics(placement, rows, prefix))
        _describe_once(trainer, placement)
        if not balance_batch.__module__.startswith(_STOCK):
            _notices(trainer).say_once(
                f"{balance_batch.__qualname__} is not verl's own; its order of rows is followed by one that keeps "
                f"groups together (+{KEY}.regroup=never leaves it)"
            )
        return result

    wrapped._dta_stock = balance_batch  # type: ignore[attr-defined]
    return wrapped


def _refuse(trainer: Trainer, config: TreeConfig, reason: UnusableBatch) -> None:
    """Raise UnsupportedError, or say that verl's order stays, as `on_unsupported` says."""
    message = f"siblings cannot be kept together on one rank because of the batch: {reason}"
    if config.on_unsupported == "error":
        raise UnsupportedError(
            f"{message}. With {fall_back(KEY)}, or .regroup=never, ranks get the rows that verl deals out."
        ) from None
    _notices(trainer).say_once(f"{message}; ranks get the rows that verl deals out", "refused", logging.WARNING)


def _ranks_and_steps(trainer: Trainer, batch: Any, rows: int) -> tuple[int, int]:
    """Data-parallel ranks, as the worker group has told verl, and optimizer steps of the actor, as verl counts them.

    A trainer whose sessions give any number of rows may set how many mini-batches there are instead of their size. A
    batch that is not whole mini-batches is one step, as during critic warm-up.
    """
    check_trainer(trainer)
    ranks = max(trainer.actor_rollout_wg._dispatch_info["actor"]) + 1
    config = trainer.config.actor_rollout_ref
    mini_batch = config.actor.ppo_mini_batch_size * config.rollout.n
    settings = getattr(batch, "extra_info", None) or getattr(batch, "meta_info", None) or {}
    steps = int(settings.get("num_mini_batch") or (rows // mini_batch if rows % mini_batch == 0 else 0))
    if steps and rows % (steps * ranks) == 0:
        return ranks, steps
    _notices(trainer).say_once(
        f"{rows} rows are not whole mini-batches of {mini_batch}: they are placed as one optimizer step, and where the "
        "trainer makes several of them, groups may be split",
        "one step",
    )
    return ranks, 1


def _reorder(batch: Any, order: list[int]) -> None:
    batch.reorder(order if hasattr(batch, "tags") else torch.tensor(order))


def _metrics(placement: Placement, rows: GroupedRows, prefix: str) -> dict[str, float]:
    """What verl's logger is to show; verl's own two numbers on the order of rows are those of the order they have now.

    groups_split: in several shares (a rank's part of an optimizer step), so that prefixes are computed repeatedly.
    rank_load_predicted: largest over mean. token_reduction: flat over tree tokens by what siblings share, if all of a
    group meet, and with these shares. The workers' compression_ratio is what ran: less where micro-batches part
    siblings, more where groups have a beginning in common.
    """
    lengths = [sum(rows.lengths[row] for row in rank) for rank in placement.ranks]
    return {
        f"{prefix}/balanced_min": min(lengths),
        f"{prefix}/balanced_max": max(lengths),
        "dta/groups": placement.groups,
        "dta/groups_split": placement.split,
        "dta/rank_load_predicted": placement.imbalance,
        "dta/token_reduction_ideal": placement.flat_tokens / placement.tree_tokens,
        "dta/token_reduction_of_shares": placement.flat_tokens / placement.share_tokens,
    }


def _describe_once(trainer: Trainer, placement: Placement) -> None:
    notices = _notices(trainer)
    notices.say_once(f"the first batch: {placement}", "batch")
    if trainer.config.actor_rollout_ref.actor.get("shuffle", False):
        notices.say_once(
            "actor_rollout_ref.actor.shuffle=True draws mini-batches at random from all rows of a rank, so that few "
            "siblings meet in one. Set it to False to have them share their prefixes in updates too.",
            level=logging.WARNING,
        )


def _notices(trainer: Trainer) -> Notices:
    found: Notices = trainer.__dict__.setdefault("_dta_notices", Notices())
    return found
