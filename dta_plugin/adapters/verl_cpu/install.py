"""Installs the CPU platform and registers the rollout backend; nothing heavy is imported before it is needed."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from dta_plugin.adapters.verl_cpu import megatron

ROLLOUT = "hf_cpu"  # actor_rollout_ref.rollout.name
HAS_PLATFORMS = find_spec("verl.plugin") is not None  # verl has, since 0.9


def install() -> None:
    """For this process. Again is no harm."""
    import_module(f"{__package__}.{'platform' if HAS_PLATFORMS else 'platform_0_8'}").install()
    megatron.install()

    from verl.workers.rollout.base import _ROLLOUT_REGISTRY
    from verl.workers.rollout.replica import RolloutReplicaRegistry

    _ROLLOUT_REGISTRY[ROLLOUT, "async"] = "dta_plugin.adapters.verl_cpu.rollout.HFRollout"
    RolloutReplicaRegistry.register(ROLLOUT, _load_replica)


def _load_replica() -> Any:
    from dta_plugin.adapters.verl_cpu.rollout import HFReplica

    return HFReplica
