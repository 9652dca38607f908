"""The tile configurations that benchmarks/tuning/tune.py tries for each kernel, likeliest first.

Few and chosen: what a program on Hopper can hold without spilling, with wgmma not serialised and
within 227 KiB, at Llama-2-7B's shapes and rank 16 (compiled ahead for sm_90 with triton 3.6; a few
spill at rank 64, and are dropped there, as other cards drop what does not fit them). The likeliest
come first, since a short budget cuts the lists at their ends.
"""

from __future__ import annotations

from typing import Any

ABBREVIATIONS = {"w": "num_warps", "s": "num_stages"}


def configs(names: str, *values: tuple[int, ...]) -> list[dict[str, int]]:
    """One configuration for each tuple of `values`, whose numbers belong to `names` in order.

    `names` are separated by blanks; ABBREVIATIONS may be used. A size that is not named keeps the
    value that the kernel's present configuration gives it.
    """
    keys = [ABBREVIATIONS.get(name, name) for name in names.split()]
    return [dict(zip(keys, numbers, strict=True)) for numbers in values]


def forms(*names: str) -> list[dict[str, str]]:
    """The configurations of an operation that chooses between several forms of itself."""
    return [{"form": name} for name in names]


_PRODUCT = "BM BN BK GROUP w s"
_MANY = (
    (128, 256, 64, 8, 8, 4),
    (128, 256, 64, 8, 8, 3),
    (256, 128, 64, 8, 8, 3),
    (128, 128, 64, 8, 8, 4),
    (128, 256, 64, 16, 8, 3),
    (128, 256, 64, 4, 8, 3),
    (128, 128, 64, 8, 4, 3),
    (128, 128, 64, 8, 4, 4),
    (256, 128, 64, 8, 8, 4),
    (64, 256, 64, 8, 4, 3),
    (128, 128, 64, 8, 8, 3),
    (128, 128, 64, 16, 8, 4),
    (64, 256, 64, 8, 4, 4),
)
_FEW = (
    (16, 64, 128, 8, 4, 4),
    (16, 32, 256, 8, 4, 4),
    (16, 64, 256, 8, 4, 3),
    (16, 32, 128, 8, 4, 5),
    (16, 128, 128, 8, 4, 3),
    (16, 64, 128, 8, 4, 3),
    (16, 128, 64, 8, 4, 4),
    (16, 64, 64, 8, 4, 6),
)

_BLOCKS = "BM BN w s"
_FORWARD = (
    (128, 64, 8, 3),
    (128, 128, 8, 3),
    (128, 128, 8, 2),
    (128, 64, 8, 2),
    (64, 64, 4, 3),
    (64, 128, 4, 2),
    (64, 64, 4, 2),
    (64, 128, 4, 3),
    (128, 64, 8, 4),
    (128, 32, 8, 4),
)
_DKV = (
    (64, 128, 8, 2),
    (64, 128, 8, 3),
    (64, 64, 4, 2),
    (64, 64, 8, 2),
    (32, 128, 8, 2),
    (32, 64, 4, 2),
    (32, 128, 8, 3),
    (32, 64, 4, 3),
    (64, 128, 8, 1),
    (64, 64, 4, 1),
    (32, 64, 8, 3),
)

_SWIGLU = (
    (1, 2048, 4),
    (1, 1024, 4),
    (1, 1024, 2),
    (1, 2048, 8),
    (2, 1024, 4),
    (1, 4096, 8),
    (1, 512, 2),
    (4, 512, 4),
    (2, 1024, 8),
    (1, 512, 4),
)

_HEADS = (
    (1, 16, 2),
    (4, 4, 2),
    (2, 8, 2),
    (1, 8, 2),
    (2, 8, 4),
    (4, 4, 4),
    (1, 16, 4),
    (1, 4, 1),
    (4, 8, 4),
)

