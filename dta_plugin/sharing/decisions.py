"""Whether a call of a decoder that shares prefixes runs as one tree: its rows, or why it takes the model's own path.

And what to say of one that did, and of one that should not have been begun.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from dta_plugin.config import TreeConfig
from dta_plugin.decline import Decline, decline
from dta_plugin.errors import UnsupportedError
from dta_plugin.execution.probing.probe import probe
from dta_plugin.execution.ranks import is_fsdp
from dta_plugin.models.indexers import index_length_obstacle
from dta_plugin.models.introspection import model_cost
from dta_plugin.models.rotary import padded_length_obstacle
from dta_plugin.models.support import dropout_obstacle
from dta_plugin.sharing.padded import PaddedBatch
from dta_plugin.tree.cost import estimate
from dta_plugin.tree.report import TreeReport


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a decoder. arguments: by name. The last three: see `PrefixSharing`."""

    decoder: PreTrainedModel
    arguments: dict[str, Any]
    config: TreeConfig
    padding_reader: str | None
    reads_caches: bool
    callers_obstacle: Callable[[PreTrainedModel], str | None] | None

    def decided(self) -> PaddedBatch | Decline:
        """The rows as a tree, or why not. Raises UnsupportedError where that is what `on_unsupported` says."""
        batch = self._passing_obstacle() or self._outputs() or self._merged()
        if isinstance(batch, Decline):
            return batch
        return self._padding(batch) or self._gate(batch) or self._images(batch) or self._probe(batch) or batch

    def _passing_obstacle(self) -> Decline | None:
        """What of the model or its caller may change from call to call."""
        ids = self.arguments.get("input_ids")
        width = 0 if ids is None else ids.shape[1]
        obstacle = dropout_obstacle(self.decoder) or padded_length_obstacle(self.decoder, width)
        obstacle = obstacle or index_length_obstacle(self.decoder, [width])
        if obstacle is None and self.callers_obstacle is not None:
            obstacle = self.callers_obstacle(self.decoder)
        return None if obstacle is None else decline(obstacle, self.config.on_unsupported)

    def _outputs(self) -> Decline | None:
        """What the model's config asks for besides hidden states."""
        config = self.decoder.config
        may_decode = self.reads_caches and not (self.decoder.training and torch.is_grad_enabled())
        if may_decode and getattr(config, "use_cache", True) and self.arguments.get("use_cache") is None:
            return Decline("the config's use_cache makes it return a cache; pass use_cache=False")
        outputs = ("output_attentions", "output_hidden_states")
        return next((Decline(f"the config's {name} is on") for name in outputs if getattr(config, name, False)), None)

    def _merged(self) -> PaddedBatch | Decline:
        try:
            return PaddedBatch.from_arguments(self.arguments, self.decoder)
        except UnsupportedError as error:
            return decline(error, self.config.on_unsupported)

    def _padding(self, batch: PaddedBatch) -> Decline | None:
        if self.padding_reader is None or not bool((batch.index < 0).any()):
            return None
        return Decline(f"its rows are padded, and {self.padding_reader}")

    def _gate(self, batch: PaddedBatch) -> Decline | None:
        least = self.config.min_saving
        saving = estimate(batch.tree, model_cost(self.decoder), 0, 0).saving if least else 0.0
        if saving >= least:
            return None
        # The number in it differs from call to call.
        return Decline(f"only {saving:.0%} of dense FLOPs saved, min_saving {least:.0%}", "min_saving")

    def _images(self, batch: PaddedBatch) -> Decline | None:
        has_sharded_tower = batch.images is not None and is_fsdp(self.decoder)
        return Decline("it has images, whose tower FSDP shards") if has_sharded_tower else None

    def _probe(self, batch: PaddedBatch) -> Decline | None:
        """Why the decoder's first tree, of a small forest, or its first with an image, is not exact."""
        # Weights that are sharded are being gathered for this very call.
        if self.config.probe == "off" or is_fsdp(self.decoder):
            return None
        sample = None if batch.images is None else functools.partial(batch.forest, self.decoder)
        images = 0 if batch.images is None else batch.images.most_per_row
        obstacle = probe(self.decoder, ["decoder"], self.config.backend, sample=sample, images=images)["decoder"]
        return None if obstacle is None else decline(obstacle, self.config.on_unsupported)


def found_too_late(decoder: PreTrainedModel, config: TreeConfig, error: UnsupportedError) -> UnsupportedError:
    """The error of a call that is past falling back, with what would have kept it from being a tree."""
    wanted = {"on_unsupported": "dense", "probe": "auto"}
    missing = [f"{name}={value!r}" for name, value in wanted.items() if getattr(config, name) != value]
    way = f"{' with '.join(missing)}, which falls back before the first tree"
    if config.probe == "auto" or is_fsdp(decoder):  # a probe has not found it, or would not run
        way = "remove() the handle that share_prefixes returned"
    reason = error.reason.removesuffix(".")
    return UnsupportedError(f"Prefix-tree execution is not exact here: {reason}; or {way}.", reason)


def report_of(decoder: PreTrainedModel, batch: PaddedBatch, backend: str) -> TreeReport:
    """What a call shared."""
    cost = estimate(batch.tree, model_cost(decoder), 0, 0)
    return TreeReport(
        tree=batch.tree,
        chunks=1,
        executor="packed",
        backend=backend,
        reason=f"{cost.saving:.0%} of the decoder's dense FLOPs saved",
        cost=cost,
    )
