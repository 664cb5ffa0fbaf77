"""Two processes of one training, started without a launcher."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

REPOSITORY = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def on_two_ranks(module: str, folder: Path, *arguments: str, dies: bool = False) -> list[Any]:
    """What each rank of `python -m module folder ...` saved as <folder>/rank<n>.pt.

    dies: rank 1 does not come back. A deadlock should end in an error of the process group's own, after a minute.
    """
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}
    said = [folder / f"rank{rank}.txt" for rank in range(2)]  # a pipe that nobody reads would fill up
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", module, str(folder), *arguments],
            cwd=REPOSITORY,
            env=os.environ | shared | quiet | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=file.open("w"),
        )
        for rank, file in enumerate(said)
    ]
    for process in processes:
        process.wait(timeout=500)
    back = processes[:1] if dies else processes
    assert all(process.returncode == 0 for process in back), "\n".join(file.read_text()[-3000:] for file in said)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(len(back))]


def under_torchrun(
    module: str, model: str, folder: Path, *arguments: str, environment: dict[str, str] | None = None
) -> tuple[list[Any], str]:
    """What two ranks of `torchrun -m module model folder ...` saved as <folder>/rank<n>.pt, and what they printed."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    done = subprocess.run(
        [*launcher, "-m", module, model, str(folder), *arguments],
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | (environment or {}),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    loaded = [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]
    return loaded, done.stdout + done.stderr
