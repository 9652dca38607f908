"""What each process of tests/test_distributed.py does: started by torchrun, never by pytest.

python -m torch.distributed.run --nproc-per-node N tests/distributed_job.py JOB.json
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from safetensors.torch import save_file

from engine import step as stepping
from engine.distributed import start
from engine.flags import run_main
from engine.train import train
from model.llama import Llama
from model.lora import Lora
from tests.test_train import LORA, SMALL, examples


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    world = start()

    # 1. the gradient of one step in fp64, summed over the processes
    model = Llama.from_pretrained(job["model"], dtype=torch.float64)
    lora = Lora.init(model, rank=3, modules="all", dropout=0.2, seed=1)
    lora.params.add_(0.05)
    found = stepping.step_gradients(model, lora, examples(9), 3, 64, "none", world)
    world.sum_(lora.grads)
    loss = world.sum_(found.nll.sum())
    if world.first:
        save_file({"grads": lora.grads, "loss": loss}, job["gradients"])

    # 2. a run, in which rank 1 may be killed
    micro_step = stepping.micro_step

    def killing(model, lora, batch, policy):
        if world.rank == 1 and int(batch.packed.step) == job["kill"]:
            os.kill(os.getpid(), signal.SIGKILL)
        return micro_step(model, lora, batch, policy)

    stepping.micro_step = killing
    out = Path(job["out"])
    model = Llama.from_pretrained(job["model"])
    where = {"base": "b", "model_hash": "h", "resume": out.exists(), "world": world}
    train(model, examples(), LORA, SMALL, out, **where)


if __name__ == "__main__":
    run_main(main)
