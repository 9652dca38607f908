"""A two-layer Llama on the Triton kernels does what it does on torch's.

In the interpreter without a GPU, on the GPU with one.
"""

import dataclasses

import pytest
import torch

from engine.data.encode import Example
from engine.data.pack import MicroBatch
from engine.sampling.requests import Request, SamplerConfig
from engine.sampling.sampler import Sampler
from engine.train.optim import Optimizer
from engine.train.step import micro_step
from kernels.launch import triton_launch
from kernels.registry import TORCH, TRITON
from model.llama import Llama
from tests.helpers import interpreter
from tests.helpers.adapters import new_lora

if triton_launch.INTERPRETED:
    interpreter.install()

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = [pytest.mark.gpu] if ON_GPU else []


@pytest.fixture
def model(tiny_llama_dir):
    path = tiny_llama_dir(
        layers=2, heads=4, kv_heads=2, head_dim=16, intermediate=40, vocab=260, tied=False
    )
    return Llama.from_pretrained(path, device=DEVICE, dtype=torch.float32, ops=TORCH)


def on(model, ops):
    return Llama(model.config, model.weights, ops)


def adapter(model, modules, dropout=0.0):
    lora = new_lora(model, rank=4, alpha=8, modules=modules, dropout=dropout, seed=3)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():  # B starts at zero, which would hide most of the backward
        lora.params.add_(0.1 * torch.randn(lora.params.shape, generator=g).to(DEVICE))
    return lora


def examples(seed=0):
    g = torch.Generator().manual_seed(seed)
    lengths = (1, 5, 24)  # response tokens; with 7 of prompt
    return [
        Example(f"r{i}", torch.randint(256, (7 + n,), generator=g).tolist(), 7)
        for i, n in enumerate(lengths)
    ]


def step(model, lora, policy, number=1):
    lora.grads.zero_()
    batch = MicroBatch.build(examples(number), number, model.device)
    return micro_step(model, lora, batch, policy)


def close(a, b, relative=1e-4):
    return (a - b).abs().max() <= relative * b.abs().max()


@pytest.mark.parametrize(
    ("modules", "dropout", "policy"),
    [("qv", 0.0, "none"), ("all", 0.0, "none"), ("all", 0.0, "selective"), ("all", 0.2, "full")],
)
def test_loss_and_gradients_equal_torchs(model, modules, dropout, policy):
    lora = adapter(model, modules, dropout)
    want_nll = step(model, lora, policy).clone()
    want = {name: grad.clone() for name, grad in lora.views(lora.grads).items()}
    with interpreter.poisoned():
        nll = step(on(model, TRITON), lora, policy)
    assert close(nll, want_nll)
    for name, grad in lora.views(lora.grads).items():
        assert want[name].abs().max() > 0, f"{name} has no gradient: nothing is compared"
        assert close(grad, want[name]), name


def test_ten_steps_equal_torchs(model):
    runs = []
    for ops in (TORCH, TRITON):
        lora, m = adapter(model, "all"), on(model, ops)
        optimizer = Optimizer.fresh(lora, weight_decay=0.01)
        losses, start = [], lora.params.clone()
        for number in range(1, 11):
            nll = step(m, lora, "none", number)
            losses.append(nll.mean().item())
            optimizer.update(ops, lora, lr=1e-3, scale=1 / len(nll), clip=1.0)
        runs.append((torch.tensor(losses), lora.params - start))
    (losses, moved), (losses_triton, moved_triton) = runs
    assert close(losses_triton, losses)
    # a moved distance is about lr per step whatever the gradient's size: rounding shows more in it
    assert close(moved_triton, moved, relative=1e-2) and moved.abs().max() > 5e-3


@pytest.mark.parametrize("decoding", [{}, {"temperature": 0.9, "top_k": 30, "top_p": 0.9}], ids=str)
def test_the_sampler_gives_the_same_tokens(model, decoding):
    g = torch.Generator().manual_seed(1)
    wanted = [
        Request(f"q{i}", torch.randint(256, (n,), generator=g).tolist(), 8)
        for i, n in enumerate((1, 5, 23))
    ]
    config = SamplerConfig(rows=2, page_size=8, **decoding)
    texts = []
    for ops in (TORCH, TRITON):
        sampler = Sampler(on(model, ops), lambda ids: "", (), config, adapter(model, "qv"))
        done = {c.id: c for c in sampler.run([dataclasses.replace(r) for r in wanted])}
        texts.append({name: list(c.ids) for name, c in done.items()})
    assert texts[0] == texts[1] and all(texts[0].values())
