"""Installs the CPU platform and registers the rollout backend; nothing heavy is imported before it is needed."""

from __future__ import annotations

from typing import Any

from dta_plugin.adapters.verl_cpu import platform

ROLLOUT = "hf_cpu"  # actor_rollout_ref.rollout.name


def install() -> None:
    """For this process. Again is no harm."""
    platform.install()

    from verl.workers.rollout.base import _ROLLOUT_REGISTRY
    from verl.workers.rollout.replica import RolloutReplicaRegistry

    _ROLLOUT_REGISTRY[ROLLOUT, "async"] = "dta_plugin.adapters.verl_cpu.rollout.HFRollout"
    RolloutReplicaRegistry.register(ROLLOUT, _load_replica)


def _load_replica() -> Any:
    from dta_plugin.adapters.verl_cpu.rollout import HFReplica

    return HFReplica
