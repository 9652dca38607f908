"""Every operation of every table against its definition, by the ratio rule of kernels/spec.py."""

import copy
import dataclasses

import pytest
import torch

from kernels.philox import Dropout, mix, philox4x32, uniform
from kernels.registry import OPS, REFERENCE, SPECS, TORCH
from kernels.spec import cast, check

CASES = [(name, shape) for name, spec in SPECS.items() for shape in spec.test_shapes]
IDS = [f"{name}-{'x'.join(map(str, shape))[:40]}" for name, shape in CASES]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "shape"), CASES, ids=IDS)
def test_against_reference(name, shape, dtype):
    check(SPECS[name], TORCH, REFERENCE, shape, dtype)


@pytest.mark.parametrize(("name", "shape"), CASES, ids=IDS)
def test_repeatable(name, shape):
    """Two runs on copies of the same inputs give the same bits."""
    spec = SPECS[name]
    inputs = spec.make_inputs(shape, torch.Generator().manual_seed(1))
    first, second = (spec.run(TORCH, cast(inputs, torch.float32)) for _ in range(2))
    for key in first:
        assert torch.equal(first[key], second[key]), key


def _tensors(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _tensors(getattr(value, field.name))
    elif isinstance(value, dict):
        for v in value.values():
            yield from _tensors(v)


@pytest.mark.parametrize(
    "name", ["rms_norm", "swiglu", "attention", "linear_cross_entropy", "rope"]
)
def test_inputs_are_left_alone(name):
    """Nothing is written into an input, a saved tensor or an incoming gradient."""
    spec = SPECS[name]
    inputs = spec.make_inputs(spec.test_shapes[1], torch.Generator().manual_seed(1))
    before = copy.deepcopy(inputs)
    spec.run(TORCH, inputs)
    for was, now in zip(_tensors(before), _tensors(inputs), strict=True):
        assert torch.equal(was, now)


def test_check_can_fail():
    """A sign error and a small error both go red."""

    def wrong(dh, gate_up):
        return SPECS["swiglu"].run(TORCH, {"dh": dh, "gate_up": gate_up})["dgate_up"] * 1.001

    broken = dataclasses.replace(TORCH, swiglu_backward=wrong)
    with pytest.raises(AssertionError, match="dgate_up"):
        check(SPECS["swiglu"], broken, REFERENCE, (3, 63), torch.float32)


def test_non_contiguous_gradient():
    spec = SPECS["lora_linear"]
    inputs = spec.make_inputs((65, 96, 8, 96, 32, 32), torch.Generator().manual_seed(2))
    want = spec.run(TORCH, cast(inputs, torch.float64))
    strided = torch.empty(160, 65, dtype=torch.float64).T.copy_(inputs["dy"])
    got = spec.run(TORCH, cast(inputs, torch.float64) | {"dy": strided})
    for key in want:
        torch.testing.assert_close(got[key], want[key], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", [n for n in OPS])
def test_every_operation_is_in_the_tables(name):
    assert all(callable(getattr(OPS[name], op)) for op in OPS[name].table())


def test_philox_known_answers():
    """The vectors published with Random123 (kat_vectors, philox 4x32 10)."""
    cases = [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ]
    for counter, (k0, k1), want in cases:
        got = philox4x32(tuple(torch.tensor([c]) for c in counter), k0 | k1 << 32)
        assert tuple(int(w) for w in got) == want


def test_uniform_is_uniform_and_keyed():
    n = 20_000
    zero = torch.zeros(n, dtype=torch.int64)
    keys = torch.full((n,), -(2**62) + 12345)  # 64-bit keys use the sign bit too
    u = uniform(torch.arange(n), zero, keys, seed=3)
    assert 0 < u.min() and u.max() < 1
    assert abs(u.mean().item() - 0.5) < 0.01 and abs(u.var().item() - 1 / 12) < 0.005
    for other in (
        uniform(torch.arange(n), zero + 1, keys, seed=3),
        uniform(torch.arange(n), zero, keys + 1, seed=3),
        uniform(torch.arange(n), zero, keys + 2**40, seed=3),
        uniform(torch.arange(n), zero, keys, seed=4),
    ):
        assert abs(torch.corrcoef(torch.stack((u, other)))[0, 1].item()) < 0.03


def test_dropout_mask_belongs_to_the_token():
    """Rate, scale, and the same mask wherever in a batch the token stands."""
    positions, keys = torch.arange(500), torch.full((500,), 77)
    drop = Dropout(0.1, mix("dropout", 1, 2, 3), positions, keys, torch.tensor(5))
    mask = drop.mask(203, torch.float64)
    assert mask.shape == (500, 203)
    assert abs((mask == 0).double().mean().item() - 0.1) < 0.005
    assert abs(mask.mean().item() - 1) < 0.006
    shuffled = torch.randperm(500, generator=torch.Generator().manual_seed(0))
    moved = dataclasses.replace(drop, positions=positions[shuffled], row_keys=keys[shuffled])
    assert torch.equal(moved.mask(203, torch.float64), mask[shuffled])
    assert not torch.equal(
        dataclasses.replace(drop, step=torch.tensor(6)).mask(203, torch.float64), mask
    )
