"""Every variant of the Triton kernels that ships, compiled for GPUs that need not be there.

Their loops do no work twice and wait for no product by itself; registers and memory stay within recorded budgets.

`python -m tests.support.offline --record` renews the budgets, after a change of kernels, launch table or Triton.
"""

from __future__ import annotations

import functools
import json

import pytest

pytest.importorskip("triton")

import triton

from tests.support.offline import BUDGETS, PRODUCTS, SHIPPED, Report, Usage, Variant, measure

pytestmark = pytest.mark.timeout(900)

# Bytes that one program can have, by architecture; columns of tensor memory on datacenter Blackwell.
SHARED = {80: 166_912, 86: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
COLUMNS = 512
RECORDED = json.loads(BUDGETS.read_text())
is_recorded = pytest.mark.skipif(
    triton.__version__ != RECORDED["triton"], reason="budgets are of another Triton version"
)


# Compiled in every run of the suite.
QUICK = [Variant(arch, "bfloat16", 128) for arch in (90, 100)]
# With `make test-long`; the others take many minutes, and run with `make test-slow`.
USUAL = [
    *(Variant(arch, "bfloat16", width) for arch in (80, 90, 100) for width in (64, 128, 256)),
    *(Variant(90, "bfloat16", 128, features) for features in ("window+sinks", "softcap")),
    Variant(90, "float32", 128),
]
RARE = [variant for variant in SHIPPED if variant not in USUAL]
INSTRUCTIONS = {80: "mma.sync", 90: "wgmma.mma", 100: "tcgen05.mma"}


def each(variants: list[Variant]) -> pytest.MarkDecorator:
    """A test per variant, run as often as its group."""
    marks = [[] if v in QUICK else [pytest.mark.long] if v in USUAL else [pytest.mark.slow] for v in variants]
    cases = [pytest.param(variant, marks=own) for variant, own in zip(variants, marks, strict=True)]
    return pytest.mark.parametrize("variant", cases, ids=lambda variant: variant.name)


@functools.cache
def report(*variants: Variant) -> Report:
    """Of one group, compiled together."""
    return measure(list(variants))


def usages_of(variant: Variant) -> dict[str, Usage]:
    group = next(group for group in (QUICK, USUAL, RARE) if variant in group)
    return report(*group)[variant.name]


def test_what_is_usual_ships() -> None:
    assert len(RARE) == len(SHIPPED) - len(USUAL)


def misfits(variant: Variant, usages: dict[str, Usage]) -> list[str]:
    """Kernels that do not fit the GPU."""
    return [
        f"{kernel}: {usage} does not fit sm_{variant.arch}"
        for kernel, usage in usages.items()
        if usage.shared > SHARED[variant.arch] or usage.columns > COLUMNS
    ]


def spills(variant: Variant, usages: dict[str, Usage]) -> list[str]:
    """Kernels that spill where it matters most. Soft-caps may, within their record."""
    half = variant.dtype in ("bfloat16", "float16") and variant.head_dim in (64, 128)
    if not half or variant.features == "softcap":
        return []
    return [f"{kernel}: spills {usage.spills} bytes" for kernel, usage in usages.items() if usage.spills]


def wasted(variant: Variant, usages: dict[str, Usage]) -> list[str]:
    """Kernels with a loop that computes something twice, or waits for its products one instruction at a time."""
    each = 2.0 if variant.features in ("softcap", "all") else 1.0  # a soft-cap is an exponential of its own
    found = []
    for kernel in PRODUCTS.keys() & usages.keys():
        usage, limit = usages[kernel], 1.1 * each
        if (variant.arch, variant.head_dim, kernel) == (80, 256, "forward_kernel"):
            limit += 0.25  # Triton spreads its accumulator's columns over the warps: each has factors for all rows
        if usage.work > 1.02:
            found.append(f"{kernel}: {usage.work:.2f} times the products needed")
        if usage.exponentials > limit:
            found.append(f"{kernel}: {usage.exponentials:.2f} exponentials per pair")
        if usage.waits > 1.0:
            found.append(f"{kernel}: {usage.waits:.2f} waits per product")
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


@pytest.mark.long
@each(SHIPPED)
def test_fits_the_gpu(variant: Variant) -> None:
    assert misfits(variant, usages_of(variant)) == []


@each([variant for variant in SHIPPED if variant.dtype == "bfloat16" and variant.head_dim in (64, 128, 256)])
def test_no_loop_wastes_anything(variant: Variant) -> None:
    assert wasted(variant, usages_of(variant)) == []


@each(SHIPPED)
@is_recorded
def test_does_not_spill(variant: Variant) -> None:
    assert spills(variant, usages_of(variant)) == []


@each([variant for variant in SHIPPED if variant.name in RECORDED["variants"]])
@is_recorded
def test_within_the_recorded_budget(variant: Variant) -> None:
    assert excesses(usages_of(variant), RECORDED["variants"][variant.name]) == []


def test_what_is_usual_is_recorded() -> None:
    assert {variant.name for variant in USUAL} <= RECORDED["variants"].keys()


@each([Variant(arch, "bfloat16", width) for arch in INSTRUCTIONS for width in (64, 128, 256)])
def test_half_precision_runs_on_the_native_matrix_unit(variant: Variant) -> None:
    usages = usages_of(variant)
    assert {usages[kernel].instruction for kernel in PRODUCTS.keys() & usages.keys()} == {INSTRUCTIONS[variant.arch]}


def test_loads_run_ahead_where_the_pipeline_has_three_stages() -> None:
    assert usages_of(Variant(90, "bfloat16", 128))["forward_kernel"].pending > 0


@pytest.mark.long
def test_a_new_length_compiles_nothing() -> None:
    lengths = [Variant(90, "bfloat16", 64, "window+sinks", tokens=n) for n in (1, 17, 1000, 2048, 2049)]
    report = measure(lengths)
    for kernel in report[lengths[0].name]:
        assert len({report[variant.name][kernel].key for variant in lengths}) == 1, kernel


@pytest.mark.long
def test_negative_control_too_few_keys_for_two_groups_of_warps() -> None:
    """What Hopper's gradient of keys had once: both groups of four warps compute the same scores."""
    variant = Variant(90, "bfloat16", 128, tiles=(64, 64, 8, 3))
    found = "\n".join(wasted(variant, measure([variant])[variant.name]))
    assert "1.50 times the products needed" in found and "2.00 exponentials per pair" in found


@pytest.mark.slow
def test_negative_control_tiles_that_are_too_large() -> None:
    variant = Variant(80, "bfloat16", 128, tiles=(128, 128, 4, 3))
    usages = measure([variant])[variant.name]
    assert "does not fit sm_80" in "\n".join(misfits(variant, usages)) and spills(variant, usages)
    assert excesses(usages, RECORDED["variants"][variant.name])
