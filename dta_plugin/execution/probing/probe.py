"""The probe: before its first batch as a tree, a model runs a small forest both ways, as a tree and by its own path.

Whatever a list of model families does not know about, a mask that is built elsewhere, a head that scales its logits, a
layer that looks at its neighbours, shows as a difference that rounding does not explain (comparison.py). Then the tree
is refused, and the message names the first layer that differs, or the head.

Once per model, set of adapters, attention implementation and precision; no gradients, evaluation mode, random numbers
stay as they were.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import PreTrainedModel

from dta_plugin.errors import UnsupportedError
from dta_plugin.execution.memory import budget_kept
from dta_plugin.execution.probing.comparison import Comparison
from dta_plugin.execution.probing.forest import Forest, probe_forest
from dta_plugin.execution.probing.rounding_noise import Gap, rounding_unit
from dta_plugin.execution.ranks import gathered, has_tensor_parallel, is_fsdp, is_zero3, without_reducers
from dta_plugin.models.introspection import causal_lm, evaluation_mode, input_device, wrappings

log = logging.getLogger("dta_plugin")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a probe found. obstacles: per executor, why it may not run, as a sentence, or None if it may.

    gap: log-probs against the model's own, in nats, the largest of all executors. skipped: why nothing was compared.
    has_images: what was compared were rows with images.
    """

    obstacles: dict[str, str | None]
    gap: Gap
    seconds: float
    skipped: str | None = None
    has_images: bool = False

    def __str__(self) -> str:
        on_images = " on images" if self.has_images else ""
        if self.skipped is not None:
            return f"not probed{on_images}: {self.skipped}"
        exact = " and ".join(name for name, obstacle in self.obstacles.items() if obstacle is None)
        refused = [obstacle for obstacle in self.obstacles.values() if obstacle is not None]
        agree = f"probed {exact}{on_images}: log-probs agree to {self.gap.most:.1e} nats ({self.seconds:.2f} s, once)"
        return " ".join([agree] * bool(exact) + [f"Not run: {obstacle}" for obstacle in refused])


# Hooks and modes of a model that is being probed are not for another thread.
_lock = threading.RLock()
# By executor, backend, and what the model is at the moment.
_outcomes: WeakKeyDictionary[PreTrainedModel, dict[tuple[Any, ...], Outcome]] = WeakKeyDictionary()


def probe(
    model: nn.Module,
    executors: Sequence[str],
    backend: str,
    device: torch.device | None = None,
    sample: Callable[[], Forest] | None = None,
    images: int = 0,
) -> dict[str, str | None]:
    """Per executor, why it may not run, as a sentence, or None if it may.

    executors: "packed", "streamed", or, of a model without a head, "decoder". device: where the model computes, None
        for where its input embedding is. sample: makes the forest out of a batch with images, on which a model is
        probed apart from text; None for text. images: in the row that has most; two are probed apart from one.

    Those that were not probed yet are. Ranks whose weights are sharded must all call it, and get the same answers.
    """
    base = causal_lm(model)
    device = device or input_device(base)
    # What FSDP says of its weights' type changes with the first call.
    precision = None if is_fsdp(model) else (rounding_unit(base), base.dtype)
    state = backend, device, base.config._attn_implementation, precision, tuple(_adapters(model)), min(images, 2)
    with _lock:
        known = _outcomes.setdefault(base, {})
        missing = [executor for executor in executors if (executor, state) not in known]
        if missing:
            outcome = replace(_probe(model, base, missing, backend, device, sample), has_images=sample is not None)
            known |= {(executor, state): outcome for executor in missing}
        return {executor: known[executor, state].obstacles[executor] for executor in executors}


def latest_outcome(model: nn.Module) -> Outcome | None:
    """What the last probe of a model found; None if there was none."""
    return next(reversed(_outcomes.get(causal_lm(model), {}).values()), None)


def _adapters(model: nn.Module) -> Iterator[str]:
    for module in wrappings(model):
        active = getattr(module, "active_adapters", None) if hasattr(module, "peft_config") else None
        yield from map(str, active if isinstance(active, (list, tuple)) else ())


def _probe(
    model: nn.Module,
    base: PreTrainedModel,
    executors: Sequence[str],
    backend: str,
    device: torch.device,
    sample: Callable[[], Forest] | None,
) -> Outcome:
    start = time.perf_counter()
    inner = without_reducers(model)
    skipped = _probe_obstacle(inner)
    if skipped is None and sample is not None and is_fsdp(inner):
        skipped = "images, which not all ranks that shard the model need have"
    if skipped is not None:
        return Outcome(dict.fromkeys(executors), Gap(0.0, 0.0), 0.0, skipped)
    try:
        with undisturbed(inner, base, device):
            forest = probe_forest(base) if sample is None else sample()
            comparison = Comparison(inner, base, forest, backend, device)
            obstacles = {executor: _executor_obstacle(comparison, executor) for executor in executors}
    except Exception as error:  # what a model cannot do with the forest, it may do with the user's rows
        why = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
        log.warning("dta: %s is not probed before its first tree (%s)", type(base).__name__, why)
        return Outcome(dict.fromkeys(executors), Gap(0.0, 0.0), 0.0, why)
    if is_fsdp(inner):
        ranks = gathered(inner, obstacles)
        obstacles = {name: next((found for rank in ranks if (found := rank[name])), None) for name in executors}
    return Outcome(obstacles, comparison.worst, time.perf_counter() - start)


@contextmanager
def undisturbed(model: nn.Module, base: PreTrainedModel, device: torch.device) -> Iterator[None]:
    """Whatever runs inside leaves no trace: modes, random numbers, budgets, weights that autocast has cast."""
    devices = [device] if device.type == "cuda" else []
    try:
        with (
            torch.no_grad(),
            evaluation_mode(model),
            torch.random.fork_rng(devices),
            budget_kept(base),
            torch.compiler.set_stance("force_eager"),  # compiled modules see no hooks
        ):
            yield
    finally:
        torch.clear_autocast_cache()


def _probe_obstacle(model: nn.Module) -> str | None:
    if is_zero3(model):
        return "DeepSpeed ZeRO-3 shards the model (FSDP, or ZeRO-1 or 2, can be probed)"
    return "the model is tensor-parallel" if has_tensor_parallel(model) else None


def _executor_obstacle(comparison: Comparison, executor: str) -> str | None:
    """Why an executor may not run, as a sentence for an error."""
    try:
        found = comparison.difference(executor)
    except UnsupportedError as error:
        return error.reason
    if found is None:
        return None
    name = type(comparison.base).__name__
    return (
        f"A tree of {name}, {executor}, differs from the model's own forward {found}. Expected "
        "rounding errors only (probe='off' would train on what differs); report the model with the output of "
        "`dta doctor`, and run without the tree until then."
    )
