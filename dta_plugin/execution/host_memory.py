"""Memory of the machine that this process may still take: what is free, within its cgroup, within its rlimit.

In a container or a batch job the cgroup's limit counts, not what the machine has. Pages that only cache files are free.
"""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path

_UNKNOWN = 8 * 2**30


def free_host_bytes(root: Path = Path("/")) -> int:
    """The least of all limits. root: where /proc and /sys are found."""
    limits = [*_of_machine(root), *_of_cgroups(root), *_of_rlimit(root)]
    return max(0, min(limits, default=_UNKNOWN))


def _of_machine(root: Path) -> Iterator[int]:
    for line in _lines(root / "proc/meminfo"):
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            yield int(value.split()[0]) * 1024


def _of_cgroups(root: Path) -> Iterator[int]:
    """Room in this process's cgroup and in those above it, of version 2 or 1."""
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        base = root / "sys/fs/cgroup" / ("memory" if controllers else "")
        group = base / path.strip().lstrip("/")
        while True:
            yield from _of_group(group, is_v2=not controllers)
            if group == base or base not in group.parents:
                break
            group = group.parent


def _of_group(group: Path, is_v2: bool) -> Iterator[int]:
    names = ("memory.max", "memory.current") if is_v2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    limit, used = (next(iter(_lines(group / name)), "max").strip() for name in names)
    if not (limit.isdecimal() and used.isdecimal()):
        return
    cached = "inactive_file" if is_v2 else "total_inactive_file"
    freeable = sum(int(line.split()[1]) for line in _lines(group / "memory.stat") if line.split()[:1] == [cached])
    yield int(limit) - int(used) + freeable


def _of_rlimit(root: Path) -> Iterator[int]:
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    pages = next(iter(_lines(root / "proc/self/statm")), "")
    if limit != resource.RLIM_INFINITY and pages:
        yield limit - int(pages.split()[0]) * resource.getpagesize()


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
