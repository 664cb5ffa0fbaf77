"""No tensor is quantised."""

from __future__ import annotations


class QuantizedTensor: ...
