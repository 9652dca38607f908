"""How benchmarks/kernels.py calls every operation, and the inputs that it draws.

CALLS    (operation, call) -> a Call: how a table of operations is called. The backward of a
         differentiable table is timed as autograd does it, on a graph that `Call.graph` makes.
BY_HAND  forms that one would write without this project, beside those of the tables

benchmarks/work.py has the operations and bytes of each call.
"""

# T = tokens, D = model width, H = query heads, G = key/value heads, d = head size
# L = tokens of a row, when all rows are equally long

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

Inputs = dict[str, Any]  # the inputs that an operation's SPEC makes, by name
Saved = Any  # the result of the forward, which the backward of the same call takes
Graph = tuple[Any, tuple[Tensor, ...], Any]  # outputs, leaves, gradients of the outputs

# ---- forms that are in no table


def peft_forward(x: Tensor, weight: Tensor, group: Any = None, dropout: Any = None) -> tuple:
    """One linear, and an adapter for each module, as peft calls them.

    Returns (outputs of the modules, None).
    """
    outputs = []
    for member_weight in weight.split(group.sizes):
        outputs.append(F.linear(x, member_weight))
    for i, _, columns in group.members():
        s = F.linear(x, group.a[columns])  # (T, r)
        outputs[i] = outputs[i] + F.linear(s, group.b[i]) * group.scale
    return outputs, None


def sdpa(q: Tensor, k: Tensor, v: Tensor, packed: Any) -> tuple[Tensor, ...]:
    """torch's fused attention of q (T, H, d), k and v (T, G, d): o (tokens, H d) of each batch.

    Rows of equal length are one batch; others are computed one after the other. Nothing is copied
    here, so torch's work alone is timed.
    """
    lengths = {end - start for start, end in packed.rows}
    if len(lengths) == 1:
        batches = [(0, q.shape[0], lengths.pop())]
    else:
        batches = [(start, end, end - start) for start, end in packed.rows]
    is_grouped = q.shape[1] != k.shape[1]
    outputs = []
    for start, end, length in batches:
        by_row = (-1, length)
        batch_q = q[start:end].unflatten(0, by_row).transpose(1, 2)  # (rows, H, L, d)
        batch_k = k[start:end].unflatten(0, by_row).transpose(1, 2)  # (rows, G, L, d)
        batch_v = v[start:end].unflatten(0, by_row).transpose(1, 2)  # (rows, G, L, d)
        o = F.scaled_dot_product_attention(
            batch_q, batch_k, batch_v, is_causal=True, enable_gqa=is_grouped
        )
        o = o.transpose(1, 2)  # (rows, L, H, d)
        outputs.append(o.flatten(0, 1).flatten(1))  # (tokens, H d)
    return tuple(outputs)


