"""The written-down backward is the gradient: equal to autograd of REFERENCE, in fp64, to 1e-9.

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
ROW_KEYS = [10, 11, 12, 13]
STEP = 4


def make(path, modules="all", dropout=0.0, rank=3, ops=TORCH):
    model = Llama.from_pretrained(path, dtype=torch.float64, ops=ops)
    lora = new_lora(model, rank=rank, alpha=5.0, modules=modules, dropout=dropout, seed=1)
    generator = torch.Generator().manual_seed(2)
    values = torch.randn(lora.params.shape, generator=generator, dtype=torch.float64)
    lora.params.copy_(values * 0.1)  # a fresh B is zero, and A would have no gradient
    return model, lora


def batch(model):
    """Tokens (T,), targets (T,), and the positions (N,) that have a loss; rows of LENGTHS."""
    total = sum(LENGTHS)
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(model.config.vocab_size, (total,), generator=generator)
    targets = torch.randint(model.config.vocab_size, (total,), generator=generator)
    has_loss = torch.rand(total, generator=generator) < 0.6
    return tokens, targets, has_loss.nonzero()[:, 0]


def packed_rows():
    return Packed.from_lengths(LENGTHS, row_keys=ROW_KEYS, step=STEP)


def ours(model, lora, policy="none"):
    """Summed loss and the flat gradient by forward, linear_cross_entropy, backward."""
    tokens, targets, select = batch(model)
    packed = packed_rows()
    tape = Tape(policy)
    hidden = model.forward(tokens, packed, lora=lora, tape=tape)
    nll, dselected = model.ops.linear_cross_entropy(
        hidden[select], model.weights["head"], targets[select]
    )
    dhidden = torch.zeros_like(hidden).index_copy_(0, select, dselected)
    lora.grads.zero_()
    model.backward(dhidden, tape)
    return nll.sum(), lora.grads.clone()


def autograd(model, lora):
    """The same by torch's autograd through the REFERENCE operations."""
    model = Llama(model.config, model.weights, REFERENCE)
    tokens, targets, select = batch(model)
    packed = packed_rows()
    lora.params.requires_grad_()
    lora.compute = lora.params
    lora.make_groups(model.config)
    tape = Tape() if lora.config.dropout else None  # a tape turns dropout on
    hidden = model.forward(tokens, packed, lora=lora, tape=tape)
    logits = hidden @ model.weights["head"].T  # (T, V)
    loss = torch.nn.functional.cross_entropy(logits[select], targets[select], reduction="sum")
    (gradient,) = torch.autograd.grad(loss, lora.params)
    lora.params.requires_grad_(False)
    lora.make_groups(model.config)
    return loss.detach(), gradient


def assert_same_gradients(lora, ours, truth, tolerance=1e-9):
    """Two flat gradients are equal, matrix by matrix, relative to the largest element."""
    ours = lora.views(ours)
    for name, expected in lora.views(truth).items():
        scale = expected.abs().max().item()
        assert scale > 0, f"{name} has no gradient: the test would prove nothing"
        error = (ours[name] - expected).abs().max().item() / scale
        assert error < tolerance, f"{name}: relative error {error:.2g}"


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("modules", ["qv", "attention", "all", "down_proj", "k_proj,gate_proj"])
def test_loss_and_gradients_equal_autograd(tiny_llama_dir, modules, tied, policy):
    model, lora = make(tiny_llama_dir(layers=3, tied=tied), modules)
    loss, gradient = ours(model, lora, policy)
    true_loss, true_gradient = autograd(model, lora)
    assert abs(loss - true_loss) < 1e-9 * abs(true_loss)
    assert_same_gradients(lora, gradient, true_gradient)


@pytest.mark.parametrize("module", MODULES)
def test_gradients_equal_autograd_for_each_module_alone(tiny_llama_dir, module):
    model, lora = make(tiny_llama_dir(heads=6, kv_heads=2), module.split(".")[1])
    _, gradient = ours(model, lora)
    _, true_gradient = autograd(model, lora)
    assert_same_gradients(lora, gradient, true_gradient)


@pytest.mark.parametrize("policy", POLICIES)
def test_loss_and_gradients_equal_autograd_with_dropout(tiny_llama_dir, policy):
    """The same Philox mask in forward, backward and recomputation."""
    model, lora = make(tiny_llama_dir(), "all", dropout=0.3)
    loss, gradient = ours(model, lora, policy)
    true_loss, true_gradient = autograd(model, lora)
    assert abs(loss - true_loss) < 1e-9 * abs(true_loss)
    assert_same_gradients(lora, gradient, true_gradient)
    shapes = {name: slot.shape for name, slot in lora.slots.items()}
    without = Lora(dataclasses.replace(lora.config, dropout=0.0), shapes)
    without.params.copy_(lora.params)
    model.bind(without)
    loss_without, _ = ours(model, without)
    assert abs(loss_without - loss) > 1e-6 * abs(loss), "dropout did nothing"


