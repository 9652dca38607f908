"""The program of each process of tests/runtime/test_distributed.py; torchrun starts it, not pytest.

python -m torch.distributed.run --nproc-per-node N tests/helpers/distributed_job.py JOB.json
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import pytest
import torch
from safetensors.torch import save_file

from engine.data.config import DataConfig
from engine.data.distilled import Distilled
from engine.distill.seed_likelihoods import score
from engine.measure import seed_nll as seed_nll_module
from engine.measure.seed_nll import nll_under_seed
from engine.runtime.distributed import World, start, sum_through_host_
from engine.runtime.flags import run_main
from engine.sampling.requests import SamplerConfig
from engine.sampling.sampler import Sampler
from engine.train import step as step_module
from engine.train.losses import Loss
from engine.train.optim import Optimizer
from engine.train.train import FrozenModel, train
from engine.train.validate import ValidateConfig, Validator
from engine.train.weighted_loss import WeightedLoss
from model.chat import Chat
from model.llama import Llama
from model.lora import Lora
from model.sharded import BroadcastAllGather
from model.tape import POLICIES
from model.tokenizer import load_tokenizer
from tests.helpers.adapters import new_lora
from tests.helpers.sessions import session_of
from tests.helpers.training import LORA, SMALL, examples


def lines(count: int) -> list[Distilled]:
    """Distilled lines of made text, of several lengths; every third has no response."""
    return [line(i) for i in range(count)]


def line(i: int) -> Distilled:
    words = i % 3  # of the response; "yes" is three tokens
    return Distilled(
        id=f"r{i}/0",
        messages=[{"role": "user", "content": "Say " + "abc" * (i % 4)}],
        reference="no " * (i % 5 + 1),
        response="yes" * words,
        response_ids=[121, 101, 115] * words,
        target="",
        status="accepted",
        stage="",
        finish="stop",
        prompt_tokens=1,
        response_tokens=3 * words,
    )


def weighted_steps(model: Llama, lora: Lora, folder: Path, world: World) -> dict[str, torch.Tensor]:
    """Gradient and means of one step under weighted losses, of 9 rows and of 1, summed over the
    processes.

    The likelihoods under the seed are kept in `folder`; several micro-batches of 64 tokens.
    """
    found = {}
    for text, count in itertools.product(("k3:0.5", "eaft"), (9, 1)):
        rows = examples(count)
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(seed_nll_module.BATCH_TOKENS, "cpu", 64)
            seed_nll = nll_under_seed(model, rows, folder, "h", world)
        weighted = WeightedLoss(Loss.parse(text), seed_nll)
        gradients = step_module.step_gradients(model, lora, rows, 3, 64, "none", world, weighted)
        optimizer = Optimizer.fresh(lora, 0.0)
        result = step_module.step_update(model, lora, optimizer, gradients, 0.0, 0.0, world)
        found[f"grads {text} {count}"] = lora.grads.clone()
        found[f"means {text} {count}"] = result.weighted
    return found


def check_through_host(world: World) -> None:
    """Sums and gathers through host memory give the bits of the direct way.

    A GPU that ranks share goes this way. Its tensors stand in host memory here.
    """
    own = torch.randn(1001, generator=torch.Generator().manual_seed(world.rank))
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        direct, copied = own.to(dtype, copy=True), own.to(dtype, copy=True)
        torch.distributed.all_reduce(direct)
        sum_through_host_(copied)
        assert torch.equal(direct, copied) and not torch.equal(direct, own.to(dtype))

        gathered = []
        for through_host in (False, True):
            gather = BroadcastAllGather(through_host)
            output = gather.allocate([world.size * 1001], dtype=dtype, device=torch.device("cpu"))
            output.zero_()
            part = output.chunk(world.size)[world.rank].copy_(own)
            gather(output, part, torch.distributed.group.WORLD)
            gathered.append(output)
        assert torch.equal(*gathered)
        assert all(bool(part.any()) for part in gathered[0].chunk(world.size))


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    world, shard = start(), job["shard"]

    check_through_host(world)

    # 1. the gradient of one step in fp64, summed over the processes
    model = Llama.from_pretrained(job["model"], dtype=torch.float64, shard=shard)
    lora = new_lora(model, rank=3, modules="all", dropout=0.2, seed=1)
    lora.params.add_(0.05)
    found = {}
    for policy in POLICIES:
        for count in (9, 1):  # of one row, all processes but one have nothing
            gradients = step_module.step_gradients(
                model, lora, examples(count), 3, 64, policy, world
            )
            found[f"loss {policy} {count}"] = world.all_reduce_sum_(gradients.nll.sum())
            found[f"grads {policy} {count}"] = world.all_reduce_sum_(lora.grads).clone()

    found |= weighted_steps(model, lora, Path(job["seed_nll"]), world)

    # 2. the size of a shard, validation and scores of sharded weights; they cannot be sampled from
    chat = Chat.from_dir(job["model"], load_tokenizer(job["model"]))
    if shard:
        held = 0
        for name in model.weights:
            held += sum(piece.numel() for piece, _ in model.weights.local(name))
        found["held"] = torch.tensor(held)
        config = ValidateConfig(val_every=1, val_data=job["held_out"], val_prompts=2)
        validator = Validator(config, DataConfig(job["held_out"]), session_of(model, chat))
        found["validation"] = torch.tensor(validator(lora))
        score(model, chat, lines(7), Path(job["scores"]), {}, world)
        sampler = Sampler(model, chat.tokenizer.decode, chat.end_ids, SamplerConfig())
        with pytest.raises(ValueError, match="without --shard"), sampler:
            pass
    if world.is_rank0:
        save_file(found, job["found"])

    # 3. a training, in which rank 1 may be killed
    micro_step = step_module.micro_step

    def killing(model, lora, batch, *rest):
        if world.rank == 1 and int(batch.packed.step) == job["kill"]:
            os.kill(os.getpid(), signal.SIGKILL)
        return micro_step(model, lora, batch, *rest)

    step_module.micro_step = killing
    out = Path(job["out"])
    model = Llama.from_pretrained(job["model"], shard=shard)
    frozen = FrozenModel(model, "b", "h", world=world)
    train(frozen, examples(), LORA, SMALL, out, resume=out.exists())


if __name__ == "__main__":
    run_main(main)
