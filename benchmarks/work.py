"""The arithmetic operations of every timed call, and the bytes that it must move.

benchmarks/kernels.py makes its floors from them: no form of the call can be faster than its
operations at the rate of a large product, or its bytes at the rate of a large copy.
A multiplication and an addition are two operations; bytes are each input read once and each output
written once.
"""

from __future__ import annotations

from collections.abc import Callable

Work = tuple[float, float]  # operations, bytes

# t = tokens, d = model width (in attention: head size), f = width of the MLP, v = vocabulary
# h = query heads, g = key/value heads, e = bytes of an element; rows = tokens of each row
# A shape is the one that the operation's SPEC documents.


def rms_norm_forward(t: int, d: int, e: int) -> Work:
    return 4 * t * d, 2 * t * d * e


def rms_norm_backward(t: int, d: int, e: int) -> Work:
    return 8 * t * d, 3 * t * d * e


def add_rms_norm_forward(t: int, d: int, e: int) -> Work:
    return 5 * t * d, 4 * t * d * e


def add_rms_norm_backward(t: int, d: int, e: int) -> Work:
    return 9 * t * d, 4 * t * d * e


def rope(t: int, h: int, g: int, d: int, e: int) -> Work:
    rotated = t * (h + g) * d  # elements of q and k
    return 3 * rotated, 2 * rotated * e


def norm_rope_forward(t: int, h: int, g: int, d: int, e: int) -> Work:
    normed = t * (h + g) * d  # elements of q and k
    return 7 * normed, 2 * t * (h + 2 * g) * d * e


def norm_rope_backward(t: int, h: int, g: int, d: int, e: int) -> Work:
    normed = t * (h + g) * d  # elements of q and k
    return 13 * normed, 3 * normed * e


def swiglu_forward(t: int, f: int, e: int) -> Work:
    return 6 * t * f, 3 * t * f * e


def swiglu_backward(t: int, f: int, e: int) -> Work:
    return 12 * t * f, 5 * t * f * e


def adapted_outputs(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Outputs of the members with an adapter: of three members (q, k, v), k has none."""
    return sizes if len(sizes) == 2 else sizes[:1] + sizes[2:]


def lora_linear_forward(t: int, k: int, r: int, *sizes: int, e: int) -> Work:
    """t tokens of width k to members with `sizes` outputs, adapters of rank r."""
    n = sum(sizes)
    adapted = adapted_outputs(sizes)
    adapter = r * len(adapted) * k + r * sum(adapted)  # parameters of A and B
    operations = 2 * t * (n * k + adapter)
    read = t * k + n * k + adapter
    written = t * n + t * r * len(adapted)  # y, and S for the backward
    return operations, e * (read + written)


def lora_linear_backward(t: int, k: int, r: int, *sizes: int, e: int) -> Work:
    """dx as the forward's y; dS, dB, dA and dS A are twice the adapter's products."""
    adapted = adapted_outputs(sizes)
    adapter = r * len(adapted) * k + r * sum(adapted)
    operations, size = lora_linear_forward(t, k, r, *sizes, e=e)
    gradients = 8 * adapter  # read and written in fp32: they are added to
    return operations + 2 * t * adapter, size + e * t * k + gradients


def linear(t: int, k: int, n: int, e: int) -> Work:
    return 2 * t * k * n, (t * k + n * k + t * n) * e


def attention_forward(h: int, g: int, d: int, *rows: int, e: int) -> Work:
    t = sum(rows)
    pairs = sum(n * (n + 1) / 2 for n in rows)  # of a query and a key that it sees
    log_sums = 4 * t * h
    return 4 * h * d * pairs, e * t * d * (2 * h + 2 * g) + log_sums


def attention_backward(h: int, g: int, d: int, *rows: int, e: int) -> Work:
    """Five products where the forward has two; reads qkv, o and do, writes dqkv."""
    t = sum(rows)
    operations, _ = attention_forward(h, g, d, *rows, e=e)
    log_sums = 4 * t * h
    return 2.5 * operations, e * t * d * (4 * h + 4 * g) + log_sums


def new_tokens(even: int, odd: int, rows: tuple[int, ...]) -> list[int]:
    """Queries of each row: `even` in rows 0, 2, ..., `odd` in rows 1, 3, ..."""
    return [odd if i % 2 else even for i in range(len(rows))]


def cached_attention(
    h: int, g: int, d: int, page: int, even: int, odd: int, *rows: int, e: int
) -> Work:
    """`rows` are the tokens that are cached already."""
    new = new_tokens(even, odd, rows)
    pairs = sum(m * c + m * (m + 1) / 2 for m, c in zip(new, rows, strict=True))
    keys_and_values = 2 * g * (sum(rows) + sum(new))
    queries_and_outputs = 2 * h * sum(new)
    return 4 * h * d * pairs, e * d * (keys_and_values + queries_and_outputs)


def cache_write(h: int, g: int, d: int, page: int, even: int, odd: int, *rows: int, e: int) -> Work:
    """Keys and values of the new tokens, read and written."""
    return 0, 4 * g * d * e * sum(new_tokens(even, odd, rows))


def loss_forward(n: int, d: int, v: int, e: int) -> Work:
    return 2 * n * d * v, (n + v) * d * e


def loss_forward_and_backward(n: int, d: int, v: int, e: int) -> Work:
    return 4 * n * d * v, (2 * n + v) * d * e


def adamw_step(p: int, e: int) -> Work:
    """Reads four tensors and writes three in fp32, and writes one in bf16."""
    return 15 * p, 30 * p


def grad_norm(p: int, e: int) -> Work:
    return 2 * p, 4 * p


def sample(b: int, v: int, *settings: int, e: int) -> Work:
    return 5 * b * v, b * v * e


WORK: dict[tuple[str, str], Callable[..., Work]] = {
    ("rms_norm", "forward"): rms_norm_forward,
    ("rms_norm", "backward"): rms_norm_backward,
    ("rms_norm", "add forward"): add_rms_norm_forward,
    ("rms_norm", "add backward"): add_rms_norm_backward,
    ("rope", "forward"): rope,
    ("rope", "backward"): rope,
    ("norm_rope", "forward"): norm_rope_forward,
    ("norm_rope", "backward"): norm_rope_backward,
    ("swiglu", "forward"): swiglu_forward,
    ("swiglu", "backward"): swiglu_backward,
    ("lora_linear", "forward"): lora_linear_forward,
    ("lora_linear", "backward"): lora_linear_backward,
    ("lora_linear", "forward, dropout"): lora_linear_forward,
    ("lora_linear", "backward, dropout"): lora_linear_backward,
    ("linear", "forward"): linear,
    ("attention", "forward"): attention_forward,
    ("attention", "backward"): attention_backward,
    ("cached_attention", "forward"): cached_attention,
    ("cached_attention", "write"): cache_write,
    ("linear_cross_entropy", "forward"): loss_forward,
    ("linear_cross_entropy", "forward and backward"): loss_forward_and_backward,
    ("adamw", "step"): adamw_step,
    ("adamw", "norm"): grad_norm,
    ("sample", "forward"): sample,
}


def rows_of(operation: str, shape: tuple[int, ...]) -> int:
    """The number that --rows selects a shape by: tokens, rows of a decode step, or parameters."""
    if operation == "attention":
        return sum(shape[3:])
    if operation == "cached_attention":
        return len(shape) - 6
    return shape[0]
