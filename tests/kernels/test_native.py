"""The C kernels: against their definitions, between guards, and batch-invariant.

Everything here runs on the library that this machine compiled, and once more, in processes of
their own, on builds for other processors and on one with the compiler's sanitizers. Such a process
runs with the plugin tests/helpers/tested_library.py, which takes the library to test.
"""

import copy
import dataclasses
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels.cached import Cached
from kernels.cpu import native, panels
from kernels.cpu.native import Loaded, Loader
from kernels.cpu.panels import Panels, bytes_needed
from kernels.cpu.quantised_panels import Quantised, QuantisedPanels
from kernels.integers import cdiv
from kernels.registry import NATIVE, REFERENCE, SPECS, TORCH, functions
from kernels.spec import cast, check
from tests.helpers import interpreter, tested_library
from tests.helpers.operation_cases import WRITTEN, named_tensors, random_shapes

ROOT = Path(__file__).resolve().parents[2]
OTHER = os.environ.get(tested_library.VARIABLE)  # the library under test, in such a process

NAMES = [name for name, spec in SPECS.items() if functions(NATIVE, spec) != functions(TORCH, spec)]


@pytest.fixture(autouse=True)
def skipped_without_native():
    reason = native.why_unavailable()
    if reason is not None:
        pytest.skip(f"no native kernels: {reason}")


