"""What benchmarks/kernels.py times: the calls of every operation, their floors, their inputs.

CALLS   (operation, call) -> how a table of operations is called; a backward can also be timed as
        autograd does it, on the graph of a differentiable table
WORK    (operation, call) -> (operations, bytes that must be moved) of a shape, from which floors
        are made; a shape is the one the operation's SPEC documents
BY_HAND forms that one would write without us, beside those of the tables
"""

# T, t = tokens, D, d = model width, V, v = vocabulary, e = bytes of an element, i = inputs
# o = table of operations, s = what the forward saved; in attention d = head size

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks._common import typed
from kernels.adamw import AdamW
from kernels.registry import REFERENCE, SPECS, Ops
from kernels.spec import Spec

# ---- forms that are in no table


def peft_forward(x: Tensor, weight: Tensor, group: Any = None, dropout: Any = None) -> tuple:
    """A linear and an adapter per module, as peft calls them; (outputs of the modules, None)."""
    ys = [F.linear(x, w) for w in weight.split(group.sizes)]
    for i, _, columns in group.members():
        ys[i] = ys[i] + F.linear(F.linear(x, group.a[columns]), group.b[i]) * group.scale
    return ys, None


def sdpa(q: Tensor, k: Tensor, v: Tensor, packed: Any) -> tuple[Tensor, ...]:
    """torch's fused attention of q (T, H, d), k and v (T, G, d): o (tokens, H d) of each batch.

    Equal rows are one batch, others come one after the other. Nothing is copied here: what is timed
    is torch's work alone.
    """
    equal = len({end - start for start, end in packed.rows}) == 1
    outs = []
    for start, end in [(0, q.shape[0])] if equal else packed.rows:
        length = packed.rows[0][1] - packed.rows[0][0] if equal else end - start
        parts = (t[start:end].unflatten(0, (-1, length)).transpose(1, 2) for t in (q, k, v))
        gqa = q.shape[1] != k.shape[1]
        o = F.scaled_dot_product_attention(*parts, is_causal=True, enable_gqa=gqa)
        outs.append(o.transpose(1, 2).flatten(0, 1).flatten(1))  # (rows, H, L, d) before
    return tuple(outs)


def sdpa_forward(qkv: Tensor, packed: Any, H: int, G: int) -> tuple[tuple[Tensor, ...], None]:
    """The outputs of `sdpa`, and no log-sums."""
    return sdpa(*qkv.unflatten(1, (H + 2 * G, -1)).split((H, G, G), dim=1), packed), None


BY_HAND = {
    "lora_linear": dataclasses.replace(REFERENCE, name="peft", lora_linear_forward=peft_forward),
    "attention": dataclasses.replace(REFERENCE, name="sdpa", attention_forward=sdpa_forward),
}
DIFFERENTIABLE = ("eager", "compiled", "peft", "sdpa")  # tables whose backward is autograd's
NO_EAGER = {"sample": "the definition sorts the vocabulary in Python"}

# ---- what is called


@dataclass(frozen=True)
class Call:
    """One timed function of an operation."""

    run: Callable[[Ops, dict, Any], Any]  # (table, inputs, saved)
    saved: Callable[[Ops, dict], Any] = lambda ops, i: None  # what its forward left, made once
    # of a backward: (outputs, leaves, output gradients) for autograd, from a differentiable table
    graph: Callable[[Ops, dict], tuple] | None = None


def _leaf(t: Tensor) -> Tensor:
    return t.detach().requires_grad_()


def _norm_graph(ops: Ops, i: dict) -> tuple:
    x = _leaf(i["x"])
    return ops.rms_norm_forward(x, i["w"], i["eps"])[0], (x,), i["dy"]


def _add_norm_graph(ops: Ops, i: dict) -> tuple:
    x, residual = _leaf(i["x"]), _leaf(i["residual"])
    y, h, _ = ops.add_rms_norm_forward(x, residual, i["w"], i["eps"])
    return (y, h), (x, residual), (i["dy"], i["dh"])


def _swiglu_graph(ops: Ops, i: dict) -> tuple:
    gate_up = _leaf(i["gate_up"])
    return ops.swiglu_forward(gate_up), (gate_up,), i["dh"]


def _linear_graph(ops: Ops, i: dict) -> tuple:
    x, a, b = _leaf(i["x"]), _leaf(i["group"].a), [_leaf(b) for b in _adapted(i["group"].b)]
    it = iter(b)
    views = tuple(None if old is None else next(it) for old in i["group"].b)
    y = ops.lora_linear_forward(x, i["w"], dataclasses.replace(i["group"], a=a, b=views))[0]
    dy = i["dy"] if isinstance(y, Tensor) else i["dy"].split(i["group"].sizes, dim=1)
    return y, (x, a, *b), dy


