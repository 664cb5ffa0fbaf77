"""What stands in for a GPU so that verl's Megatron engine runs on a CPU: tests of trees need its own results.

Installed once a process imports megatron-core, and only where torch finds no GPU. verl's engine, Megatron's model, its
schedules, recomputation, optimizer and collectives (over gloo) are their own. What differs:

- Whatever is put on a GPU stays on the CPU, float32 tensors say that they are CUDA's, and nothing is compiled.
- There is one random state, the CPU's. Dropout must be 0, which RL's is.
- Models are of Megatron's own layers, without Transformer Engine: mbridge asks for that spec and maps its names.
- Their norms serve sequence parallelism, too. Their attention takes packed rows, one after another, and ignores a
  padding mask, as Transformer Engine's causal attention does.

`TRANSFORMER_CONFIG` is what `override_transformer_config` has to hold for them: no fused kernels, which need a GPU.
An engine's `dtype` may be float32, too.
"""

from __future__ import annotations

import copy
import functools
import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch

from dta_plugin.adapters.imports import when_imported

TRANSFORMER_CONFIG = {
    "use_cpu_initialization": True,
    "masked_softmax_fusion": False,
    "bias_activation_fusion": False,
    "bias_dropout_fusion": False,
    "persist_layer_norm": False,
    "gradient_accumulation_fusion": False,
    "moe_grouped_gemm": False,
}
# Names of weights: of Megatron's own layers, and of Transformer Engine's, which mbridge knows. Layers of experts have
# a `pre_mlp_layernorm` in both.
_INPUT_NORM = (r"\.input_layernorm\.weight$", ".self_attention.linear_qkv.layer_norm_weight")
_MLP_NORM = (r"\.pre_mlp_layernorm\.weight$", ".mlp.linear_fc1.layer_norm_weight")
_EXPERT = r"\.experts\.local_experts\.(\d+)\.(linear_fc[12])\.weight$"
_CPU = torch.device("cpu")
_CONSTRUCTORS = ("arange", "empty", "full", "ones", "tensor", "zeros")


def install() -> None:
    """For this process, once it imports megatron-core, if it ever does. On a machine with a GPU nothing changes."""
    if find_spec("megatron") is None or torch.cuda.is_available():
        return
    for name, action in (
        ("megatron.core", _stay_on_the_cpu),
        ("megatron.core.tensor_parallel.random", _one_random_state),
        ("megatron.core.transformer.dot_product_attention", _packed_attention),
        ("megatron.core.transformer.torch_norm", _norms_of_parts),
        ("megatron.core.transformer.moe.moe_utils", _router_without_transformer_engine),
        ("megatron.core.transformer.moe.token_dispatcher", _counts_as_numbers),
        ("mbridge.core.llm_bridge", _own_layers),
        ("mbridge.core.bridge", _names_of_own_layers),
        ("verl.workers.config.engine", _float32),
    ):
        when_imported(name, action)


def _stay_on_the_cpu(_: ModuleType) -> None:
    import torch._dynamo
    from torch.utils._device import _device_constructors

    _device_constructors()  # `with torch.device(...)` goes by these, and looks them up once
    cuda, tensor, functions = (vars(torch)["cuda"], torch.Tensor, vars(torch))
    cuda.current_device = lambda: _CPU
    cuda.synchronize = lambda *_: None
    cuda.Stream, cuda.current_stream, cuda.stream = _Stream, _Stream, nullcontext
    own_type: Any = tensor.type
    patched: Any = tensor
    patched.cuda = lambda self, *_, **__: self
    patched.record_stream = lambda self, _: None
    patched.type = lambda self, *to, **given: _type(own_type(self, *to, **given), not to and not given)
    for name in _CONSTRUCTORS:
        functions[name] = _on_cpu(functions[name])
    torch._dynamo.config.disable = True


def _type(found: Any, is_name: bool) -> Any:
    return found.replace("torch.", "torch.cuda.", 1) if is_name else found


