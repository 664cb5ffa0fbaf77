"""Compile the Triton kernels for GPUs that are not there, and read off what they need of a multiprocessor.

The real launch code runs on small CPU tensors under a driver that claims to be a GPU of the wanted generation, and
every launch ends after compilation: signature, alignment and options are exactly those of a launch there. It takes
processes of their own, without TRITON_INTERPRET, which `measure` starts.

    python -m tests.support.offline            print registers, spills and shared memory of every shipped variant
    python -m tests.support.offline --record   and write them to tests/attention/budgets.json
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from tests.support.machine_code import disassemble, loops

BUDGETS = Path(__file__).parents[1] / "attention" / "budgets.json"
WORKERS = 2


@dataclass(frozen=True, slots=True)
class Variant:
    """One specialisation of the kernels.

    features: "plain", "window+sinks", "softcap" or "all". tiles: the fields of the `Launch` that all kernels are to
    take instead of those of the launch table. tokens: length of the row; by default enough that the work of key tiles
    is split, which compiles the reduction.
    """

    arch: int
    dtype: str
    head_dim: int
    features: str = "plain"
    tiles: tuple[int, int, int, int] | None = None
    tokens: int = 2048

    @property
    def name(self) -> str:
        length = "" if self.tokens == 2048 else f" {self.tokens} tokens"
        return f"sm_{self.arch} {self.dtype} {self.head_dim} {self.features}{length}"


@dataclass(frozen=True, slots=True)
class Usage:
    """Of one kernel: registers and spilled bytes per thread, bytes of shared memory per program, columns of Blackwell's
    tensor memory, and the best matrix instruction in it.

    pending: most copies that a loop leaves in flight when it waits for others; 0 means that every copy is waited for at
    once. key: the same for launches that share one compiled kernel.
    Of the worst loop: work: matrix FLOPs over those that the tile needs; exponentials over pairs of the tile; waits for
    products over their number. All 0 in kernels without products.
    """

    registers: int
    spills: int
    shared: int
    columns: int
    instruction: str
    pending: int
    key: str
    work: float = 0.0
    exponentials: float = 0.0
    waits: float = 0.0


Report = dict[str, dict[str, Usage]]

# The kernel of the keys' and values' gradients, where it is launched once for each.
KEYS_ALONE, VALUES_ALONE = "key_gradient_kernel, keys", "key_gradient_kernel, values"
# How many products of tiles a loop has.
PRODUCTS = {
    "forward_kernel": 2,
    "query_gradient_kernel": 3,
    "key_gradient_kernel": 4,
    KEYS_ALONE: 3,
    VALUES_ALONE: 2,
}


def _shipped() -> list[Variant]:
    variants = []
    for arch in (80, 90, 100):
        variants += [Variant(arch, "bfloat16", width) for width in (64, 96, 128, 192, 256)]
        variants += [
            Variant(arch, "bfloat16", width, f) for width in (64, 128, 256) for f in ("window+sinks", "softcap")
        ]
        variants += [Variant(arch, "float16", width) for width in (64, 128)]
        variants += [Variant(arch, "float32", width, f) for width in (64, 128, 256) for f in ("plain", "all")]
        variants += [Variant(arch, "tfloat32", 128)]
        variants += [Variant(arch, dtype, 512) for dtype in ("bfloat16", "float32")]
    for arch in (86, 120):  # tiles as for sm_80, less shared memory
        variants += [Variant(arch, dtype, width) for dtype in ("bfloat16", "tfloat32") for width in (128, 256)]
        variants += [Variant(arch, "bfloat16", 512)]
    return variants


SHIPPED = _shipped()


def measure(variants: Sequence[Variant]) -> Report:
    """What each kernel uses, by the variant's name and the kernel's."""
    with tempfile.TemporaryDirectory() as cache, ThreadPoolExecutor(WORKERS) as pool:
        environment = {**os.environ, "TRITON_CACHE_DIR": cache}
        environment.pop("TRITON_INTERPRET", None)

        def run(batch: Sequence[Variant]) -> Report:
            process = subprocess.run(
                [sys.executable, "-c", "from tests.support import offline; offline.work()"],
                input=json.dumps([asdict(variant) for variant in batch]),
                env=environment,
                cwd=Path(__file__).parents[2],
                capture_output=True,
                text=True,
            )
            assert process.returncode == 0, process.stderr
            kernels = json.loads(process.stdout)
            return {
                name: {k: Usage(**usage) for k, usage in of_variant.items()} for name, of_variant in kernels.items()
            }

        batches = [variants[start::WORKERS] for start in range(min(WORKERS, len(variants)))]
        return {name: usages for report in pool.map(run, batches) for name, usages in report.items()}


def work() -> None:
    """What a process of `measure` does: variants as JSON from stdin, their report as JSON to stdout."""
    torch.set_num_threads(1)
    report = {}
    for fields in json.load(sys.stdin):
        variant = Variant(**fields)
        kernels = _compile(variant)
        report[variant.name] = {name: asdict(_usage(name, variant, *compiled)) for name, compiled in kernels.items()}
    json.dump(report, sys.stdout)


def _compile(variant: Variant) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Triton's compiled kernels and the options they were launched with, by name.

    Leaves this process with a driver that only claims to be a GPU.
    """
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    from dta_plugin.attention import triton_backend, triton_table

    compiled: dict[str, tuple[Any, dict[str, Any]]] = {}

    def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        name = self.fn.__name__
        if options.get("KEYS", True) != options.get("VALUES", True):
            name = KEYS_ALONE if options["KEYS"] else VALUES_ALONE
        compiled[name] = _run(self, *arguments, grid=grid, warmup=True, **options), options

    _run = JITFunction.run
    gpu = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", variant.arch, 32),
        get_current_device=lambda: variant.arch,  # Triton keeps compiled kernels per device
        get_current_stream=lambda device: 0,
    )
    driver.set_active(gpu)
    triton_backend._arch = lambda device: variant.arch
    triton_backend._processors = lambda device: 132
    triton_backend.launches = triton_table.launches
    if variant.tiles is not None:
        launch = triton_table.Launch(*variant.tiles)
        triton_backend.launches = lambda *_: triton_table.Launches(launch, launch, launch)
    JITFunction.run = compile_only
    try:
        _step(variant)
    finally:
        JITFunction.run = _run
    return compiled


