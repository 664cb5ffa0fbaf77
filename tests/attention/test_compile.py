"""Every variant of the Triton kernels that ships, compiled for GPUs that need not be there, within recorded budgets.

`python -m tests.support.offline --record` renews the budgets, after a change of kernels, launch table or Triton.
"""

from __future__ import annotations

import functools
import json

import pytest

pytest.importorskip("triton")

import triton

from tests.support.offline import BUDGETS, SHIPPED, Report, Usage, Variant, measure

pytestmark = pytest.mark.timeout(900)

# Bytes that one program can have, by architecture; columns of tensor memory on datacenter Blackwell.
SHARED = {80: 166_912, 86: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
COLUMNS = 512
PRODUCTS = ("forward_kernel", "query_gradient_kernel", "key_gradient_kernel")

RECORDED = json.loads(BUDGETS.read_text())


# Compiled in every run of the suite; the others take minutes and run with `make test-slow`.
USUAL = [
    *(Variant(90, "bfloat16", width) for width in (64, 128, 256)),
    *(Variant(arch, "bfloat16", 128) for arch in (80, 100)),
    *(Variant(90, "bfloat16", 128, features) for features in ("window+sinks", "softcap")),
    Variant(90, "float32", 128),
]
RARE = [variant for variant in SHIPPED if variant not in USUAL]
INSTRUCTIONS = {80: "mma.sync", 90: "wgmma.mma", 100: "tcgen05.mma"}


def each(variants: list[Variant]) -> pytest.MarkDecorator:
    """A test per variant, slow where it is rare."""
    cases = [pytest.param(variant, marks=[pytest.mark.slow] if variant in RARE else []) for variant in variants]
    return pytest.mark.parametrize("variant", cases, ids=lambda variant: variant.name)


@functools.cache
def usual() -> Report:
    return measure(USUAL)


@functools.cache
def rare() -> Report:
    return measure(RARE)


def usages_of(variant: Variant) -> dict[str, Usage]:
    return (usual() if variant in USUAL else rare())[variant.name]


def test_what_is_usual_ships() -> None:
    assert len(RARE) == len(SHIPPED) - len(USUAL)


def violations(variant: Variant, usages: dict[str, Usage]) -> list[str]:
    """What no Triton version may do: not fit the GPU, or spill where it matters most."""
    found = []
    for kernel, usage in usages.items():
        if usage.shared > SHARED[variant.arch] or usage.columns > COLUMNS:
            found.append(f"{kernel}: {usage} does not fit sm_{variant.arch}")
        half = variant.dtype in ("bfloat16", "float16")
        if half and variant.head_dim in (64, 128) and usage.spills:
            found.append(f"{kernel}: spills {usage.spills} bytes")
    return found


def excesses(usages: dict[str, Usage], budget: dict[str, list[int]]) -> list[str]:
    """Kernels above their record of registers, spilled bytes and shared bytes."""
    actual = {kernel: [usage.registers, usage.spills, usage.shared] for kernel, usage in usages.items()}
    assert actual.keys() == budget.keys()
    return [
        f"{kernel}: {figures}, recorded {budget[kernel]}"
        for kernel, figures in actual.items()
        if any(figure > most for figure, most in zip(figures, budget[kernel], strict=True))
    ]


@each(SHIPPED)
def test_fits_the_gpu_and_does_not_spill(variant: Variant) -> None:
    assert violations(variant, usages_of(variant)) == []


@each(SHIPPED)
@pytest.mark.skipif(triton.__version__ != RECORDED["triton"], reason="budgets are of another Triton version")
def test_within_the_recorded_budget(variant: Variant) -> None:
    assert excesses(usages_of(variant), RECORDED["variants"][variant.name]) == []


@each([Variant(arch, "bfloat16", width) for arch in INSTRUCTIONS for width in (64, 128, 256)])
def test_half_precision_runs_on_the_native_matrix_unit(variant: Variant) -> None:
    usages = usages_of(variant)
    assert {usages[kernel].instruction for kernel in PRODUCTS} == {INSTRUCTIONS[variant.arch]}


@pytest.mark.parametrize("kernel", PRODUCTS)
def test_loads_run_ahead_where_the_pipeline_has_three_stages(kernel: str) -> None:
    usages = usages_of(Variant(90, "bfloat16", 128))
    assert usages[kernel].pending > 0


def test_a_new_length_compiles_nothing() -> None:
    lengths = [Variant(90, "bfloat16", 64, "window+sinks", tokens=n) for n in (1, 17, 1000, 2048, 2049)]
    report = measure(lengths)
    for kernel in (*PRODUCTS, "delta_kernel"):
        assert len({report[variant.name][kernel].key for variant in lengths}) == 1, kernel


@pytest.mark.slow
def test_negative_control_tiles_that_are_too_large() -> None:
    variant = Variant(80, "bfloat16", 128, tiles=(128, 128, 4, 3))
    usages = measure([variant])[variant.name]
    found = "\n".join(violations(variant, usages))
    assert "does not fit sm_80" in found and "spills" in found
    assert excesses(usages, RECORDED["variants"][variant.name])
