"""The calls that `benchmarks.kernels --worth` times, in the order of what a user gains from them.

A training step of SDFT has some 2,300 tokens (8 rows of 288), a long one 8,192; a decode step 64 to
256 rows of some 220 tokens. Groups take turns, so that a run that is stopped early has the most
important call of each.
"""

from __future__ import annotations

from itertools import zip_longest

from kernels.spec import MODELS

Timed = tuple[str, str, tuple[int, ...]]  # operation, call, shape

_7B = MODELS["llama-2-7b"]
_8B = MODELS["llama-3-8b"]
_SMALL = MODELS["smollm2-135m"]
SDFT = 2304  # tokens of a step
LONG = 8192
ROWS = (128, 256, 64)  # of a decode step
CONTEXT = 220  # tokens of a row while it is decoded
PAPER = (0.95, 50, 0.7)  # temperature, top-k, top-p


def _qkv(tokens: int, rank: int) -> tuple[int, ...]:
    return (tokens, _7B.D, rank, _7B.D, _7B.D, _7B.D)


def _gate_up(tokens: int, rank: int) -> tuple[int, ...]:
    return (tokens, _7B.D, rank, _7B.F, _7B.F)


def _down(tokens: int, rank: int) -> tuple[int, ...]:
    return (tokens, _7B.F, rank, _7B.D)


def adapter_backwards() -> list[Timed]:
    """The backward of adapted products."""
    shapes = []
    for tokens in (SDFT, LONG, 1024):
        shapes += [_gate_up(tokens, 8), _qkv(tokens, 8), _down(tokens, 8)]
    for rank in (64, 16):
        for tokens in (SDFT, LONG):
            shapes += [_gate_up(tokens, rank), _qkv(tokens, rank)]
    timed = []
    for shape in shapes:
        timed.append(("lora_linear", "backward, dropout", shape))
        timed.append(("lora_linear", "backward", shape))
    return timed


def adapter_forwards() -> list[Timed]:
    """The forward of adapted products, in training and in decoding."""
    timed = [("lora_linear", "forward, dropout", _gate_up(SDFT, 8))]
    for tokens in (SDFT, 128, 256, 64, 1, LONG):
        timed.append(("lora_linear", "forward", _gate_up(tokens, 8)))
        timed.append(("lora_linear", "forward", _qkv(tokens, 8)))
    return timed


def losses() -> list[Timed]:
    """The loss with its gradient."""
    call = "forward and backward"
    shapes = [(SDFT, _7B.D, _7B.V), (SDFT, _8B.D, _8B.V), (LONG, _7B.D, _7B.V)]
    shapes.append((LONG, _8B.D, _8B.V))
    return [("linear_cross_entropy", call, shape) for shape in shapes]


def decode_attention() -> list[Timed]:
    """Attention of a decode step, and writing into the cache."""
    timed = []
    for model in (_7B, _8B):
        for rows in ROWS:
            shape = (model.H, model.G, model.d, 64, 1, 1, *([CONTEXT] * rows))
            timed.append(("cached_attention", "forward", shape))
    shape = (_7B.H, _7B.G, _7B.d, 64, 1, 1, *([CONTEXT] * ROWS[0]))
    timed.append(("cached_attention", "write", shape))
    prefill = (_7B.H, _7B.G, _7B.d, 64, 150, 150, *([0] * 16))
    timed.append(("cached_attention", "forward", prefill))
    return timed


def samplings() -> list[Timed]:
    """Sampling a token for every row."""
    timed = []
    for model in (_7B, _8B):
        for rows in ROWS:
            timed.append(("sample", "forward", (rows, model.V, *PAPER)))
        timed.append(("sample", "forward", (ROWS[0], model.V)))
    return timed


def heads() -> list[Timed]:
    """The head's product in a decode step."""
    shapes = [(rows, model.D, model.V) for model in (_7B, _8B) for rows in ROWS]
    return [("linear", "forward", shape) for shape in shapes]


def attentions() -> list[Timed]:
    """Attention in training: short rows, long ones, grouped heads, heads of 64."""
    shapes = [
        (_7B.H, _7B.G, _7B.d, *([288] * 8)),
        (_7B.H, _7B.G, _7B.d, *([2048] * 4)),
        (_7B.H, _7B.G, _7B.d, *([300] * 27)),
        (_8B.H, _8B.G, _8B.d, *([2048] * 4)),
        (_7B.H, _7B.G, _7B.d, 4096),
        (_7B.H, _7B.G, _7B.d, 8192),
        (_7B.H, _7B.G, _7B.d, *([1024] * 8)),
        (_SMALL.H, _SMALL.G, _SMALL.d, *([288] * 8)),
    ]
    timed = []
    for shape in shapes:
        timed.append(("attention", "backward", shape))
        timed.append(("attention", "forward", shape))
    return timed


def elementwise() -> list[Timed]:
    """What moves bytes and multiplies little."""
    timed = []
    for tokens in (SDFT, LONG):
        timed += [
            ("swiglu", "backward", (tokens, _7B.F)),
            ("swiglu", "forward", (tokens, _7B.F)),
            ("rms_norm", "add forward", (tokens, _7B.D)),
            ("rms_norm", "add backward", (tokens, _7B.D)),
            ("rope", "forward", (tokens, _7B.H, _7B.G, _7B.d)),
        ]
    timed += [("adamw", "step", (20_000_000,)), ("adamw", "norm", (20_000_000,))]
    return timed


GROUPS = (
    adapter_backwards,
    decode_attention,
    adapter_forwards,
    samplings,
    losses,
    heads,
    attentions,
    elementwise,
)


def by_worth() -> list[Timed]:
    """Every call once: the first of each group, then the second of each, and so on."""
    columns = [group() for group in GROUPS]
    found = []
    for row in zip_longest(*columns):
        found += [timed for timed in row if timed is not None]
    return list(dict.fromkeys(found))