def _step(variant: Variant) -> None:
    """Launch forward and backward as a training step does."""
    from dta_plugin import TreeMask
    from dta_plugin.attention.triton_backend import TritonKernels

    tf32 = variant.dtype == "tfloat32"
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    dtype = torch.float32 if tf32 else getattr(torch, variant.dtype)

    def tensor(heads: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.zeros(1, variant.tokens, heads, variant.head_dim, dtype=dtype).transpose(1, 2)

    window = variant.features in ("window+sinks", "all")
    kernels = TritonKernels(
        TreeMask(torch.full([variant.tokens], variant.tokens), torch.arange(variant.tokens)),
        scale=variant.head_dim**-0.5,
        window=128 if window else None,
        softcap=30.0 if variant.features in ("softcap", "all") else None,
    )
    q, k, v = tensor(8), tensor(2), tensor(2)
    out, lse = kernels.forward(q, k, v, torch.zeros(8, dtype=dtype) if window else None)
    kernels.backward(tensor(8), q, k, v, out, lse, tensor(2, torch.float32), tensor(2, torch.float32))


def _usage(name: str, variant: Variant, kernel: Any, options: dict[str, Any]) -> Usage:
    """Read from the machine code. The local memory of these kernels holds spilled registers and nothing else."""
    output = disassemble(kernel.asm["cubin"], "-res-usage")
    figures = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", output)}
    instructions = (name for name in ("tcgen05.mma", "wgmma.mma", "mma.sync") if name in kernel.asm["ptx"])
    return Usage(
        registers=figures["REG"],
        spills=figures["STACK"] + figures["LOCAL"],
        shared=kernel.metadata.shared,
        columns=getattr(kernel.metadata, "tmem_size", None) or 0,
        instruction=next(instructions, "fma"),
        pending=max((int(n) for n in re.findall(r"async_wait .*num = (\d+)", kernel.asm["ttgir"])), default=0),
        key=kernel.hash,
        **_of_loops(name, variant, kernel, options),
    )


# Where every loop is read; elsewhere what can be.
GATED = (80, 90, 100)


def _of_loops(name: str, variant: Variant, kernel: Any, options: dict[str, Any]) -> dict[str, float]:
    """work, exponentials and waits of `Usage`."""
    if name not in PRODUCTS or variant.dtype not in ("bfloat16", "float16"):
        return {}
    pairs, products = options["QUERY_TILE"] * options["KEY_TILE"], PRODUCTS[name]
    found = loops(kernel, options["num_warps"])
    if not found and variant.arch not in GATED:  # Triton 3.6 writes the loops of sm_120 in another form
        return {}
    return {
        "work": max(loop.flops for loop in found) / (2 * products * pairs * variant.head_dim),
        "exponentials": max(loop.exponentials for loop in found) / pairs,
        "waits": max(loop.waits for loop in found) / products,
    }


def record(report: Report) -> None:
    """Write the budgets, a line per variant: [registers, spilled bytes, shared bytes] of each kernel."""
    import triton

    lines = ",\n".join(
        f"    {json.dumps(name)}: " + json.dumps({k: [u.registers, u.spills, u.shared] for k, u in usages.items()})
        for name, usages in report.items()
    )
    BUDGETS.write_text(f'{{\n  "triton": "{triton.__version__}",\n  "variants": {{\n{lines}\n  }}\n}}\n')


def table(report: Report) -> Iterable[str]:
    for name, usages in report.items():
        for kernel, u in usages.items():
            yield (
                f"{name:36} {kernel:22} {u.registers:3} registers {u.spills:5} B spilled {u.shared:7} B shared "
                f"{u.columns:4} columns  {u.instruction:11} work {u.work:.2f} exponentials {u.exponentials:.2f} "
                f"waits {u.waits:.2f}"
            )


if __name__ == "__main__":
    found = measure(SHIPPED)
    ordered = {variant.name: found[variant.name] for variant in SHIPPED}
    print(*table(ordered), sep="\n")
    if "--record" in sys.argv[1:]:
        record(ordered)
