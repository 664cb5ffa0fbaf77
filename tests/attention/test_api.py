"""Which backend serves which inputs."""

from __future__ import annotations

import pytest
import torch

from dta_plugin import InvalidInputError
from dta_plugin.attention import api
from dta_plugin.attention.api import resolve_backend

CUDA = torch.device("cuda")


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that claims to have one, with Triton."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "H200")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(api, "find_spec", lambda name: name)


def test_cpu() -> None:
    for dtype in (torch.float64, torch.bfloat16):
        assert resolve_backend("auto", torch.device("cpu"), dtype, (40, 512)) == "cpu"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("head_dims", [(16, 16), (64, 64), (96, 96), (192, 128), (256, 256), (512, 512)])
def test_nvidia_gpu(hopper: None, dtype: torch.dtype, head_dims: tuple[int, int]) -> None:
    assert resolve_backend("auto", CUDA, dtype, head_dims) == "triton"
    assert resolve_backend("triton", CUDA, dtype, head_dims) == "triton"
    assert resolve_backend("flex", CUDA, dtype, head_dims) == "flex"


@pytest.mark.parametrize(
    "dtype,head_dims,reason",
    [
        (torch.float64, (64, 64), r"torch.float64 and the kernels serve float16"),
        (torch.bfloat16, (576, 512), r"head dim is 576 .* multiples of 16 up to 512"),
        (torch.bfloat16, (64, 72), r"head dim is 72"),
    ],
)
def test_what_the_kernels_do_not_serve(
    hopper: None, dtype: torch.dtype, head_dims: tuple[int, int], reason: str
) -> None:
    assert resolve_backend("auto", CUDA, dtype, head_dims) == "flex"
    with pytest.raises(InvalidInputError, match=reason + r".*Use backend='auto'"):
        resolve_backend("triton", CUDA, dtype, head_dims)


def refused(match: str) -> None:
    assert resolve_backend("auto", CUDA, torch.bfloat16, (64, 64)) == "flex"
    with pytest.raises(InvalidInputError, match=match):
        resolve_backend("triton", CUDA, torch.bfloat16, (64, 64))


def test_wide_float32_heads_where_shared_memory_is_small(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))
    assert resolve_backend("auto", CUDA, torch.bfloat16, (512, 512)) == "triton"
    assert resolve_backend("auto", CUDA, torch.float32, (512, 512)) == "flex"
    with pytest.raises(InvalidInputError, match=r"head dim is 512 .* up to 256"):
        resolve_backend("triton", CUDA, torch.float32, (512, 512))


def test_old_gpus(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    refused(r"capability \(7, 5\) and the kernels need \(8, 0\)")


def test_amd_gpus(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.0")
    refused(r"need an NVIDIA GPU")


def test_without_triton(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "find_spec", lambda name: None)
    refused(r"Triton is not installed \(pip install triton\)")


def test_cpu_path_on_a_gpu() -> None:
    with pytest.raises(InvalidInputError, match=r"backend='cpu' with tensors on cuda. Use backend='auto'"):
        resolve_backend("cpu", CUDA, torch.bfloat16, (64, 64))
