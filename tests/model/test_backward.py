"""The written-down backward is the gradient: against REFERENCE under autograd, in fp64, to 1e-9.

Also: packed rows equal the same rows one by one, every recompute policy gives the same numbers, and
nothing below the first adapter is computed.
"""

import dataclasses

import pytest
import torch

from kernels.packed import Packed
from kernels.registry import REFERENCE, TORCH
from model.layout import MODULES
from model.llama import Llama
from model.lora import Lora
from model.tape import POLICIES, Tape
from tests.helpers.adapters import new_lora

LENGTHS = [7, 1, 12, 3]


def make(path, modules="all", dropout=0.0, rank=3, ops=TORCH):
    model = Llama.from_pretrained(path, dtype=torch.float64, ops=ops)
    lora = new_lora(model, rank=rank, alpha=5.0, modules=modules, dropout=dropout, seed=1)
    generator = torch.Generator().manual_seed(2)  # B is zero at first: A would have no gradient
    lora.params.copy_(
        torch.randn(lora.params.shape, generator=generator, dtype=torch.float64) * 0.1
    )
    return model, lora


def batch(model, lengths=LENGTHS, seed=3):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(model.config.vocab_size, (sum(lengths),), generator=generator)
    targets = torch.randint(model.config.vocab_size, (sum(lengths),), generator=generator)
    carries = torch.rand(sum(lengths), generator=generator) < 0.6
    return tokens, targets, carries.nonzero()[:, 0]


def ours(model, lora, lengths=LENGTHS, policy="none", step=4, data=None):
    """Summed loss and the flat gradient by forward, linear_cross_entropy, backward."""
    tokens, targets, select = data or batch(model, lengths)
    packed = Packed.from_lengths(lengths, row_keys=list(range(10, 10 + len(lengths))), step=step)
    tape = Tape(policy)
    hidden = model.forward(tokens, packed, lora=lora, tape=tape)
    nll, dselected = model.ops.linear_cross_entropy(
        hidden[select], model.weights["head"], targets[select]
    )
    dhidden = torch.zeros_like(hidden).index_copy_(0, select, dselected)
    lora.grads.zero_()
    model.backward(dhidden, tape)
    return nll.sum(), lora.grads.clone()


def autograd(model, lora, lengths=LENGTHS, step=4):
    """The same by torch's autograd through the REFERENCE operations."""
    model = Llama(model.config, model.weights, REFERENCE)
    tokens, targets, select = batch(model, lengths)
    packed = Packed.from_lengths(lengths, row_keys=list(range(10, 10 + len(lengths))), step=step)
    lora.params.requires_grad_()
    lora.compute = lora.params
    lora.make_groups(model.config)
    tape = Tape() if lora.config.dropout else None  # a tape turns dropout on
    hidden = model.forward(tokens, packed, lora=lora, tape=tape)
    loss = torch.nn.functional.cross_entropy(
        (hidden @ model.weights["head"].T)[select], targets[select], reduction="sum"
    )
    (gradient,) = torch.autograd.grad(loss, lora.params)
    lora.params.requires_grad_(False)
    lora.make_groups(model.config)
    return loss.detach(), gradient


def assert_same_gradients(lora, got, want, tolerance=1e-9):
    got, want = lora.views(got), lora.views(want)
    for name in want:
        scale = want[name].abs().max().item()
        assert scale > 0, f"{name} has no gradient: the test would prove nothing"
        error = (got[name] - want[name]).abs().max().item() / scale
        assert error < tolerance, f"{name}: relative error {error:.2g}"


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("modules", ["qv", "attention", "all", "down_proj", "k_proj,gate_proj"])
def test_equals_autograd(tiny_llama_dir, modules, tied, policy):
    model, lora = make(tiny_llama_dir(layers=3, tied=tied), modules)
    loss, gradient = ours(model, lora, policy=policy)
    want_loss, want = autograd(model, lora)
    assert abs(loss - want_loss) < 1e-9 * abs(want_loss)
    assert_same_gradients(lora, gradient, want)