def _attention_graph(ops: Ops, i: dict) -> tuple:
    if ops is BY_HAND["attention"]:  # q, k, v as three leaves: their gradients are not joined
        H, G = i["H"], i["G"]
        leaves = tuple(map(_leaf, i["qkv"].unflatten(1, (H + 2 * G, -1)).split((H, G, G), dim=1)))
        outs = sdpa(*leaves, i["packed"])
        return outs, leaves, i["do"].split([len(o) for o in outs])
    qkv = _leaf(i["qkv"])
    return ops.attention_forward(qkv, i["packed"], i["H"], i["G"])[0], (qkv,), i["do"]


def _adapted(values: tuple) -> list:
    return [v for v in values if v is not None]


def _rope(ops: Ops, i: dict, inverse: bool) -> Tensor:
    return ops.rope_(i["qkv"], i["positions"], i["cos_sin"], i["H"], i["G"], inverse=inverse)


def _loss(ops: Ops, i: dict, need_grad: bool) -> Any:
    return ops.linear_cross_entropy(i["hidden"], i["head"], i["targets"], need_grad=need_grad)


_ADAMW = AdamW()

CALLS: dict[tuple[str, str], Call] = {
    ("rms_norm", "forward"): Call(lambda o, i, s: o.rms_norm_forward(i["x"], i["w"], i["eps"])),
    ("rms_norm", "backward"): Call(
        lambda o, i, s: o.rms_norm_backward(i["dy"], i["x"], i["w"], s[1]),
        lambda o, i: o.rms_norm_forward(i["x"], i["w"], i["eps"]),
        _norm_graph,
    ),
    ("rms_norm", "add forward"): Call(
        lambda o, i, s: o.add_rms_norm_forward(i["x"], i["residual"], i["w"], i["eps"])
    ),
    ("rms_norm", "add backward"): Call(
        lambda o, i, s: o.add_rms_norm_backward(i["dy"], i["dh"], s[1], i["w"], s[2]),
        lambda o, i: o.add_rms_norm_forward(i["x"], i["residual"], i["w"], i["eps"]),
        _add_norm_graph,
    ),
    ("rope", "forward"): Call(lambda o, i, s: _rope(o, i, False)),
    ("rope", "backward"): Call(lambda o, i, s: _rope(o, i, True)),
    ("swiglu", "forward"): Call(lambda o, i, s: o.swiglu_forward(i["gate_up"])),
    ("swiglu", "backward"): Call(
        lambda o, i, s: o.swiglu_backward(i["dh"], i["gate_up"]), graph=_swiglu_graph
    ),
    ("lora_linear", "forward"): Call(
        lambda o, i, s: o.lora_linear_forward(i["x"], i["w"], i["group"])
    ),
    ("lora_linear", "backward"): Call(
        lambda o, i, s: o.lora_linear_backward(i["dy"], i["x"], i["w"], s[1], i["group"]),
        lambda o, i: o.lora_linear_forward(i["x"], i["w"], i["group"]),
        _linear_graph,
    ),
    ("linear", "forward"): Call(lambda o, i, s: o.linear(i["x"], i["w"])),
    ("attention", "forward"): Call(
        lambda o, i, s: o.attention_forward(i["qkv"], i["packed"], i["H"], i["G"])
    ),
    ("attention", "backward"): Call(
        lambda o, i, s: o.attention_backward(
            i["do"], i["qkv"], s[0], s[1], i["packed"], i["H"], i["G"]
        ),
        lambda o, i: o.attention_forward(i["qkv"], i["packed"], i["H"], i["G"]),
        _attention_graph,
    ),
    ("cached_attention", "write"): Call(
        lambda o, i, s: o.kv_write_(i["qkv"], i["k"], i["v"], i["cached"])
    ),
    ("cached_attention", "forward"): Call(
        lambda o, i, s: o.cached_attention(i["qkv"], i["k"], i["v"], i["cached"])
    ),
    ("linear_cross_entropy", "forward"): Call(lambda o, i, s: _loss(o, i, False)),
    ("linear_cross_entropy", "forward and backward"): Call(lambda o, i, s: _loss(o, i, True)),
    ("adamw", "step"): Call(
        lambda o, i, s: o.adamw_(i["params"], i["grads"], i["m"], i["v"], s[0], _ADAMW, s[1]),
        lambda o, i: (
            _ADAMW.scalars(1e-4, 1, 1.0, i["params"].device),
            torch.empty_like(i["params"], dtype=torch.bfloat16),
        ),
    ),
    ("adamw", "norm"): Call(lambda o, i, s: o.grad_norm(i["grads"])),
    ("sample", "forward"): Call(lambda o, i, s: o.sample(i["logits"], i["rows"])),
}