def split_heads(qkv: Tensor, H: int, G: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views q (T, H, d), k (T, G, d), v (T, G, d) of qkv (T, (H + 2G) d)."""
    heads = qkv.unflatten(1, (H + 2 * G, -1))  # (T, H + 2G, d)
    return heads.split((H, G, G), dim=1)


def sdpa_forward(qkv: Tensor, packed: Any, H: int, G: int) -> tuple[tuple[Tensor, ...], None]:
    """The outputs of `sdpa`, and None in place of the log-sums."""
    q, k, v = split_heads(qkv, H, G)
    return sdpa(q, k, v, packed), None


BY_HAND = {
    "lora_linear": dataclasses.replace(REFERENCE, name="peft", lora_linear_forward=peft_forward),
    "attention": dataclasses.replace(REFERENCE, name="sdpa", attention_forward=sdpa_forward),
}
DIFFERENTIABLE = ("eager", "compiled", "peft", "sdpa")  # tables whose backward is autograd's
# calls that are timed in TORCH and in our kernels only: by hand one would draw another mask
HAND_WRITTEN_ONLY = {
    ("lora_linear", "forward, dropout"),
    ("lora_linear", "backward, dropout"),
}
NO_EAGER = {"sample": "the definition sorts the vocabulary in Python"}

# ---- the calls


def nothing_saved(ops: Ops, inputs: Inputs) -> None:
    """A forward has no forward before it."""


@dataclass(frozen=True)
class Call:
    """One timed function of an operation."""

    run: Callable[[Ops, Inputs, Saved], Any]  # the timed function
    saved: Callable[[Ops, Inputs], Saved] = nothing_saved  # made once, before the timing
    # for a backward, from a differentiable table: the graph whose gradients autograd computes
    graph: Callable[[Ops, Inputs], Graph] | None = None


def leaf(t: Tensor) -> Tensor:
    """A view of `t` that autograd computes a gradient for."""
    return t.detach().requires_grad_()


def rms_norm_forward(ops: Ops, inputs: Inputs, saved: Saved = None) -> Any:
    return ops.rms_norm_forward(inputs["x"], inputs["w"], inputs["eps"])


def rms_norm_backward(ops: Ops, inputs: Inputs, saved: Saved) -> Any:
    _, rstd = saved
    return ops.rms_norm_backward(inputs["dy"], inputs["x"], inputs["w"], rstd)


def rms_norm_graph(ops: Ops, inputs: Inputs) -> Graph:
    x = leaf(inputs["x"])
    y, _ = ops.rms_norm_forward(x, inputs["w"], inputs["eps"])
    return y, (x,), inputs["dy"]


def add_rms_norm_forward(ops: Ops, inputs: Inputs, saved: Saved = None) -> Any:
    x, residual = inputs["x"], inputs["residual"]
    return ops.add_rms_norm_forward(x, residual, inputs["w"], inputs["eps"])


def add_rms_norm_backward(ops: Ops, inputs: Inputs, saved: Saved) -> Any:
    _, h, rstd = saved
    return ops.add_rms_norm_backward(inputs["dy"], inputs["dh"], h, inputs["w"], rstd)


def add_rms_norm_graph(ops: Ops, inputs: Inputs) -> Graph:
    x = leaf(inputs["x"])
    residual = leaf(inputs["residual"])
    y, h, _ = ops.add_rms_norm_forward(x, residual, inputs["w"], inputs["eps"])
    return (y, h), (x, residual), (inputs["dy"], inputs["dh"])


def rope(ops: Ops, inputs: Inputs, inverse: bool) -> Any:
    qkv, positions, cos_sin = inputs["qkv"], inputs["positions"], inputs["cos_sin"]
    return ops.rope_(qkv, positions, cos_sin, inputs["H"], inputs["G"], inverse=inverse)


def rope_forward(ops: Ops, inputs: Inputs, saved: Saved = None) -> Any:
    return rope(ops, inputs, inverse=False)


def rope_backward(ops: Ops, inputs: Inputs, saved: Saved) -> Any:
    return rope(ops, inputs, inverse=True)


def norm_rope_arguments(inputs: Inputs) -> tuple:
    names = ("qkv", "norms", "eps", "positions", "cos_sin", "H", "G")
    return tuple(inputs[name] for name in names)


def norm_rope_forward(ops: Ops, inputs: Inputs, saved: Saved = None) -> Any:
    return ops.norm_rope_forward(*norm_rope_arguments(inputs))


def norm_rope_backward(ops: Ops, inputs: Inputs, saved: Saved) -> Any:
    return ops.norm_rope_backward_(inputs["dqkv"], *norm_rope_arguments(inputs))


def norm_rope_graph(ops: Ops, inputs: Inputs) -> Graph:
    qkv, *others = norm_rope_arguments(inputs)
    qkv = leaf(qkv)
    return ops.norm_rope_forward(qkv, *others), (qkv,), inputs["dqkv"]


def swiglu_forward(ops: Ops, inputs: Inputs, saved: Saved = None) -> Any:
    return ops.swiglu_forward(inputs["gate_up"])


def swiglu_backward(ops: Ops, inputs: Inputs, saved: Saved) -> Any:
    return ops.swiglu_backward(inputs["dh"], inputs["gate_up"])


def swiglu_graph(ops: Ops, inputs: Inputs) -> Graph:
    gate_up = leaf(inputs["gate_up"])
    return ops.swiglu_forward(gate_up), (gate_up,), inputs["dh"]


def lora_linear_forward(ops: Ops, inputs: Inputs, saved: Saved = None) -> Any:
    return ops.lora_linear_forward(inputs["x"], inputs["w"], inputs["group"])


def lora_linear_backward(ops: Ops, inputs: Inputs, saved: Saved) -> Any:
    _, s = saved
    return ops.lora_linear_backward(inputs["dy"], inputs["x"], inputs["w"], s, inputs["group"])


def lora_linear_forward_dropout(ops: Ops, inputs: Inputs, saved: Saved = None) -> Any:
    return ops.lora_linear_forward(inputs["x"], inputs["w"], inputs["group"], inputs["drop"])


def lora_linear_backward_dropout(ops: Ops, inputs: Inputs, saved: Saved) -> Any:
    _, s = saved
    dy, x, weight, group = inputs["dy"], inputs["x"], inputs["w"], inputs["group"]
    return ops.lora_linear_backward(dy, x, weight, s, group, dropout=inputs["drop"])


def lora_linear_graph(ops: Ops, inputs: Inputs) -> Graph:
    group = inputs["group"]
    x = leaf(inputs["x"])
    a = leaf(group.a)
    all_b = [None if b is None else leaf(b) for b in group.b]  # None: a member without an adapter
    adapted_b = [b for b in all_b if b is not None]
    trained = dataclasses.replace(group, a=a, b=tuple(all_b))
    y, _ = ops.lora_linear_forward(x, inputs["w"], trained)
    dy = inputs["dy"]
    if not isinstance(y, Tensor):  # peft's form: an output for each member
        dy = dy.split(group.sizes, dim=1)
    return y, (x, a, *adapted_b), dy


def linear_forward(ops: Ops, inputs: Inputs, saved: Saved = None) -> Any:
    return ops.linear(inputs["x"], inputs["w"])


def attention_forward(ops: Ops, inputs: Inputs, saved: Saved = None) -> Any:
    return ops.attention_forward(inputs["qkv"], inputs["packed"], inputs["H"], inputs["G"])


def attention_backward(ops: Ops, inputs: Inputs, saved: Saved) -> Any:
    o, lse = saved
    qkv, packed = inputs["qkv"], inputs["packed"]
    return ops.attention_backward(inputs["do"], qkv, o, lse, packed, inputs["H"], inputs["G"])


def attention_graph(ops: Ops, inputs: Inputs) -> Graph:
    H, G, packed = inputs["H"], inputs["G"], inputs["packed"]
    if ops is BY_HAND["attention"]:  # q, k, v as three leaves: their gradients are not joined
        q, k, v = split_heads(inputs["qkv"], H, G)
        leaves = (leaf(q), leaf(k), leaf(v))
        outputs = sdpa(*leaves, packed)
        return outputs, leaves, inputs["do"].split([len(o) for o in outputs])
    qkv = leaf(inputs["qkv"])
    o, _ = ops.attention_forward(qkv, packed, H, G)
    return o, (qkv,), inputs["do"]


def cache_write(ops: Ops, inputs: Inputs, saved: Saved = None) -> Any:
    return ops.kv_write_(inputs["qkv"], inputs["k"], inputs["v"], inputs["cached"])


def cached_attention_forward(ops: Ops, inputs: Inputs, saved: Saved = None) -> Any:
    return ops.cached_attention(inputs["qkv"], inputs["k"], inputs["v"], inputs["cached"])


def loss(ops: Ops, inputs: Inputs, need_grad: bool) -> Any:
    hidden, head, targets = inputs["hidden"], inputs["head"], inputs["targets"]
    return ops.linear_cross_entropy(hidden, head, targets, need_grad=need_grad)


def loss_forward(ops: Ops, inputs: Inputs, saved: Saved = None) -> Any:
    return loss(ops, inputs, need_grad=False)


def loss_forward_and_backward(ops: Ops, inputs: Inputs, saved: Saved = None) -> Any:
    return loss(ops, inputs, need_grad=True)


ADAMW = AdamW()


def adamw_state(ops: Ops, inputs: Inputs) -> Saved:
    """The scalars of step 1, and the bf16 copy of the parameters that the step writes."""
    params = inputs["params"]
    scalars = ADAMW.scalars(1e-4, 1, 1.0, params.device)
    return scalars, torch.empty_like(params, dtype=torch.bfloat16)


def adamw_step(ops: Ops, inputs: Inputs, saved: Saved) -> Any:
    scalars, copy = saved
    params, grads, m, v = inputs["params"], inputs["grads"], inputs["m"], inputs["v"]
    return ops.adamw_(params, grads, m, v, scalars, ADAMW, copy)


def grad_norm(ops: Ops, inputs: Inputs, saved: Saved = None) -> Any:
    return ops.grad_norm(inputs["grads"])


def sample(ops: Ops, inputs: Inputs, saved: Saved = None) -> Any:
    return ops.sample(inputs["logits"], inputs["rows"])


CALLS: dict[tuple[str, str], Call] = {
    ("rms_norm", "forward"): Call(rms_norm_forward),
    ("rms_norm", "backward"): Call(rms_norm_backward, rms_norm_forward, rms_norm_graph),
    ("rms_norm", "add forward"): Call(add_rms_norm_forward),
    ("rms_norm", "add backward"): Call(
        add_rms_norm_backward, add_rms_norm_forward, add_rms_norm_graph
    ),
    ("rope", "forward"): Call(rope_forward),
    ("rope", "backward"): Call(rope_backward),
    ("norm_rope", "forward"): Call(norm_rope_forward),
    ("norm_rope", "backward"): Call(norm_rope_backward, graph=norm_rope_graph),
    ("swiglu", "forward"): Call(swiglu_forward),
    ("swiglu", "backward"): Call(swiglu_backward, graph=swiglu_graph),
    ("lora_linear", "forward"): Call(lora_linear_forward),
    ("lora_linear", "backward"): Call(lora_linear_backward, lora_linear_forward, lora_linear_graph),
    ("lora_linear", "forward, dropout"): Call(lora_linear_forward_dropout),
    ("lora_linear", "backward, dropout"): Call(
        lora_linear_backward_dropout, lora_linear_forward_dropout
    ),
    ("linear", "forward"): Call(linear_forward),
    ("attention", "forward"): Call(attention_forward),
    ("attention", "backward"): Call(attention_backward, attention_forward, attention_graph),
    ("cached_attention", "write"): Call(cache_write),
    ("cached_attention", "forward"): Call(cached_attention_forward),
    ("linear_cross_entropy", "forward"): Call(loss_forward),
    ("linear_cross_entropy", "forward and backward"): Call(loss_forward_and_backward),
    ("adamw", "step"): Call(adamw_step, adamw_state),
    ("adamw", "norm"): Call(grad_norm),
    ("sample", "forward"): Call(sample),
}

# ---- inputs


def make_inputs(operation: str, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Inputs:
    """A spec's inputs, drawn on the device; optimizer state and gradients in fp32."""
    spec = on_device(SPECS[operation], device)
    return typed(spec, spec.make_inputs(shape, torch.Generator().manual_seed(0)), dtype, device)


def on_device(spec: Spec, device: str) -> Spec:
    """The spec with inputs that are drawn on the device where they are used."""

    def make_inputs_there(shape: tuple[int, ...], g: torch.Generator) -> Inputs:
        generator = torch.Generator(device).manual_seed(g.initial_seed())
        with torch.device(device):
            return spec.make_inputs(shape, generator)

    return dataclasses.replace(spec, make_inputs=make_inputs_there)
