"""One of two processes of tests/runtime/test_distributed.py, on gloo: rank 0 waits for rank 1

python tests/helpers/waiting_job.py DEED        RANK, WORLD_SIZE and MASTER_* in the environment

DEED is what rank 1 does meanwhile: busy, stopped, stopped in a sum, killed or ended.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from engine.runtime.distributed import Timeouts, start
from engine.runtime.flags import run_main


def main() -> None:
    deed = sys.argv[1]
    heartbeat = timedelta(seconds=300 if deed in ("killed", "ended") else 6)
    timeouts = Timeouts(collective=timedelta(seconds=4), heartbeat=heartbeat, pause=0.2)
    world = start(timeouts=timeouts)
    for _ in range(5):
        world.barrier()
    assert world.any_rank(world.is_rank0)
    assert not world.any_rank(False)
    assert world.max_over_ranks(7 - world.rank) == 7
    print("joined", file=sys.stderr)
    if not world.is_rank0:
        if deed == "busy":  # longer than both timeouts
            until = time.monotonic() + 9
            while time.monotonic() < until:
                time.sleep(0.01)
        elif deed == "ended":
            raise ValueError("a bad row")
        else:
            os.kill(os.getpid(), signal.SIGKILL if deed == "killed" else signal.SIGSTOP)
    if deed == "stopped in a sum":
        world.all_reduce_sum_(torch.ones(3))
    world.barrier()
    assert world.all_reduce_sum_(torch.ones(3)).tolist() == [2, 2, 2]
    print("through", file=sys.stderr)


if __name__ == "__main__":
    run_main(main)