# By kernel and, after a space, the beginning of a shape class.
CANDIDATES: dict[str, list[dict[str, Any]]] = {
    # elementwise and by rows: bandwidth
    "rms_norm_forward_kernel": configs(
        "BT w",
        (1, 4),
        (1, 8),
        (2, 8),
        (1, 16),
        (2, 4),
        (4, 8),
        (2, 16),
        (4, 4),
        (1, 2),
        (8, 8),
    ),
    "rms_norm_backward_kernel": configs(
        "BT w",
        (1, 4),
        (1, 8),
        (2, 8),
        (1, 16),
        (2, 4),
        (4, 8),
        (2, 16),
        (1, 2),
    ),
    "rope_kernel": configs(
        "BT BH w",
        (2, 8, 2),
        (2, 8, 4),
        (1, 8, 2),
        (4, 8, 4),
        (4, 8, 2),
        (4, 4, 2),
        (8, 4, 4),
        (8, 8, 4),
        (2, 16, 4),
        (4, 16, 4),
        (1, 16, 2),
        (8, 8, 8),
        (16, 4, 4),
    ),
    "norm_rope_forward_kernel": configs("BT BH w", *_HEADS),
    "norm_rope_backward_kernel": configs("BT BH w", *_HEADS),
    "swiglu_forward_kernel": configs("BT BF w", *_SWIGLU),
    "swiglu_backward_kernel": configs("BT BF w", *_SWIGLU),
    "adamw_kernel": configs(
        "BP w",
        (1024, 4),
        (2048, 8),
        (512, 4),
        (1024, 8),
        (2048, 4),
        (4096, 8),
        (512, 2),
    ),
    "sum_of_squares_kernel": configs(
        "BP w",
        (4096, 8),
        (8192, 8),
        (2048, 4),
        (2048, 8),
        (16384, 8),
        (4096, 4),
    ),
    "root_of_sum_kernel": configs("BP w", (1024, 8), (2048, 8), (1024, 4), (4096, 8)),
    "kv_write_kernel": configs(
        "BW w", (512, 4), (1024, 4), (256, 2), (2048, 4), (512, 2), (2048, 8)
    ),
    "lora_reduce_kernel": configs("BN w", (512, 4), (1024, 4), (256, 2), (2048, 8), (256, 4)),
    "cross_entropy_rows_kernel": configs("BV w", (4096, 8), (8192, 16), (2048, 8), (8192, 8)),
    "penalise_kernel": configs("BL w", (256, 4), (512, 4), (128, 2), (1024, 8)),
    "sample_largest_kernel": configs(
        "BV w s",
        (2048, 8, 1),
        (4096, 8, 1),
        (4096, 16, 1),
        (8192, 16, 1),
        (2048, 4, 2),
        (4096, 8, 2),
    ),
    "sample_keys_kernel": configs(
        "BV w", (1024, 4), (2048, 8), (2048, 4), (4096, 8), (512, 4), (1024, 2)
    ),
    "sample_sorted_kernel": configs("BS w", (64, 4), (64, 1), (64, 2), (64, 8)),
    "sample_weights_kernel": configs(
        "BV w s", (1024, 4, 1), (2048, 8, 1), (2048, 4, 1), (4096, 8, 1), (512, 4, 1), (1024, 4, 2)
    ),
    "sample_draw_kernel": configs(
        "BM BV w s",
        (4, 1024, 8, 1),
        (4, 512, 4, 1),
        (2, 1024, 4, 1),
        (2, 2048, 8, 1),
        (8, 512, 8, 1),
        (4, 1024, 4, 1),
        (2, 1024, 4, 2),
    ),
    # attention
    "cached_decode_kernel": configs(
        "SPLIT BN w s",
        (128, 32, 4, 3),
        (256, 64, 4, 3),
        (128, 64, 4, 2),
        (128, 64, 4, 3),
        (256, 32, 4, 4),
        (256, 64, 4, 2),
        (64, 32, 4, 2),
        (64, 64, 4, 1),
        (512, 64, 4, 3),
        (128, 32, 2, 3),
        (128, 16, 4, 4),
        (256, 64, 8, 2),
        (256, 16, 4, 3),
    ),
    "cached_join_kernel": configs("BS w", (8, 2), (4, 1), (4, 2), (16, 4), (8, 4)),
    "cached_extend_kernel": configs(
        "BM BN w s",
        (128, 64, 8, 2),
        (128, 64, 8, 3),
        (64, 64, 4, 2),
        (64, 64, 4, 3),
        (128, 128, 8, 2),
        (64, 32, 4, 3),
        (128, 32, 8, 3),
        (32, 64, 4, 2),
        (32, 32, 8, 1),
        (32, 32, 4, 2),
    ),
    "attention_forward_kernel": configs(_BLOCKS, *_FORWARD),
    "attention_forward_kernel d64": configs(_BLOCKS, (128, 64, 4, 3), (128, 64, 4, 2), *_FORWARD),
    "attention_dq_kernel": configs(
        "BM BN w s",
        (128, 64, 8, 3),
        (64, 64, 4, 2),
        (128, 64, 8, 2),
        (64, 64, 4, 3),
        (128, 128, 8, 2),
        (64, 128, 4, 2),
        (128, 32, 8, 3),
        (64, 128, 8, 2),
        (64, 32, 4, 3),
        (128, 64, 8, 1),
    ),
    "attention_dkv_kernel": configs(_BLOCKS, *_DKV),
    "attention_dkv_kernel d64": configs(_BLOCKS, *_DKV, (128, 64, 8, 2)),
    # products
    "lora_linear_forward": forms("addmm", "split", "fused"),
    "lora_linear_backward": forms("addmm", "kernels"),
    "lora_linear_kernel": configs(_PRODUCT, *_MANY),
    "lora_linear_kernel few": configs(_PRODUCT, *_FEW),
    "lora_linear_kernel fixed": configs(
        _PRODUCT,
        (64, 64, 128, 8, 4, 3),
        (64, 64, 64, 8, 4, 4),
        (64, 128, 64, 8, 4, 4),
        (64, 32, 128, 8, 4, 4),
        (64, 64, 64, 8, 4, 6),
        (64, 128, 64, 8, 4, 3),
    ),
    "lora_dx_kernel": configs(_PRODUCT, *_MANY),
    "lora_dx_kernel few": configs(_PRODUCT, *_FEW),
    "lora_dx_kernel drop": configs(
        _PRODUCT,
        (128, 128, 64, 8, 8, 4),
        (128, 128, 64, 8, 8, 3),
        (64, 128, 64, 8, 4, 4),
        (64, 256, 64, 8, 8, 3),
        (64, 128, 64, 8, 4, 3),
        (128, 128, 64, 16, 8, 4),
        (128, 64, 64, 8, 4, 4),
        (256, 64, 64, 8, 8, 3),
    ),
    "lora_down_kernel": configs(
        "BM BK w s",
        (64, 128, 4, 3),
        (64, 64, 4, 4),
        (128, 64, 4, 4),
        (32, 128, 4, 4),
        (64, 128, 4, 4),
        (128, 64, 8, 4),
        (32, 256, 4, 3),
        (16, 256, 4, 3),
        (64, 64, 4, 6),
    ),
    "lora_down_kernel few": configs(
        "BM BK w s",
        (16, 256, 4, 3),
        (16, 128, 4, 4),
        (16, 128, 2, 4),
        (16, 256, 4, 4),
        (16, 512, 8, 3),
        (16, 64, 2, 4),
    ),
    "lora_up_backward_kernel": configs(
        "BM BN w s",
        (128, 64, 8, 3),
        (128, 64, 4, 3),
        (64, 64, 4, 3),
        (256, 64, 8, 2),
        (128, 128, 8, 2),
        (128, 64, 8, 2),
        (64, 128, 4, 2),
        (256, 32, 8, 3),
        (128, 32, 4, 3),
        (64, 64, 4, 2),
    ),
    "lora_da_kernel": configs(
        "BM BK CHUNK w s",
        (64, 128, 512, 4, 3),
        (64, 128, 1024, 4, 3),
        (64, 64, 1024, 4, 4),
        (64, 64, 512, 4, 4),
        (64, 128, 2048, 4, 3),
        (128, 64, 1024, 4, 3),
        (64, 128, 1024, 4, 4),
        (32, 128, 1024, 4, 4),
        (64, 256, 1024, 8, 3),
        (128, 128, 1024, 8, 2),
    ),
}

