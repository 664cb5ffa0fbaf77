"""Norms and linear layers, with tensor and sequence parallelism by Megatron's own collectives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup
from torch.nn import functional as F


def mappings() -> Any:
    """Megatron's, which imports Transformer Engine while it is imported."""
    from megatron.core.tensor_parallel import mappings

    return mappings


def _parameter(shape: Sequence[int], dtype: torch.dtype | None, device: Any, init: Any = None) -> nn.Parameter:
    parameter = nn.Parameter(torch.empty(shape, dtype=dtype, device=device))
    if init is not None:
        init(parameter)
    return parameter


class RMSNorm(nn.Module):
    def __init__(
        self,
        normalized_shape: int | None = None,
        eps: float = 1e-5,
        sequence_parallel: bool = False,
        params_dtype: torch.dtype | None = None,
        zero_centered_gamma: bool = False,
        hidden_size: int | None = None,
        device: Any = "cuda",
    ) -> None:
        super().__init__()
        assert not zero_centered_gamma
        size = hidden_size if normalized_shape is None else normalized_shape  # the name that older releases have
        assert size is not None
        self.eps = eps
        self.weight = _parameter((size,), params_dtype, device, nn.init.ones_)
        vars(self.weight)["sequence_parallel"] = sequence_parallel

    def forward(self, inp: torch.Tensor) -> torch.Tensor:
        return _rms_norm(inp, self.weight, self.eps)


def _rms_norm(inp: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return F.rms_norm(inp.float(), inp.shape[-1:], weight.float(), eps).to(inp.dtype)


class Linear(nn.Module):
    """weight: [out, in], of which tensor-parallel ranks hold rows (`column`) or columns (`row`)."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: ProcessGroup | None = None,
        tp_size: int = 1,
        get_rng_state_tracker: Callable[..., Any] | None = None,
        rng_tracker_name: str | None = None,
        init_method: Callable[..., Any] | None = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        device: Any = "cuda",
        ub_name: str | None = None,
    ) -> None:
        super().__init__()
        assert not fuse_wgrad_accumulation
        self.parallel_mode, self.tp_group = (parallel_mode, tp_group) if tp_size > 1 else (None, None)
        self.tp_size = tp_size
        self.in_features = in_features // tp_size if parallel_mode == "row" else in_features
        self.out_features = out_features // tp_size if parallel_mode == "column" else out_features
        self.sequence_parallel, self.use_bias, self.return_bias = sequence_parallel, bias, return_bias
        self.weight = _parameter((self.out_features, self.in_features), params_dtype, device, init_method)
        self.bias = _parameter((self.out_features,), params_dtype, device, nn.init.zeros_) if bias else None
        sharded = [self.weight] if parallel_mode == "row" or not bias else [self.weight, self.bias]
        for parameter in sharded:
            vars(parameter)["tensor_model_parallel"] = parallel_mode is not None
            vars(parameter)["partition_dim"] = 1 if parallel_mode == "row" else 0
            vars(parameter)["partition_stride"] = 1

    def forward(self, inp: torch.Tensor, is_first_microbatch: bool | None = None) -> Any:
        out = self._product(self._shared(inp))
        if self.bias is None:
            return out
        return (out, self.bias) if self.return_bias else out + self.bias

    def _shared(self, inp: torch.Tensor) -> torch.Tensor:
        """What ranks that have parts of all outputs need of the input."""
        if self.parallel_mode != "column":
            return inp
        gather, copy = mappings().gather_from_sequence_parallel_region, mappings().copy_to_tensor_model_parallel_region
        return (gather if self.sequence_parallel else copy)(inp, group=self.tp_group)

    def _product(self, inp: torch.Tensor) -> torch.Tensor:
        out = F.linear(inp, self.weight)
        if self.parallel_mode != "row":
            return out
        scatter, add = (
            mappings().reduce_scatter_to_sequence_parallel_region,
            mappings().reduce_from_tensor_model_parallel_region,
        )
        return (scatter if self.sequence_parallel else add)(out, group=self.tp_group)


class LayerNormLinear(Linear):
    """A norm, and a linear layer of what it gives.

    LoRA sets `return_layernorm_output`, and `return_layernorm_output_gathered` with sequence parallelism.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        eps: float = 1e-5,
        normalization: str = "LayerNorm",
        return_layernorm_output: bool = False,
        zero_centered_gamma: bool = False,
        **of_linear: Any,
    ) -> None:
        super().__init__(in_features, out_features, **of_linear)
        assert normalization == "RMSNorm" and not return_layernorm_output and not zero_centered_gamma
        self.return_layernorm_output = self.return_layernorm_output_gathered = False
        self.eps = eps
        dtype, device = of_linear["params_dtype"], of_linear["device"]
        self.layer_norm_weight = _parameter((in_features,), dtype, device, nn.init.ones_)
        vars(self.layer_norm_weight)["sequence_parallel"] = self.sequence_parallel

    def forward(self, inp: torch.Tensor, is_first_microbatch: bool | None = None) -> Any:
        normed = _rms_norm(inp, self.layer_norm_weight, self.eps)
        shared = self._shared(normed)
        out = self._product(shared)
        if self.bias is not None and not self.return_bias:
            out = out + self.bias
        found = (out, self.bias) if self.bias is not None and self.return_bias else (out,)
        if self.return_layernorm_output:
            found = (*found, shared if self.return_layernorm_output_gathered else normed)
        return found if len(found) > 1 else out


class GroupedLinear(nn.Module):
    """One linear layer per expert: weight0, weight1, ... Rows of `inp` come expert by expert."""

    def __init__(
        self,
        num_gemms: int,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: ProcessGroup | None = None,
        tp_size: int = 1,
        get_rng_state_tracker: Callable[..., Any] | None = None,
        rng_tracker_name: str | None = None,
        init_method: Callable[..., Any] | None = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        device: Any = "cuda",
        ub_name: str | None = None,
    ) -> None:
        super().__init__()
        assert not bias and tp_size == 1
        self.num_gemms, self.use_bias = num_gemms, bias
        self.in_features, self.out_features = in_features, out_features
        for i in range(num_gemms):
            self.register_parameter(
                f"weight{i}", _parameter((out_features, in_features), params_dtype, device, init_method)
            )

    def forward(self, inp: torch.Tensor, m_splits: list[int], is_first_microbatch: bool | None = None) -> torch.Tensor:
        parts = zip(inp.split(m_splits), (getattr(self, f"weight{i}") for i in range(self.num_gemms)), strict=True)
        return torch.cat([F.linear(rows, weight) for rows, weight in parts])
