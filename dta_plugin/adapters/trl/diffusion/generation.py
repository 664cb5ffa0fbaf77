"""Completions from the block sampler, on the training model, where TRL would call `generate`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import distributed, nn

from dta_plugin.adapters.trl.protocols import DiffusionLike
from dta_plugin.diffusion import DiffusionFamily, SampledCompletions, SamplerConfig, predictions, sample
from dta_plugin.training.padding import left_padded


def sampled_completions(
    trainer: DiffusionLike, family: DiffusionFamily, config: SamplerConfig, prompt_ids: list[list[int]]
) -> SampledCompletions:
    """One completion per prompt, drawn with torch's own generator, which TRL seeds per rank.

    DDP is taken off; FSDP gathers a layer's weights in every call, so its ranks call the model equally often.
    """
    from trl.models.utils import disable_gradient_checkpointing

    device = trainer.accelerator.device
    pad = family.mask_token_id if family.pad_token_id is None else family.pad_token_id
    ids, mask = left_padded(prompt_ids, pad)
    model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    with (
        torch.no_grad(),
        disable_gradient_checkpointing(trainer.model, trainer.args.gradient_checkpointing_kwargs),
        trainer.accelerator.autocast(),
        _equally_often(trainer, model, family),
    ):
        return sample(model, family, ids.to(device), mask.to(device), config)


@contextmanager
def _equally_often(trainer: DiffusionLike, model: nn.Module, family: DiffusionFamily) -> Iterator[None]:
    """Ranks whose weights are sharded wait for each other in every call: who is done goes on until all are."""
    if trainer.accelerator.num_processes == 1 or not trainer.is_fsdp_enabled:
        yield
        return
    device = trainer.accelerator.device

    def ranks_at_work(is_at_work: bool) -> int:
        count = torch.tensor(int(is_at_work), device=device)
        distributed.all_reduce(count)
        return int(count)

    announce = model.register_forward_pre_hook(lambda *_: ranks_at_work(True) and None, prepend=True)
    try:
        yield
    finally:
        announce.remove()
    filler = torch.full((1, 2), family.mask_token_id, device=device)
    while ranks_at_work(False):
        predictions(model, family, filler)
