"""A two-layer Llama gives the same results with the Triton kernels as with torch's operations.

Without a GPU the kernels run in Triton's interpreter.
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
    """The same model with another table of operations."""
    return Llama(model.config, model.weights, ops)


def adapter(model, modules, dropout=0.0):
    lora = new_lora(model, rank=4, alpha=8, modules=modules, dropout=dropout, seed=3)
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(lora.params.shape, generator=generator).to(DEVICE)
    with torch.no_grad():  # B starts at zero, which would hide most of the backward
        lora.params.add_(0.1 * values)
    return lora


def random_ids(length, generator):
    return torch.randint(256, (length,), generator=generator).tolist()


def examples(seed=0):
    """Three examples of 7 prompt tokens and 1, 5 and 24 response tokens."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for i, response in enumerate((1, 5, 24)):
        made.append(Example(f"r{i}", random_ids(7 + response, generator), 7))
    return made


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
def test_loss_and_gradients_equal_those_of_torch(model, modules, dropout, policy):
    lora = adapter(model, modules, dropout)
    expected_nll = step(model, lora, policy).clone()
    expected = {name: grad.clone() for name, grad in lora.views(lora.grads).items()}
    with interpreter.poisoned():
        nll = step(on(model, TRITON), lora, policy)
    assert close(nll, expected_nll)
    for name, grad in lora.views(lora.grads).items():
        assert expected[name].abs().max() > 0, f"{name} has no gradient: nothing is compared"
        assert close(grad, expected[name]), name


def test_ten_optimizer_steps_equal_those_of_torch(model):
    runs = []
    for ops in (TORCH, TRITON):
        lora = adapter(model, "all")
        model_on_ops = on(model, ops)
        optimizer = Optimizer.fresh(lora, weight_decay=0.01)
        losses = []
        start = lora.params.clone()
        for number in range(1, 11):
            nll = step(model_on_ops, lora, "none", number)
            losses.append(nll.mean().item())
            optimizer.update(ops, lora, lr=1e-3, scale=1 / len(nll), clip=1.0)
        runs.append((torch.tensor(losses), lora.params - start))
    (losses, moved), (losses_triton, moved_triton) = runs
    assert close(losses_triton, losses)
    # a step moves by about lr whatever the gradient's size, so rounding errors show more here
    assert close(moved_triton, moved, relative=1e-2)
    assert moved.abs().max() > 5e-3


@pytest.mark.parametrize("decoding", [{}, {"temperature": 0.9, "top_k": 30, "top_p": 0.9}], ids=str)
def test_the_sampler_gives_the_same_tokens(model, decoding):
    assert_same_tokens(model, (1, 5, 23), 8, decoding)


def test_the_sampler_gives_the_same_tokens_of_a_qwen3(tiny_llama_dir):
    sizes = {"heads": 3, "kv_heads": 1, "intermediate": 24, "vocab": 260}
    path = tiny_llama_dir(model_type="qwen3", head_dim=24, hidden=40, **sizes)
    model = Llama.from_pretrained(path, device=DEVICE, dtype=torch.float32, ops=TORCH)
    assert_same_tokens(model, (1, 11), 4, {"temperature": 0.9})


def assert_same_tokens(model, prompt_lengths, new_tokens, decoding):
    """Prompts of random tokens, sampled two rows at a time over TORCH and over TRITON."""
    generator = torch.Generator().manual_seed(1)
    requests = []
    for i, length in enumerate(prompt_lengths):
        requests.append(Request(f"q{i}", random_ids(length, generator), new_tokens))
    config = SamplerConfig(rows=2, page_size=8, **decoding)
    texts = []
    for ops in (TORCH, TRITON):
        sampler = Sampler(on(model, ops), lambda ids: "", (), config, adapter(model, "qv"))
        copies = [dataclasses.replace(request) for request in requests]
        texts.append({done.id: list(done.ids) for done in sampler.run(copies)})
    assert texts[0] == texts[1]
    assert all(texts[0].values())
