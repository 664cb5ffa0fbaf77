"""The machine, its versions and the commit: the first step on a GPU.

python -m benchmarks.gpu.machine --output machine.json
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks.common.harness import environment, write_json


def main() -> None:
    args = _arguments()
    where = environment(torch.device(args.device))
    if args.output:
        write_json(args.output, where)
    for name, value in (where["versions"] | where["machine"]).items():
        print(f"{name:16}{value}")
    print(f"commit {where['commit']}, {where['machine']['accelerator'] or where['machine']['cpu']}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--output", type=Path, help="JSON file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
