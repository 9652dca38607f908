"""Take a GPU's memory but for a little, and hold it until standard input ends.

    python -m benchmarks.card.fill_memory --leave-gb 2

Prints "filled" with the GB that are left when it holds the rest. Another process then finds a card
that is nearly full, as it does beside other people's jobs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

BLOCK = 256 << 20  # bytes of one allocation


def fill(leave: float) -> list[torch.Tensor]:
    """Allocate blocks until at most `leave` bytes are free; returns them."""
    blocks = []
    while True:
        free, _ = torch.cuda.mem_get_info()
        size = min(BLOCK, int(free - leave))
        if size < 1 << 20:
            return blocks
        blocks.append(torch.zeros(size, dtype=torch.int8, device="cuda"))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--leave-gb", type=float, default=2.0, help="GB that stay free")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        sys.exit("fill_memory: torch finds no GPU here")
    blocks = fill(args.leave_gb * 1e9)
    free, _ = torch.cuda.mem_get_info()
    print(f"filled: {len(blocks)} blocks, {free / 1e9:.2f} GB are left", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
