"""Puts engine classes where verl looks for them, or before it takes its own: under this machine's device and vendor."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from verl.utils.device import get_device_name
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.fsdp import transformer_impl

from dta_plugin.adapters.verl_plugin import weighted_loss
from dta_plugin.adapters.verl_plugin.micro_batches import as_planned
from dta_plugin.adapters.verl_plugin.own_forwards import keeping_own_forwards
from dta_plugin.adapters.verl_plugin.run_checks import STRATEGIES

try:
    from verl.utils.device import get_vendor
except ImportError:  # verl 0.8, whose registry has no vendors: an entry for a device takes the place of verl's own
    get_vendor = None


def register(kind: str, engine: type, strategies: Sequence[str] = STRATEGIES) -> None:
    """Put an engine in the place of verl's own for that kind of model, such as "language_model"."""
    if get_vendor is None:
        for strategy in strategies:
            EngineRegistry._engines[kind][strategy][get_device_name()] = engine
    else:
        # As EngineRegistry.get_engine_cls does; the two variables are verl's own.
        device = os.getenv("VERL_ENGINE_DEVICE") or get_device_name()
        vendor = os.getenv("VERL_ENGINE_VENDOR") or get_vendor()
        EngineRegistry.register(kind, list(strategies), device=device, vendor=vendor)(engine)


def extend_functions() -> None:
    """From now on micro-batches follow plans, losses weights, and models keep the forwards that verl replaces."""
    module: Any = transformer_impl
    follow_plans(module)
    module.apply_monkey_patch = keeping_own_forwards(module.apply_monkey_patch)
    weighted_loss.install()


def follow_plans(module: Any) -> None:
    """module: of an engine of verl's, which cuts mini-batches by a function of its own name."""
    module.prepare_micro_batches = as_planned(module.prepare_micro_batches)