def test_gradient_equals_finite_differences(tiny_llama_dir):
    """Along random directions, central differences of the loss itself."""
    model, lora = make(tiny_llama_dir(), "all")
    _, gradient = ours(model, lora)
    start = lora.params.clone()
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        direction = torch.randn(start.shape, generator=generator, dtype=torch.float64)
        epsilon = 1e-5
        losses = []
        for sign in (1, -1):
            lora.params.copy_(start + sign * epsilon * direction)
            loss, _ = ours(model, lora)
            losses.append(loss)
        numeric = (losses[0] - losses[1]) / (2 * epsilon)
        assert abs(numeric - gradient @ direction) < 1e-6 * abs(numeric)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_packed_rows_equal_the_rows_one_by_one(tiny_llama_dir, dropout):
    """Loss and every gradient; with dropout too, since a mask belongs to its row."""
    model, lora = make(tiny_llama_dir(), "all", dropout)
    tokens, targets, select = batch(model)
    loss, gradient = ours(model, lora)
    total_gradient = torch.zeros_like(gradient)
    total_loss = 0.0
    start = 0
    for row_key, length in zip(ROW_KEYS, LENGTHS, strict=True):
        end = start + length
        of_the_row = select[(select >= start) & (select < end)] - start
        row_targets = targets[start:end][of_the_row]
        packed = Packed.from_lengths([length], row_keys=[row_key], step=STEP)
        tape = Tape()
        hidden = model.forward(tokens[start:end], packed, lora=lora, tape=tape)
        nll, dselected = model.ops.linear_cross_entropy(
            hidden[of_the_row], model.weights["head"], row_targets
        )
        dhidden = torch.zeros_like(hidden).index_copy_(0, of_the_row, dselected)
        lora.grads.zero_()
        model.backward(dhidden, tape)
        total_gradient += lora.grads
        total_loss += nll.sum()
        start = end
    assert abs(total_loss - loss) < 1e-9 * loss
    assert_same_gradients(lora, total_gradient, gradient)


def test_nothing_is_computed_below_the_first_adapter(tiny_llama_dir):
    """With only the last layer adapted, the earlier layers' backward never runs."""
    model, lora = make(tiny_llama_dir(layers=3), "qv")
    shapes = {name: slot.shape for name, slot in lora.slots.items() if ".layers.2." in name}
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
    needed = []

    def watched(dy, x, weight, s, group, need_dx, dropout):
        needed.append(need_dx)
        return TORCH.lora_linear_backward(dy, x, weight, s, group, need_dx, dropout)

    model.ops = dataclasses.replace(TORCH, lora_linear_backward=watched)
    ours(model, lora)
    assert needed == [True] * 11 + [False], "only the lowest qkv may skip dx"


def test_two_steps_on_the_same_rows_are_bitwise_equal(tiny_llama_dir):
    model, lora = make(tiny_llama_dir(), "all", dropout=0.1)
    first_loss, first_gradient = ours(model, lora)
    second_loss, second_gradient = ours(model, lora)
    assert torch.equal(first_loss, second_loss)
    assert torch.equal(first_gradient, second_gradient)


@pytest.mark.parametrize(("modules", "products", "swiglus"), [("qv", 3, 0), ("all", 4, 2)])
def test_full_recomputation_leaves_out_the_last_product_where_it_can(
    tiny_llama_dir, modules, products, swiglus
):
    """The output of a layer is not needed again: only S of an adapter on "down" is.

    Per layer the backward computes qkv, o and gate_up again, and "down" only for its S; swiglu only
    where "down" is adapted, for S and for the gradient of A. The gradients have the same bits.
    """
    calls = []

    def counted(name):
        def call(*args):
            calls.append(name)
            return getattr(TORCH, name)(*args)

        return call

    names = ("lora_linear_forward", "swiglu_forward")
    ops = dataclasses.replace(TORCH, **{name: counted(name) for name in names})
    model, lora = make(tiny_llama_dir(), modules, ops=ops)
    _, without = ours(model, lora, "none")
    before = {name: calls.count(name) for name in names}
    calls.clear()
    _, full = ours(model, lora, "full")
    layers = model.config.num_layers
    again = {name: calls.count(name) - layers * of_forward(name) for name in names}
    assert torch.equal(full, without)
    assert before["lora_linear_forward"] == 4 * layers
    assert again == {"lora_linear_forward": products * layers, "swiglu_forward": swiglus * layers}


def of_forward(name):
    """How often the forward calls it in a layer."""
    return 4 if name == "lora_linear_forward" else 1