# The tile of the first decides how much the second has to do.
TIMED_WITH = {
    "sum_of_squares_kernel": "root_of_sum_kernel",
    "cached_decode_kernel": "cached_join_kernel",
    "lora_da_kernel": "lora_reduce_kernel",
}

# Operations whose configuration names a form -> the call of benchmarks/operations.py that is timed
# to choose it.
FORM_CALLS = {"lora_linear_forward": "forward", "lora_linear_backward": "backward"}

# Beginnings of kernels' names in the order in which they are tuned: those that cost a step of
# training or sampling most come first.
WORTH = (
    "lora_linear_kernel",
    "lora_dx",
    "lora_linear_",
    "attention_forward",
    "attention_d",
    "rms_norm",
    "swiglu",
    "rope",
    "norm_rope",
    "cached_decode",
    "lora_down",
    "lora_up",
    "lora_da",
    "cross_entropy",
    "adamw",
    "sample",
    "",
)


def candidates_of(kernel: str, shape_class: str) -> list[dict[str, Any]]:
    """The configurations to try for a kernel at a shape class.

    The class's words are dropped from the end until CANDIDATES has a list under the name that is
    left; the last name tried is the kernel's alone.
    """
    words = [kernel, *shape_class.split()]
    while len(words) > 1 and " ".join(words) not in CANDIDATES:
        words.pop()
    return CANDIDATES[" ".join(words)]
