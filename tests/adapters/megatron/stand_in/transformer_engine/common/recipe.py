"""A name to extend; no fp8 here."""

from __future__ import annotations


class DelayedScaling: ...
