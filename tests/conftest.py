"""Settings of the whole suite: one thread (tiny tensors), hypothesis examples that are the same in every run, and
Triton's CPU interpreter where there is no GPU (Triton reads the variable when it is first imported)."""

from __future__ import annotations

import os

import torch
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

torch.set_num_threads(1)
settings.register_profile("suite", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")
