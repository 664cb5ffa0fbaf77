"""What the loops of a compiled kernel do, counted in NVIDIA's machine code: matrix products, exponentials, waits.

Triton ships the disassembler. A loop is a branch back to where it began; those with matrix instructions count. What
stands behind the last EXIT retries barriers and branches back, too, but is no loop's end.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")
_MATRIX = ("HGMMA", "HMMA", "UTCHMMA")
# Multiply-adds of one warp's instruction on Ampere, by the shape in its name.
_HMMA = {"16816": 16 * 8 * 16, "1688": 16 * 8 * 8}


@dataclass(frozen=True, slots=True)
class Loop:
    """One iteration of one program. flops: of matrix instructions, two per multiply-add. exponentials: of all threads.

    waits: how often a warp waits for matrix products.
    """

    flops: float
    exponentials: int
    waits: int


def loops(kernel: Any, warps: int) -> list[Loop]:
    """The loops with matrix instructions of a kernel that Triton has compiled, in the order of the code."""
    code = list(_instructions(kernel.asm["cubin"]))
    bodies = [[op for _, op, _ in code[begin : end + 1]] for begin, end in _with_products(code)]
    on_tensor_memory = _tensor_memory_flops(kernel.asm["ptx"])
    found = []
    for number, body in enumerate(bodies):
        flops = sum(_flops(op) * (warps / 4 if op.startswith("HGMMA") else warps) for op in body)
        found.append(
            Loop(
                flops=flops or on_tensor_memory[number],
                exponentials=sum(op.startswith("MUFU.EX2") for op in body) * 32 * warps,
                waits=sum(op.startswith(("WARPGROUP.DEPBAR", "SYNCS.PHASECHK")) for op in body),
            )
        )
    return found


def disassemble(cubin: bytes, *options: str) -> str:
    """What cuobjdump prints of it."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, *options, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _instructions(cubin: bytes) -> Iterator[tuple[int, str, str]]:
    """(address, name, operands)"""
    for address, name, operands in _INSTRUCTION.findall(disassemble(cubin, "-sass")):
        yield int(address, 16), name, operands


def _with_products(code: list[tuple[int, str, str]]) -> list[tuple[int, int]]:
    """First and last instruction of every loop that has a matrix instruction."""
    place = {address: index for index, (address, _, _) in enumerate(code)}
    last_exit = max(index for index, (_, name, _) in enumerate(code) if name == "EXIT")
    ends: dict[int, int] = {}
    for index, (address, name, operands) in enumerate(code[:last_exit]):
        target = re.search(r"0x([0-9a-f]+)\s*$", operands)
        if name.startswith("BRA") and target and int(target[1], 16) < address:
            ends[place[int(target[1], 16)]] = index
    return [
        (begin, end)
        for begin, end in sorted(ends.items())
        if any(name.startswith(_MATRIX) for _, name, _ in code[begin : end + 1])
    ]


def _flops(name: str) -> int:
    """Two per multiply-add of one instruction: of a group of four warps for HGMMA, of one warp for HMMA."""
    if shape := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", name):
        rows, columns, depth = map(int, shape.groups())
        return 2 * rows * columns * depth
    if shape := re.match(r"HMMA\.(\d+)\.", name):
        return 2 * _HMMA[shape[1]]
    return 0


def _tensor_memory_flops(ptx: str) -> list[float]:
    """The same on datacenter Blackwell, by loop of the PTX, where the shape is in the instruction's descriptor."""
    lines = ptx.splitlines()
    labels = {line.split(":")[0]: number for number, line in enumerate(lines) if re.match(r"\$L__BB\w+:", line)}
    descriptors = dict(re.findall(r"mov\.b32\s+(%r\d+), (\d+);", ptx))
    ends: dict[int, int] = {}
    for number, line in enumerate(lines):
        target = re.search(r"bra\S*\s+(\$L__BB\w+);", line)
        if target and labels[target[1]] < number:
            ends[labels[target[1]]] = number
    bodies = ("\n".join(lines[begin:end]) for begin, end in sorted(ends.items()))
    products = (re.findall(r"tcgen05\.mma\.[^;]*, (%r\d+), %p\d+;", body) for body in bodies)
    return [sum(_descriptor_flops(int(descriptors[register])) for register in found) for found in products if found]


def _descriptor_flops(descriptor: int) -> float:
    """Rows and columns in units of 16 and 8, see "Instruction descriptor" of tcgen05 in the PTX ISA; depth 16."""
    return 2.0 * 16 * ((descriptor >> 24 & 31) * 16) * ((descriptor >> 17 & 63) * 8)
