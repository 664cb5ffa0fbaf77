"""Names in annotations of Megatron's."""

from __future__ import annotations


class Sequential: ...


class FusibleOperation: ...
