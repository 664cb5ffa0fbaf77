"""fp8 is off."""

from __future__ import annotations

from contextlib import AbstractContextManager


class FP8GlobalStateManager:
    @staticmethod
    def is_fp8_enabled() -> bool:
        return False


def fp8_autocast(enabled: bool) -> AbstractContextManager[None]:
    raise NotImplementedError("of fp8")


def fp8_model_init(enabled: bool) -> AbstractContextManager[None]:
    raise NotImplementedError("of fp8")