def _on_cpu(constructor: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A function that makes a tensor; where it is told to do so on a GPU, it does so on the CPU."""

    @functools.wraps(constructor)
    def wrapped(*args: Any, device: Any = None, **given: Any) -> torch.Tensor:
        given.pop("pin_memory", None)
        if device is None:
            return constructor(*args, **given)
        on_gpu = torch.device(device).type == "cuda"
        return constructor(*args, device=_CPU if on_gpu else device, **given)

    return wrapped


class _Stream:
    """All there is runs in order."""

    def wait_stream(self, stream: _Stream) -> None: ...
    def record_event(self) -> _Stream:
        return self

    def synchronize(self) -> None: ...


def _one_random_state(module: Any) -> None:
    @contextmanager
    def fork(tracker: Any, *_: Any) -> Iterator[None]:
        yield

    def add(tracker: Any, name: str, *_: Any) -> None:
        tracker.states_[name] = torch.get_rng_state()  # checkpoints have to hold one

    module.CudaRNGStatesTracker.fork = fork
    module.CudaRNGStatesTracker.add = add
    module._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    module._set_cuda_rng_state = lambda *_, **__: None


def _packed_attention(module: Any) -> None:
    own = module.DotProductAttention.forward

    @functools.wraps(own)
    def forward(
        self: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **given: Any
    ) -> torch.Tensor:
        """query, key, value: [s, b, heads, d], or packed [t, heads, d]. -> [s, b, heads * d], or [t, heads * d]."""
        packed = given.pop("packed_seq_params", None)
        if packed is None:
            return own(self, query, key, value, None, **given)
        ends = packed.cu_seqlens_q if packed.cu_seqlens_q_padded is None else packed.cu_seqlens_q_padded
        lengths = ends.diff().tolist()
        rows = zip(*(x.split(lengths) for x in (query, key, value)), strict=True)
        return torch.cat([own(self, *(x.unsqueeze(1) for x in row), None, **given).squeeze(1) for row in rows])

    module.DotProductAttention.forward = forward


def _norms_of_parts(module: Any) -> None:
    """Norms of a part of the tokens: Megatron adds up what ranks find of a parameter that says so."""
    own = module.WrappedTorchNorm.__new__

    def new(cls: type, config: Any, *args: Any, **given: Any) -> torch.nn.Module:
        whole = copy.copy(config)
        whole.sequence_parallel = False
        norm = own(cls, whole, *args, **given)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm

    module.WrappedTorchNorm.__new__ = staticmethod(new)


def _router_without_transformer_engine(module: ModuleType) -> None:
    vars(module).setdefault("te_general_gemm", None)  # which it asks for, and has not defined


def _counts_as_numbers(module: ModuleType) -> None:
    vars(module)["maybe_move_tensor_to_cpu"] = _moved


def _moved(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """Megatron's converts, too, but only what comes from a GPU."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _own_layers(module: Any) -> None:
    spec = module.get_gpt_decoder_block_spec

    @functools.wraps(spec)
    def without_transformer_engine(config: Any, use_transformer_engine: bool, **given: Any) -> Any:
        return spec(config, use_transformer_engine=False, **given)

    assert "vp_stage" in inspect.signature(without_transformer_engine).parameters  # what mbridge looks for
    module.get_gpt_decoder_block_spec = without_transformer_engine


def _names_of_own_layers(module: Any) -> None:
    own = module.Bridge._weight_name_mapping_mcore_local_to_global

    @functools.wraps(own)
    def mapped(self: Any, model: torch.nn.Module, consider_ep: bool = True) -> dict[str, str]:
        """Names of a rank's weights -> Transformer Engine's, with the numbers of layers and, if asked for, experts."""
        experts = getattr(self.config, "num_moe_experts", None) or 0
        first = experts // self.mpu.ep_size * self.mpu.ep_rank if consider_ep else 0
        renamed = (_INPUT_NORM, (_EXPERT, lambda found: f".experts.{found[2]}.weight{int(found[1]) + first}"))
        names = own(self, model, consider_ep)
        for pattern, known in renamed if experts else (_INPUT_NORM, _MLP_NORM):
            names = {local: re.sub(pattern, known, name) for local, name in names.items()}
        return names

    module.Bridge._weight_name_mapping_mcore_local_to_global = mapped


def _float32(module: Any) -> None:
    """verl has a list of types that it allows, of which this is none."""
    own = module.McoreEngineConfig.__post_init__

    @functools.wraps(own)
    def post_init(config: Any) -> None:
        dtype = config.dtype
        if dtype == "float32":
            object.__setattr__(config, "dtype", "bfloat16")
        own(config)
        object.__setattr__(config, "dtype", dtype)

    module.McoreEngineConfig.__post_init__ = post_init