@pytest.mark.parametrize("module", MODULES)
def test_equals_autograd_for_each_module(tiny_llama_dir, module):
    model, lora = make(tiny_llama_dir(heads=6, kv_heads=2), module.split(".")[1])
    assert_same_gradients(lora, ours(model, lora)[1], autograd(model, lora)[1])


@pytest.mark.parametrize("policy", POLICIES)
def test_equals_autograd_with_dropout(tiny_llama_dir, policy):
    """The same Philox mask in forward, backward and recomputation."""
    model, lora = make(tiny_llama_dir(), "all", dropout=0.3)
    loss, gradient = ours(model, lora, policy=policy)
    want_loss, want = autograd(model, lora)
    assert abs(loss - want_loss) < 1e-9 * abs(want_loss)
    assert_same_gradients(lora, gradient, want)
    without = Lora(
        dataclasses.replace(lora.config, dropout=0.0), {k: v[1] for k, v in lora.slots.items()}
    )
    without.params.copy_(lora.params)
    model.bind(without)
    assert abs(ours(model, without)[0] - loss) > 1e-6 * abs(loss), "dropout did nothing"


def test_equals_finite_differences(tiny_llama_dir):
    """Along random directions, central differences of the loss itself."""
    model, lora = make(tiny_llama_dir(), "all")
    _, gradient = ours(model, lora)
    start = lora.params.clone()
    for seed in range(3):
        direction = torch.randn(
            start.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        )
        epsilon, losses = 1e-5, []
        for sign in (1, -1):
            lora.params.copy_(start + sign * epsilon * direction)
            losses.append(ours(model, lora)[0])
        numeric = (losses[0] - losses[1]) / (2 * epsilon)
        assert abs(numeric - gradient @ direction) < 1e-6 * abs(numeric)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_packed_equals_one_by_one(tiny_llama_dir, dropout):
    """Loss and every gradient; with dropout too, since a mask belongs to its row."""
    model, lora = make(tiny_llama_dir(), "all", dropout)
    tokens, targets, select = batch(model)
    loss, gradient = ours(model, lora)
    total, total_loss, start = torch.zeros_like(gradient), 0.0, 0
    for i, length in enumerate(LENGTHS):
        mine = select[(select >= start) & (select < start + length)] - start
        span = slice(start, start + length)
        packed = Packed.from_lengths([length], row_keys=[10 + i], step=4)
        tape = Tape()
        hidden = model.forward(tokens[span], packed, lora=lora, tape=tape)
        nll, d = model.ops.linear_cross_entropy(
            hidden[mine], model.weights["head"], targets[span][mine]
        )
        lora.grads.zero_()
        model.backward(torch.zeros_like(hidden).index_copy_(0, mine, d), tape)
        total += lora.grads
        total_loss += nll.sum()
        start += length
    assert abs(total_loss - loss) < 1e-9 * loss
    assert_same_gradients(lora, total, gradient)


def test_nothing_is_computed_below_the_first_adapter(tiny_llama_dir):
    """With only the last layer adapted, the earlier layers' backward never runs."""
    model, lora = make(tiny_llama_dir(layers=3), "qv")
    shapes = {k: v[1] for k, v in lora.slots.items() if ".layers.2." in k}
    calls = []

    def counted(*args, **kwargs):
        calls.append(1)
        return TORCH.swiglu_backward(*args, **kwargs)

    model.ops = dataclasses.replace(TORCH, swiglu_backward=counted)
    top = Lora(lora.config, shapes)
    with pytest.raises(ValueError, match="made for another model"):
        model.bind(top)
    ours(model, lora)
    assert len(calls) == 3
    need = []

    def watched(dy, x, weight, s, group, need_dx, dropout):
        need.append(need_dx)
        return TORCH.lora_linear_backward(dy, x, weight, s, group, need_dx, dropout)

    model.ops = dataclasses.replace(TORCH, lora_linear_backward=watched)
    ours(model, lora)
    assert need == [True] * 11 + [False], "only the lowest qkv may skip dX"


def test_runs_are_bitwise_equal(tiny_llama_dir):
    model, lora = make(tiny_llama_dir(), "all", dropout=0.1)
    (loss1, first), (loss2, second) = ours(model, lora), ours(model, lora)
    assert torch.equal(loss1, loss2) and torch.equal(first, second)
