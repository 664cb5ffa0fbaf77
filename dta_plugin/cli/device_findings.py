"""The devices of this machine for `dta doctor`: which attention backend runs there, whether it is right, how fast."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from dta_plugin.cli.findings import Finding

if TYPE_CHECKING:
    import torch


def devices() -> list[Finding]:
    """Each device, the attention backend that "auto" means there for a usual model, and what that is worth."""
    import torch

    from dta_plugin.attention.api import resolve_backend

    threads = torch.get_num_threads()
    found = [("cpu", f"{threads} thread{'' if threads == 1 else 's'}", torch.device("cpu"))]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        size = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        found.append((f"cuda:{index}", size, torch.device("cuda", index)))
    usual = (torch.bfloat16, (128,))
    findings = []
    for name, size, device in found:
        findings.append(Finding(name, size, f"attention backend: {resolve_backend('auto', device, *usual)}"))
        findings += _attention_on(device, has_gpu=len(found) > 1)
    return findings


def _attention_on(device: torch.device, has_gpu: bool) -> Iterator[Finding]:
    """Whether the kernels pass their self-check on a device, and how fast attention is there."""
    from dta_plugin.attention import device_report

    if device.type == "cpu" and has_gpu:
        return
    obstacle = device_report.obstacle(device)
    if obstacle is not None:
        yield Finding("  kernels", "not used", obstacle if device.type == "cuda" else "there is no GPU")
    for check in device_report.checks(device):
        figures = f"{check.error:.2g} off the reference, {check.allowed:.2g} is allowed; {check.seconds * 1e3:.0f} ms"
        what = "kernels passed" if check.problem is None else "kernels failed"
        problem = f"{check.problem}; FlexAttention is used instead"
        yield Finding(f"  {check.kind.dtype}".replace("torch.", ""), what, problem if check.problem else figures)
    try:
        rate = device_report.rate(device, seconds=5.0 if device.type == "cuda" else 0.2)
    except RuntimeError as error:  # no memory left by other programs, or a compiler's failure
        yield Finding("  rate", "not measured", str(error).strip().split("\n")[0])
        return
    yield Finding(
        "  rate",
        f"{rate.forward:.3g} forward, {rate.backward:.3g} backward",
        f"TFLOP/s on visible pairs, {rate.backend}, {rate.dtype}; a large matrix product: {rate.matrix_product:.3g}",
    )