@pytest.fixture(params=[1, 2, 5], ids=["1 thread", "2 threads", "5 threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def bitwise(a, b):
    """Equal to the last bit, NaN and the sign of 0 too."""
    if a.dtype.is_floating_point:
        a, b = a.contiguous().view(torch.int32), b.contiguous().view(torch.int32)
    return torch.equal(a, b)


def lanes():
    return native.library().panel_columns() // 2


# ---- against the definitions


def any_shapes(spec):
    """Shapes of no pattern; heads in whole vectors."""
    for shape in random_shapes(spec):
        if spec.name == "cached_attention":
            shape = (*shape[:2], cdiv(shape[2], 16) * 16, *shape[3:])
        yield shape


def cases(shapes_of):
    """A case for each native operation and each of its shapes."""
    params = []
    for name in NAMES:
        for shape in shapes_of(SPECS[name]):
            sizes = "x".join(map(str, shape))
            params.append(pytest.param(name, shape, id=f"{name}-{sizes[:50]}"))
    return params


@pytest.mark.parametrize(
    ("name", "shape"), cases(lambda spec: [*spec.test_shapes, *any_shapes(spec)])
)
def test_native_operations_equal_the_reference(name, shape):
    """With the inputs between guards and every fresh tensor poisoned."""
    buffers = []
    with interpreter.poisoned():
        check(
            SPECS[name], NATIVE, REFERENCE, shape,
            prepare=lambda inputs: interpreter.guarded(inputs, buffers),
        )  # fmt: skip
    assert interpreter.guards_intact(buffers), f"{name} wrote outside its tensors"


def test_native_operations_equal_the_reference_at_every_width():
    """Remainders of every length after the last whole vector or panel, and short sums."""
    for width in range(1, 72):
        check(SPECS["rms_norm"], NATIVE, REFERENCE, (2, width))
        check(SPECS["swiglu"], NATIVE, REFERENCE, (2, width))
        check(SPECS["rope"], NATIVE, REFERENCE, (2, 2, 1, 2 * width))
        check(SPECS["norm_rope"], NATIVE, REFERENCE, (2, 2, 1, 2 * width))
        check(SPECS["linear"], NATIVE, REFERENCE, (3, 5 + width % 4, width))
        check(SPECS["linear"], NATIVE, REFERENCE, (width, width % 7 + 1, 3))


def test_native_attention_equals_the_reference_with_heads_of_every_size():
    """One to nine vectors: those that the compiler knows, and any other."""
    for vectors in range(1, 10):
        for page in (1, 5, 8, 16, 40):
            shape = (3, 1, vectors * lanes(), page, 1, 7, 2 * page + 3, page - 1, 0)
            check(SPECS["cached_attention"], NATIVE, REFERENCE, shape)


def test_nothing_after_the_cache_is_read():
    """The last place of the last page is used: a read after it shows in the sanitized build."""
    d = lanes()
    for page in range(2, 35):
        cached = Cached.build([1, 2], [2 * page - 1, page - 2], [[0, 1], [2]], page)
        k, v = normal(3, 1, page, d), normal(3, 1, page, d, seed=1)
        qkv = normal(3, 3 * d, seed=2)
        want = REFERENCE.cached_attention(qkv, k, v, cached)
        torch.testing.assert_close(NATIVE.cached_attention(qkv, k, v, cached), want)


def test_values_are_summed_in_two_chains():
    """Of the even and of the odd keys of a page, over the pages; added in the end. Bit for bit.

    Queries of 0 weigh every key alike, by exactly 1.
    """
    for page in (1, 5, 8, 16):
        d = 2 * lanes()
        n = 3 * page + 2
        qkv = torch.cat((torch.zeros(n, d), normal(n, 2 * d)), dim=1)
        k = torch.zeros(5, 1, page, d)
        v = torch.zeros(5, 1, page, d)
        cached = Cached.build([n], [0], [[2, 0, 1, 4, 3]], page)
        NATIVE.kv_write_(qkv, k, v, cached)
        got = NATIVE.cached_attention(qkv, k, v, cached)
        chains = torch.zeros(2, d)
        for t in range(n):
            place = t % page
            chains[place % 2] += qkv[t, 2 * d :]
            assert bitwise(got[t], chains.sum(0) / (t + 1)), f"token {t}, pages of {page}"


def test_attention_equals_the_reference_for_scores_far_apart():
    """Most weights vanish; the largest score may be any one's, and far from 0."""
    spec = SPECS["cached_attention"]

    def larger(shape, generator):
        inputs = spec.make_inputs(shape, generator)
        return inputs | {"qkv": inputs["qkv"] * 25}

    for seed in range(4):
        check(
            dataclasses.replace(spec, make_inputs=larger), NATIVE, REFERENCE,
            (4, 2, 16, 8, 1, 6, 70, 5, 33), seed=seed,
        )  # fmt: skip


@pytest.mark.parametrize(("name", "shape"), cases(lambda spec: spec.test_shapes))
def test_results_are_repeatable(name, shape):
    inputs = SPECS[name].make_inputs(shape, torch.Generator().manual_seed(1))
    first = SPECS[name].run(NATIVE, cast(inputs, torch.float32))
    second = SPECS[name].run(NATIVE, cast(inputs, torch.float32))
    for key in first:
        assert bitwise(first[key], second[key]), key


@pytest.mark.parametrize("name", NAMES)
def test_inputs_are_not_written(name):
    made = SPECS[name].make_inputs(SPECS[name].test_shapes[1], torch.Generator().manual_seed(1))
    inputs = cast(made, torch.float32)
    before = copy.deepcopy(inputs)
    compared = 0
    SPECS[name].run(NATIVE, inputs)
    for (field, was), (_, now) in zip(named_tensors(before), named_tensors(inputs), strict=True):
        if field not in WRITTEN.get(name, ()):
            assert torch.equal(was, now), f"{name} wrote into {field}"
            compared += 1
    assert compared


UNIT = 2.0**-24  # half a unit in the last place of 1: what one rounding may cost


def test_swiglu_is_accurate_to_three_roundings():
    """e^x over its whole range: 3 roundings' worth; what lies beyond is taken to be at its end."""
    gate = torch.cat((torch.linspace(-86.9, 87.9, 100_001), torch.logspace(-36, 0, 999)))
    gate = torch.cat((gate, -gate[-999:]))
    h = NATIVE.swiglu_forward(torch.stack((gate, torch.ones_like(gate))).view(1, -1))[0]
    truth = gate.double() * torch.sigmoid(gate.double())
    error = (h.double() - truth).abs() / truth.abs()
    assert error.max() < 3.2 * UNIT, f"relative error {error.max() / UNIT:.3g} units"
    far = torch.tensor([-torch.inf, -1e30, -1000, -90, 0.0, -0.0, 89, 1000, 1e30, torch.inf])
    h = NATIVE.swiglu_forward(torch.stack((far, torch.ones_like(far))).view(1, -1))[0]
    least = 1 / (1 + torch.tensor(88.0, dtype=torch.float64).exp()).float()
    torch.testing.assert_close(h[:4], far[:4] * least)
    assert bitwise(h[4:], far[4:])


def test_attention_weights_are_accurate_to_three_roundings():
    """Of two keys, one with score 0 and value 0, the other with score x and value 1."""
    d = 16  # its root is exact
    x = torch.linspace(-100, 0, 20_001)
    n = len(x)
    k = torch.zeros(1, 1, 8, d)
    v = torch.zeros(1, 1, 8, d)
    qkv = torch.zeros(n, 3 * d)
    k[0, 0, 1, 0] = 1
    v[0, 0, 1] = 1
    qkv[:, 0] = 4 * x
    cached = Cached.build([1] * n, [1] * n, [[0]] * n, 8)
    got = NATIVE.cached_attention(qkv, k, v, cached)
    truth = x.double().clamp(min=-87).sigmoid()
    error = (got[:, 0].double() - truth).abs() / truth
    assert error.max() < 3.2 * UNIT, f"relative error {error.max() / UNIT:.3g} units"
    alone = error[x < -20].max()  # there the sum of weights is 1, and what is left is e^x
    assert alone < 1.4 * UNIT, f"relative error of e^x {alone / UNIT:.3g} units"


def test_attention_equals_the_reference_for_scores_far_below_0():
    """Places after a row's last key do not count: their 0 is not the largest score."""
    d = lanes()
    for n in range(1, 3 * lanes()):
        qkv = torch.cat((torch.ones(n, d), normal(n, 2 * d)), dim=1)
        falling = -(100 + torch.arange(n) / 4) / d**0.5  # scores: -100, -100.25, ...
        qkv[:, d : 2 * d] = falling[:, None]
        k, v = torch.zeros(6, 1, 8, d), torch.zeros(6, 1, 8, d)
        cached = Cached.build([n], [0], [list(range(6))], 8)
        NATIVE.kv_write_(qkv, k, v, cached)
        want = REFERENCE.cached_attention(qkv.double(), k.double(), v.double(), cached).float()
        got = NATIVE.cached_attention(qkv, k, v, cached)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_a_nan_reaches_the_queries_that_see_it():
    """And no other query."""
    G, d, page = 1, lanes(), 8
    k, v = normal(4, G, page, d), normal(4, G, page, d, seed=1)
    k[1, 0, 3, 5] = torch.nan  # token 11 of the row
    qkv = normal(14, 3 * d, seed=2)
    cached = Cached.build([14], [6], [[0, 1, 2]], page)
    o = NATIVE.cached_attention(qkv, k, v, cached)  # tokens 6 .. 19
    assert o[:5].isfinite().all() and o[5:].isnan().all()


# ---- guards: the C functions, with everything they are given between poison

GUARD = 66  # words on either side; no multiple of a vector
POISONS = (0x7FC0DEAD, 0x4E6E6B28)  # a NaN with a payload, 1e9


def call(function, poison, arguments):
    """Its tensors as the function left them; AssertionError where it wrote beside one."""
    buffers, passed = [], []
    for x in arguments:
        if isinstance(x, torch.Tensor):
            words = x.flatten().view(torch.int32)
            whole = torch.full((len(words) + 2 * GUARD,), poison, dtype=torch.int32)
            inside = whole[GUARD:-GUARD]
            inside.copy_(words)
            buffers.append((whole, inside.view(x.dtype).view(x.shape)))
            x = inside.data_ptr()
        passed.append(x)
    getattr(native.library(), function)(*passed)
    for i, (whole, _) in enumerate(buffers):
        around = torch.cat((whole[:GUARD], whole[-GUARD:]))
        assert bool((around == poison).all()), f"{function} wrote beside its tensor {i}"
    return [inside for _, inside in buffers]


def guarded(function, *arguments, written):
    """The tensors numbered `written`; the others are as they were, whatever lies around them."""
    given = [x for x in arguments if isinstance(x, torch.Tensor)]
    first = call(function, POISONS[0], arguments)
    second = call(function, POISONS[1], arguments)
    for i, (was, a, b) in enumerate(zip(given, first, second, strict=True)):
        assert bitwise(a, b), f"{function}: tensor {i} depends on what lies around its inputs"
        assert i in written or bitwise(a, was), f"{function} wrote into tensor {i}"
    return [first[i] for i in written]


def fresh(*shape, dtype=torch.float32):
    return torch.full(shape, torch.nan if dtype.is_floating_point else 0xA5, dtype=dtype)


def packed(weight):
    """Of the same bytes as Panels holds, with nothing behind them."""
    made = Panels(weight)
    columns = native.library().panel_columns()
    size = cdiv(weight.shape[0], columns) * columns * weight.shape[1] * made.bytes
    return made.packed[:size].clone(), made.bytes


def of_bytes(weight, count):
    """The weight with what `count` upper bytes do not hold cut off."""
    return weight.view(torch.int32).bitwise_and(-1 << 8 * (4 - count)).view(torch.float32)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_guards_of_products(count, threads):
    shapes = (
        (1, 1),
        (lanes(), 3),
        (lanes() + 1, 8),
        (2 * lanes(), 5),
        (5 * lanes() - 1, 17),
    )
    for n, k in shapes:
        weight = of_bytes(normal(n, k), count)
        weight[-1, -1] = of_bytes(torch.tensor(1.7182818), count)
        bits, used = packed(weight)
        assert used == count
        (again,) = guarded(
            "pack", weight, fresh(len(bits), dtype=torch.uint8), count, n, k, written=[1]
        )
        assert torch.equal(again, bits)
        rows = torch.cat((torch.arange(n), torch.randint(n, (70,))))
        (found,) = guarded(
            "look_up", bits, count, rows, fresh(len(rows), k), len(rows), k, written=[2]
        )
        assert bitwise(found, weight[rows])
        for T in (1, 2, 5, 6, 7, 11, 12, 13, 48, 49, 97, 200):
            x = normal(T, k, seed=T)
            plain = Panels(weight)(x)
            (y,) = guarded("linear", x, bits, None, fresh(T, n), count, T, k, n, written=[2])
            assert bitwise(y, plain)
            bias = normal(n, seed=T)
            (y,) = guarded("linear", x, bits, bias, fresh(T, n), count, T, k, n, written=[3])
            assert bitwise(y, plain + bias), "the bias is added last, in one rounding"


def quantised(n, k, bits, block, has_minima):
    """A weight with codes from the lowest to the highest, some scales and minima 0 or below."""
    lowest, highest = (-128, 127) if bits == 8 else (-8, 7)
    if has_minima and bits == 4:
        lowest, highest = 0, 15
    generator = torch.Generator().manual_seed(n + k)
    codes = torch.randint(lowest, highest + 1, (n, k), generator=generator, dtype=torch.int8)
    codes[0, 0], codes[-1, -1] = lowest, highest
    scales = torch.randn(n, k // block, generator=generator)
    scales[::5] = 0
    minima = None
    if has_minima:
        minima = torch.randn(n, k // block, generator=generator)
        minima[::3] = 0
    return Quantised(codes, scales, minima)


FORMS = [(bits, block, minima) for bits in (4, 8) for block in (16, 32) for minima in (False, True)]


@pytest.mark.parametrize(("bits", "block", "has_minima"), FORMS)
def test_guards_of_products_with_quantised_weights(bits, block, has_minima, threads):
    """And that they are the products of the decoded weight, for tiles of every height."""
    for n, k in ((1, block), (lanes() + 1, 160), (2 * lanes(), 128), (5 * lanes() - 1, 288)):
        weight = quantised(n, k, bits, block, has_minima)
        decoded = weight.decoded()
        made, plain = QuantisedPanels(weight), Panels(decoded)
        columns = native.library().panel_columns()
        packed = made.packed[: cdiv(n, columns) * columns * k * made.bits // 8].clone()
        minimum_bits = 32 // block if has_minima else 0
        assert made.bits == bits + 32 // block + minimum_bits
        parts = (weight.codes, weight.scales, weight.minima)
        place = 3 if has_minima else 2  # of the packed weight among the tensors
        (again,) = guarded(
            "pack_quantised", *parts, fresh(len(packed), dtype=torch.uint8), made.form, n, k,
            written=[place],
        )  # fmt: skip
        assert torch.equal(again, packed)
        rows = torch.cat((torch.arange(n), torch.randint(n, (70,))))
        (found,) = guarded(
            "look_up", packed, made.form, rows, fresh(len(rows), k), len(rows), k, written=[2]
        )
        assert bitwise(found, decoded[rows])
        for T in (*range(1, 8), 12, 13, 19, 49):
            x = normal(T, k, seed=T)
            (y,) = guarded("linear", x, packed, None, fresh(T, n), made.form, T, k, n, written=[2])
            assert bitwise(y, plain(x)), f"{T} rows"


def test_guards_of_norms_swiglu_and_rotation(threads):
    for T, D in ((1, 1), (3, 15), (2, 16), (5, 33), (300, 63)):
        x, residual, w = normal(T, D), normal(T, D, seed=1), normal(D, seed=2)
        y, h, rstd = NATIVE.add_rms_norm_forward(x, residual, w, 1e-5)
        got = guarded(
            "rms_norm", x, residual, w, fresh(T, D), fresh(T, D), fresh(T), T, D, 1e-5,
            written=[3, 4, 5],
        )  # fmt: skip
        assert all(map(bitwise, got, (y, h, rstd)))
        y, rstd = NATIVE.rms_norm_forward(x, w, 1e-5)
        got = guarded(
            "rms_norm", x, None, w, fresh(T, D), None, fresh(T), T, D, 1e-5, written=[2, 3]
        )
        assert all(map(bitwise, got, (y, rstd)))
        gate_up = normal(T, 2 * D)
        (h,) = guarded("swiglu", gate_up, fresh(T, D), T, D, written=[1])
        assert bitwise(h, NATIVE.swiglu_forward(gate_up))
    for T, H, G, d in ((1, 1, 1, 2), (3, 2, 1, 30), (2, 3, 3, 32), (200, 4, 2, 34)):
        qkv, positions = normal(T, (H + 2 * G) * d), torch.randint(9, (T,))
        angles = normal(9, d)
        for sign in (1.0, -1.0):
            (turned,) = guarded("rope", qkv, positions, angles, T, H, G, d, sign, written=[0])
            want = NATIVE.rope_(qkv.clone(), positions, angles, H, G, inverse=sign < 0)
            assert bitwise(turned, want)
            assert bitwise(turned[:, (H + G) * d :], qkv[:, (H + G) * d :]), "values are not turned"
        norms = normal(2 * d, seed=3)
        (z,) = guarded(
            "norm_rope", qkv, norms, positions, angles, fresh(*qkv.shape), T, H, G, d, 1e-5,
            written=[4],
        )  # fmt: skip
        want = NATIVE.norm_rope_forward(qkv, norms, 1e-5, positions, angles, H, G)
        assert bitwise(z, want)
        assert bitwise(z[:, (H + G) * d :], qkv[:, (H + G) * d :]), "values are copied"


DRAWN = (  # temperature, top_k, top_p, min_p
    (0.0, 0, 1.0, 0.0),
    (0.9, 5, 0.8, 0.0),
    (1.1, 0, 0.9, 0.02),
    (1.0, 400, 1.0, 0.0),
)


@pytest.mark.parametrize("settings", DRAWN, ids=str)
def test_guards_and_batch_invariance_of_sampling(settings, threads):
    """Nothing beside the rows is looked at, and a row's token is its own; ties and -0 in them."""
    temperature, top_k, top_p, min_p = settings
    for B, V in ((1, 1), (5, 37), (7, 600), (3, 16 * 64 + 9)):
        z = (normal(B, V) * 3).round() * 0.5
        u = torch.rand(B, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        places = (u, fresh(B, dtype=torch.int64), fresh(B), B, V)
        arguments = (z, z.clone(), *places, temperature, top_k, top_p, min_p)
        tokens, logprobs = guarded("sample", *arguments, written=[3, 4])
        want = torch.log_softmax(z.double(), -1).gather(1, tokens[:, None])[:, 0]
        assert (logprobs.double() - want).abs().max() <= 2e-6 * (1 + want.abs().max())
        for b in range(B):
            one = slice(b, b + 1)
            places = (u[one], fresh(1, dtype=torch.int64), fresh(1), 1, V)
            arguments = (z[one], z[one].clone(), *places, temperature, top_k, top_p, min_p)
            token, logprob = guarded("sample", *arguments, written=[3, 4])
            assert bitwise(token, tokens[one]) and bitwise(logprob, logprobs[one])


def test_logits_are_ordered_as_by_a_stable_sort_of_torch():
    """Sorted by digits = a stable sort, for any bits, infinities and both zeros in them."""
    V = 3000
    z = torch.randint(-(2**31), 2**31 - 1, (V,), generator=torch.Generator().manual_seed(0)).int()
    z = torch.where(z.view(torch.float32).isnan(), 0, z).view(torch.float32)
    z[::7] = 0.0
    z[3::11] = -0.0
    z[5::13] = -torch.inf
    z = z.clamp(max=80.0)
    order = z.sort(descending=True, stable=True).indices
    p = ((z.double() - z.max()) / 30).exp()[order]
    whole = p.cumsum(0)
    for place in (0, 1, 50, 400, 1200):
        assert p[place] > 1e-9, "too small to be met"
        u = (whole[place] - p[place] / 2) / whole[-1]
        rows = (z[None], z[None].clone(), u[None], fresh(1, dtype=torch.int64), fresh(1), 1, V)
        token, _ = guarded("sample", *rows, 30.0, 0, 1.0, 0.0, written=[3, 4])
        assert token.item() == order[place], f"place {place}"


def test_guards_of_attention(threads):
    """Unused pages, and places after a row's end, hold NaN."""
    for H, G, vectors, page, new, contexts in (
        (1, 1, 1, 8, (1,), (0,)),
        (4, 2, 1, 16, (1, 1, 1), (15, 16, 40)),
        (3, 1, 2, 5, (9, 1, 3), (0, 8, 31)),
        (2, 2, 5, 24, (30, 70), (30, 0)),
    ):
        d = vectors * lanes()
        B = len(new)
        T = sum(new)
        need = [cdiv(c + m, page) for c, m in zip(contexts, new, strict=True)]
        P = max(need)
        places = random.Random(P).sample(range(1, sum(need) + 1), sum(need))
        tables = [[places.pop() for _ in range(n)] for n in need]
        cached = Cached.build(new, contexts, tables, page)
        k = normal(sum(need) + 2, G, page, d, seed=1)
        v = normal(sum(need) + 2, G, page, d, seed=2)
        for cache in (k, v):
            cache[[0, -1]] = torch.nan
            for c, m, table in zip(contexts, new, tables, strict=True):
                cache[table[-1], :, (c + m - 1) % page + 1 :] = torch.nan
        qkv = normal(T, (H + 2 * G) * d)
        at = (cached.write_page, cached.write_offset)
        wrote = guarded("kv_write", qkv, k, v, *at, T, H, G, d, page, written=[1, 2])
        want = [k.clone(), v.clone()]
        REFERENCE.kv_write_(qkv, *want, cached)
        assert all(map(bitwise, wrote, want))
        (o,) = guarded(
            "cached_attention", qkv, *wrote, fresh(T, H * d), cached.block_table, cached.cu_queries,
            cached.contexts, B, P, H, G, d, page, written=[3],
        )  # fmt: skip
        assert o.isfinite().all() and bitwise(o, NATIVE.cached_attention(qkv, *wrote, cached))


# ---- batch invariance

SOME = [*range(1, 71), 191, 192, 193, 194, 400]


@pytest.mark.parametrize("count", [2, 3, 4])
def test_a_product_is_batch_invariant(count, threads):
    """For any number of rows and any place among them."""
    n, k = 7 * lanes() + 3, 37
    product = Panels(of_bytes(normal(n, k), count))
    assert product.bytes == count
    x = normal(400, k, seed=1)
    alone = torch.cat([product(row[None]) for row in x])
    assert len({row.numpy().tobytes() for row in alone}) == 400
    for T in SOME:
        rows = torch.randperm(400)[:T]
        assert bitwise(product(x[rows]), alone[rows]), f"{T} rows"


@pytest.mark.parametrize("count", [2, 3, 4])
def test_a_product_is_chains_of_128(count):
    """fma(w_127, x_127, ... fma(w_0, x_0, 0)) + fma(w_255, ... ) + ..., bit for bit, in the tile of
    every height.

    The numbers have so few bits that fp64 holds every step, and fp32 rounds it, once.
    """
    n, k = 3 * lanes(), 300
    g = torch.Generator().manual_seed(count)
    signs = torch.randint(2, (n + 400, k), generator=g) * 2 - 1
    weight = of_bytes((torch.rand(n, k, generator=g) / 2 + 0.5) * signs[:n], count)
    x = of_bytes((torch.rand(400, k, generator=g) / 2 + 0.5) * signs[n:], 6 - count)
    pairs = list(zip(weight.T.double(), x.T.double(), strict=True))
    want = torch.zeros(400, n)
    for start in range(0, k, 128):
        chain = torch.zeros(400, n)
        for w, column in pairs[start : start + 128]:
            chain = (chain.double() + column[:, None] * w).float()
        want = want + chain
    assert not torch.equal(want, (x.double() @ weight.T.double()).float()), "rounding shows"
    for T in (*range(1, 14), 47, 48, 49, 60, 191, 192, 193, 400):
        assert bitwise(Panels(weight)(x[:T]), want[:T]), f"{T} rows"


def test_norms_swiglu_and_rotation_are_batch_invariant(threads):
    """Norms, SwiGLU and rotation, where threads share the work and where they do not.

    torch's form of the norm of heads too, on which a CPU without a C compiler samples.
    """
    T, D, H, G, d = 500, 65, 2, 1, 22
    x, residual, w = normal(T, D), normal(T, D, seed=1), normal(D, seed=2)
    gate_up, qkv = normal(T, 2 * D, seed=3), normal(T, (H + 2 * G) * d, seed=4)
    positions, angles = torch.randint(50, (T,)), normal(50, d, seed=5)
    norms = normal(2 * d, seed=6)

    def all_of(rows):
        rotation = (norms, 1e-5, positions[rows], angles, H, G)
        turned = NATIVE.rope_(qkv[rows].clone(), positions[rows], angles, H, G)
        return (
            *NATIVE.rms_norm_forward(x[rows], w, 1e-5),
            *NATIVE.add_rms_norm_forward(x[rows], residual[rows], w, 1e-5),
            NATIVE.swiglu_forward(gate_up[rows]),
            turned,
            NATIVE.norm_rope_forward(qkv[rows], *rotation),
            TORCH.norm_rope_forward(qkv[rows], *rotation),
        )

    together = all_of(slice(None))
    for t in range(T):
        for a, b in zip(all_of(slice(t, t + 1)), together, strict=True):
            assert bitwise(a[0], b[t]), t
    for a, b in zip(all_of(torch.arange(T).flip(0)), together, strict=True):
        assert bitwise(a.flip(0), b)


class Attended:
    """Rows of given lengths; what attention gives their tokens when they come in some way."""

    def __init__(self, H, G, d, page, lengths):
        self.H, self.G, self.d, self.page = H, G, d, page
        self.rows = [normal(n, (H + 2 * G) * d, seed=i) for i, n in enumerate(lengths)]

    def outputs(self, rows, cuts, decode, seed=0):
        """Output (n, H d) of each of the rows; cuts[i]: the tokens that each forward brings."""
        rng = random.Random(seed)
        size = self.page
        need = {i: cdiv(len(self.rows[i]), size) for i in rows}
        pages = sum(need.values()) + 2
        places = rng.sample(range(pages), pages)
        tables = {}
        for i in rows:
            tables[i] = [places.pop() for _ in range(need[i])]
        k = torch.full((pages, self.G, size, self.d), torch.nan)
        v = k.clone()
        seen = dict.fromkeys(rows, 0)
        out = {i: [] for i in rows}
        for turn in range(max(len(cuts[i]) for i in rows)):
            here = [i for i in rows if turn < len(cuts[i])]
            new = [cuts[i][turn] for i in here]
            contexts = [seen[i] for i in here]
            here_tables = [tables[i] for i in here]
            cached = Cached.build(new, contexts, here_tables, size, decode=decode)
            tokens = [self.rows[i][seen[i] : seen[i] + m] for i, m in zip(here, new, strict=True)]
            qkv = torch.cat(tokens)
            NATIVE.kv_write_(qkv, k, v, cached)
            o = NATIVE.cached_attention(qkv, k, v, cached)
            for i, m, part in zip(here, new, o.split(new), strict=True):
                seen[i] += m
                out[i].append(part)
        return {i: torch.cat(parts) for i, parts in out.items()}


@pytest.mark.parametrize(
    ("H", "G", "vectors", "page"),
    [(4, 2, 1, 16), (3, 1, 4, 64), (6, 2, 2, 8), (2, 2, 3, 20), (1, 1, 5, 24)],
)
def test_attention_is_batch_invariant(H, G, vectors, page, threads):
    """By itself, with neighbours, cut anywhere, with drafts, in other pages, decode or prefill."""
    lengths = (1, page, page + 1, 2 * page + 3, 70, 33)
    attended = Attended(H, G, vectors * lanes(), page, lengths)
    rng = random.Random(1)
    each = list(range(len(lengths)))
    one_by_one = {i: [1] * n for i, n in enumerate(lengths)}
    want = {i: attended.outputs([i], one_by_one, decode=True)[i] for i in each}
    assert all(o.isfinite().all() for o in want.values())

    def cut(n):
        places = sorted(rng.sample(range(1, n), min(n - 1, rng.randint(0, 6))))
        return [b - a for a, b in zip([0, *places], [*places, n], strict=True)]

    ways = [{i: [n] for i, n in enumerate(lengths)}, one_by_one]
    for _ in range(4):
        ways.append({i: cut(n) for i, n in enumerate(lengths)})
    for seed, cuts in enumerate(ways):
        for decode in (True, False):
            for rows in (each, each[::-1], rng.sample(each, 3)):
                got = attended.outputs(rows, cuts, decode, seed)
                for i, o in got.items():
                    assert bitwise(o, want[i]), f"row {i} of {rows}, cut into {cuts[i]}"


# ---- panels

PLANTED = {  # upper bytes that hold it -> numbers
    2: [0x7F800000, -0x00800000, -0x80000000, 0x00010000, 0x7FC50000, 0x7F810000],  # +-inf, -0.0
    3: [0x00000100, 0x7FC00100, 0x7F800100, 0x3F812300],  # denormal, NaNs quiet and signalling
    4: [0x00000001, -0x7FFFFFFF, 0x7FC00001, -0x00000001, 0x3F800001],
}


@pytest.mark.parametrize("count", [2, 3, 4])
def test_panels_hold_a_weight_bit_for_bit(count):
    for n, k in ((1, 1), (2 * lanes(), 4), (2 * lanes() + 1, 7), (77, 33), (301, 1)):
        weight = of_bytes(normal(n, k), count)
        words = weight.view(torch.int32).view(-1)
        for i, word in enumerate(PLANTED[count][: n * k]):
            words[-1 - i * 7 % len(words)] = word
        made = Panels(weight)
        assert made.bytes == count and made.shape == weight.shape
        assert bitwise(made.unpack(), weight)
        rows = torch.randint(n, (97,))
        assert bitwise(made[rows], weight[rows]) and made[rows[:0]].shape == (0, k)
        assert bitwise(made[rows[::2]], weight[rows[::2]]), "rows with gaps between them"
        across = torch.empty(k, n).T.copy_(weight)
        assert bitwise(Panels(across).unpack(), weight), "a transposed weight"


def test_bytes_needed_are_found_wherever_the_number_stands(monkeypatch):
    """Also where it stands in a part of its own, and after parts that need fewer."""
    words = ((0x3F810000, 2), (0x100, 3), (0x8000, 3), (1, 4), (0x80, 4), (-1, 4))
    for chunk in (1 << 22, 64):
        monkeypatch.setattr(panels, "CHUNK", chunk)
        for word, count in words:
            weight = torch.ones(13, 5)
            weight.view(torch.int32)[-1, -1] = word
            assert bytes_needed(weight) == count, hex(word)
            weight = weight.flip(0, 1)
            assert bytes_needed(weight.contiguous()) == count, hex(word)
    assert bytes_needed(torch.zeros(3, 3)) == 2


def test_indices_and_inputs_that_do_not_fit_are_refused():
    made = Panels(normal(10, 4))
    for rows in ([10], [-1], [3, 10, 2]):
        with pytest.raises(AssertionError, match="of 10"):
            made[torch.tensor(rows)]
    with pytest.raises(AssertionError):
        made[torch.zeros(2, 2, dtype=torch.int64)]
    with pytest.raises(AssertionError, match="expected contiguous torch.int64"):
        made[torch.zeros(2, dtype=torch.int32)]
    with pytest.raises(AssertionError, match="does not fit 10 x 4"):
        made(torch.zeros(2, 5))
    with pytest.raises(AssertionError, match="expected contiguous torch.float32"):
        made(torch.zeros(2, 4, dtype=torch.float64))
    assert made(torch.zeros(0, 4)).shape == (0, 10)


def test_fp32_weights_on_a_cpu_can_be_packed_and_no_others():
    assert Panels.available(torch.zeros(2, 2))
    for weight in (torch.zeros(2, 2).double(), torch.zeros(2, 2).bfloat16()):
        assert not Panels.available(weight)
    assert not Panels.available(torch.zeros(2, 2, device="meta"))
    with native.loading_by(Loader(loaded=Loaded(reason="no compiler"))):
        assert not Panels.available(torch.zeros(2, 2))


def test_heads_that_are_no_whole_vectors_are_refused():
    d = lanes() + lanes() // 2
    cached = Cached.build([1], [0], [[0]], 8)
    k = torch.zeros(1, 1, 8, d)
    with pytest.raises(
        AssertionError, match=f"heads of {d} are not a multiple of the vector width"
    ):
        NATIVE.cached_attention(torch.zeros(1, 3 * d), k, k, cached)


def test_a_product_without_memory_raises_and_writes_nothing(threads):
    x, y = torch.ones(1, 8), fresh(1, 8)
    bits, count = packed(torch.ones(8, 8))
    places = x.data_ptr(), bits.data_ptr(), None, y.data_ptr()
    with pytest.raises(MemoryError, match="no memory for a thread's buffers in the native linear"):
        native.library().linear(*places, count, 1, 2**50, 8)  # of so many inputs
    assert y.isnan().all()
    native.library().linear(*places, count, 1, 8, 8)
    assert torch.equal(y, torch.full((1, 8), 8.0)), "the next call has what it needs"


# ---- shared out


def test_many_threads_give_the_bits_of_one():
    """More than there are cores, and than a product has panels; far more panels than chunks."""
    wide = normal(2100 * lanes() + 5, 9)
    tall = normal(3 * lanes(), 400)
    x = normal(50, 9, seed=1)
    y = normal(700, 400, seed=2)
    seen = []
    before = torch.get_num_threads()
    try:
        for count in (1, 2, 3, 7, 16):
            torch.set_num_threads(count)
            seen.append((Panels(wide)(x), Panels(tall)(y)))
    finally:
        torch.set_num_threads(before)
    for made in seen:
        assert all(map(bitwise, made, seen[0]))


# ---- the same tests on other builds

BUILDS = {  # flags instead of -march=native, and the processor flags that it takes to run them
    "avx2": (["-O3", "-march=haswell"], {"avx2", "fma", "bmi2", "movbe", "f16c", "abm"}),
    "avx512": (
        ["-O3", "-march=skylake-avx512"],
        {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "bmi2", "movbe", "abm", "adx"},
    ),
    "sanitized": (
        ["-O1", "-g", "-march=native", "-fsanitize=address,undefined", "-fno-sanitize-recover"],
        set(),
    ),
    # threads that lose their core at every turn, and do at once what another has in hand
    "stalled": (["-O3", "-march=native", "-DSTALLED"], set()),
}


def runtimes(compiler):
    """The sanitizers' libraries, or a skip."""
    paths = []
    for name in ("libasan.so", "libubsan.so"):
        command = [compiler, f"-print-file-name={name}"]
        path = subprocess.run(command, capture_output=True, text=True).stdout.strip()
        if not os.path.isabs(path):
            pytest.skip(f"{compiler} has no {name}")
        paths.append(path)
    return " ".join(paths)


@pytest.mark.skipif(bool(OTHER), reason="this is such a build")
@pytest.mark.parametrize("build", BUILDS)
def test_these_tests_pass_on_other_builds(build, tmp_path):
    flags, needs = BUILDS[build]
    missing = needs - set(native._processor().split())
    if missing:
        pytest.skip(f"the processor has no {', '.join(sorted(missing))}")
    env = os.environ | {"OMP_NUM_THREADS": "2"}
    if build == "sanitized":
        env |= {
            "LD_PRELOAD": runtimes(native._compiler()[0]),
            "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
            "UBSAN_OPTIONS": "print_stacktrace=1",
        }
    common = tuple(f for f in native.FLAGS if not f.startswith(("-O", "-march")))
    env[tested_library.VARIABLE] = str(native.build(tmp_path, (*common, *flags)))
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    command += ["-p", tested_library.__name__, __file__]
    command += [str(Path(__file__).with_name("test_fused_layers.py")), "-k", "not profile"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert " passed" in done.stdout


def test_the_build_is_the_one_under_test():
    """Or else the tests of other builds would be tests of this one."""
    if OTHER:
        assert native.library()._name == OTHER
    objdump = shutil.which("objdump")
    if not objdump:
        pytest.skip("objdump is not there")
    said = subprocess.run(
        [objdump, "-d", "--no-show-raw-insn", native.library()._name],
        capture_output=True, text=True,
    ).stdout  # fmt: skip
    assert ("%zmm" in said) == (lanes() == 16) and "vfmadd" in said