def _linear_work(t: int, k: int, r: int, *sizes: int, e: int, backward: bool) -> tuple:
    n, on = sum(sizes), sizes if len(sizes) == 2 else sizes[:1] + sizes[2:]  # k has no adapter
    flops = 2 * t * (n * k + r * len(on) * k + r * sum(on))
    adapter = r * len(on) * k + r * sum(on)
    size = e * (t * k + n * k + t * n + t * r * len(on) + adapter)
    if not backward:
        return flops, size
    # dx as y; dS, dB, dA, dS A: twice the adapter's products; its gradients are added to in fp32
    return flops + 2 * t * adapter, size + e * t * k + 8 * adapter


def _cached_work(h: int, g: int, d: int, page: int, even: int, odd: int, *rows: int, e: int):
    new = [odd if i % 2 else even for i in range(len(rows))]
    pairs = sum(m * c + m * (m + 1) / 2 for m, c in zip(new, rows, strict=True))
    return 4 * h * d * pairs, e * d * (2 * g * (sum(rows) + sum(new)) + 2 * h * sum(new))


def _attention_work(h: int, g: int, d: int, *rows: int, e: int) -> tuple:
    t, pairs = sum(rows), sum(n * (n + 1) / 2 for n in rows)
    return 4 * h * d * pairs, e * t * d * (2 * h + 2 * g) + 4 * t * h


# (operation, call) -> floor: (operations, bytes that must be moved) of a shape.
WORK: dict[tuple[str, str], Callable[..., tuple[float, float]]] = {
    ("rms_norm", "forward"): lambda t, d, e: (4 * t * d, 2 * t * d * e),
    ("rms_norm", "backward"): lambda t, d, e: (8 * t * d, 3 * t * d * e),
    ("rms_norm", "add forward"): lambda t, d, e: (5 * t * d, 4 * t * d * e),
    ("rms_norm", "add backward"): lambda t, d, e: (9 * t * d, 4 * t * d * e),
    ("rope", "forward"): lambda t, h, g, d, e: (3 * t * (h + g) * d, 2 * t * (h + g) * d * e),
    ("rope", "backward"): lambda t, h, g, d, e: (3 * t * (h + g) * d, 2 * t * (h + g) * d * e),
    ("swiglu", "forward"): lambda t, f, e: (6 * t * f, 3 * t * f * e),
    ("swiglu", "backward"): lambda t, f, e: (12 * t * f, 5 * t * f * e),
    ("lora_linear", "forward"): lambda *s, e: _linear_work(*s, e=e, backward=False),
    ("lora_linear", "backward"): lambda *s, e: _linear_work(*s, e=e, backward=True),
    ("linear", "forward"): lambda t, k, n, e: (2 * t * k * n, (t * k + n * k + t * n) * e),
    ("attention", "forward"): _attention_work,
    # five products where the forward has two; reads qkv, o, do, writes dqkv
    ("attention", "backward"): lambda h, g, d, *rows, e: (
        2.5 * _attention_work(h, g, d, *rows, e=e)[0],
        e * sum(rows) * d * (4 * h + 4 * g) + 4 * sum(rows) * h,
    ),
    ("cached_attention", "forward"): _cached_work,
    ("cached_attention", "write"): lambda h, g, d, page, even, odd, *rows, e: (
        0,
        4 * g * d * e * sum(odd if i % 2 else even for i in range(len(rows))),
    ),
    ("linear_cross_entropy", "forward"): lambda n, d, v, e: (2 * n * d * v, (n + v) * d * e),
    ("linear_cross_entropy", "forward and backward"): lambda n, d, v, e: (
        4 * n * d * v,
        (2 * n + v) * d * e,
    ),
    ("adamw", "step"): lambda p, e: (15 * p, 30 * p),  # reads 4, writes 3 in fp32; 1 in bf16
    ("adamw", "norm"): lambda p, e: (2 * p, 4 * p),
    ("sample", "forward"): lambda b, v, *settings, e: (5 * b * v, b * v * e),
}


def rows_of(operation: str, shape: tuple[int, ...]) -> int:
    """What --rows compares with: tokens, or the rows of a decode step; parameters of adamw."""
    skip = {"attention": 3, "cached_attention": 6}.get(operation)
    if skip is None:
        return shape[0]
    return sum(shape[skip:]) if operation == "attention" else len(shape) - skip


def make_inputs(operation: str, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> dict:
    """A spec's inputs, drawn on the device; optimizer state and gradients in fp32."""
    spec = on_device(SPECS[operation], device)
    return typed(spec, spec.make_inputs(shape, torch.Generator().manual_seed(0)), dtype, device)


def on_device(spec: Spec, device: str) -> Spec:
    """The spec with inputs that are drawn where they are used."""

    def made(shape: tuple[int, ...], g: torch.Generator) -> dict:
        there = torch.Generator(device).manual_seed(g.initial_seed())
        with torch.device(device):
            return spec.make_inputs(shape, there)

    return dataclasses.replace(spec, make_inputs=made)
