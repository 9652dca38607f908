"""Llama, forward and backward, written out.

    residual stream h (T, D); per layer
        y1 = norm(h)            qkv = y1 Wqkv     rotate q, k      o = attention(qkv)    a = o Wo
        h  = h + a
        y2 = norm(h)            gu = y2 Wgu       m = swiglu(gu)                         x = m Wd
        h  = h + x
    hidden = norm(h)            logits = hidden head^T

No batch dimension and no padding: the tokens of all rows lie end to end, and a `Packed` or `Cached`
says who attends to whom. No autograd: `forward(..., tape=...)` records what the recomputation
policy keeps (model/tape.py) and `backward` walks the layers back, adding adapter gradients into
`lora.grads`. Sharded weights (model/sharded.py) are gathered layer by layer while they are used.
"""

# T = tokens, D = model width, F = feed-forward width, V = vocabulary
# H = query heads, G = key/value heads, d = head size

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from kernels.cached import Cached
from kernels.dtypes import accumulate_dtype, sum_products_in_fp32
from kernels.packed import Packed
from kernels.philox import Dropout, mix
from kernels.registry import Ops
from kernels.select_ops import choose
from model.config import LlamaConfig
from model.hf_checkpoint import locate
from model.kv_cache import KVCache
from model.layout import GROUPS, place_of
from model.lora import Lora
from model.peft_format import check_copies
from model.rope import cos_sin_table
from model.tape import Adapters, Saved, Tape
from model.weights import Weights, load_weights

NO_ADAPTERS: Adapters = {group: (None, None) for group in GROUPS}  # the seed model's


def has_bf16_units(device: str | torch.device) -> bool:
    """Whether this is a GPU that computes in bf16; others (T4, V100) emulate it, slowly."""
    cuda = torch.device(device).type == "cuda"
    return cuda and torch.cuda.is_bf16_supported(including_emulation=False)


def default_dtype(device: str | torch.device) -> torch.dtype:
    """bf16 on a GPU with bf16 units, else fp32 (a CPU's text is then the same on every CPU run)."""
    return torch.bfloat16 if has_bf16_units(device) else torch.float32


class Llama:
    """A frozen Llama. `forward(lora=None)` is the seed model; adapters come in as data."""

    def __init__(self, config: LlamaConfig, weights: Weights, ops: Ops | None = None) -> None:
        self.config, self.weights = config, weights
        if self.device.type == "cuda":
            sum_products_in_fp32()
        self.ops = ops or choose("auto", self.device, self.dtype, config.widths)
        # the rotary table (positions, d), grown on demand: a longer row replaces it, so a captured
        # forward must hold the one that it reads
        self.cos_sin: Tensor | None = None
        # for packed weights: all layers in one call (kernels/cpu/fused_layers.py)
        packed = self.ops.layers is not None and not isinstance(weights["0.qkv"], Tensor)
        self.fused_layers = self.ops.layers(weights, config.num_layers) if packed else None

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        ops: Ops | None = None,
        shard: bool = False,
    ) -> Llama:
        """Load a Hugging Face directory: config.json and F32/F16/BF16 safetensors.

        dtype None is bf16 on a device with bf16 units, else fp32. With `shard` the processes of
        the job share the weights out. Raises ValueError naming the file for anything that is not
        a plain Llama (see model/config.py, model/hf_checkpoint.py).
        """
        path = Path(path)
        dtype = dtype or default_dtype(device)
        if dtype not in (torch.float32, torch.bfloat16, torch.float64):
            raise ValueError(f"dtype {dtype}: expected float32, bfloat16 or float64")
        checkpoint = locate(path, LlamaConfig.from_dir(path))
        weights = load_weights(checkpoint, device, dtype, shard)
        return cls(checkpoint.config, weights, ops)

    @property
    def device(self) -> torch.device:
        return self.weights["norm"].device

    @property
    def dtype(self) -> torch.dtype:
        return self.weights["norm"].dtype

    @property
    def is_sharded(self) -> bool:
        """Whether the processes of a job share the weights out."""
        return self.weights.is_sharded

    # ---- adapters

    def bind(self, lora: Lora) -> None:
        """Bind an adapter to this model's shapes, device and dtype.

        ValueError where its shapes differ, or where its file holds copies of the base's embedding
        or head that are not equal to this model's.
        """

        def rows_of(name: str) -> list[tuple[Tensor, int]]:
            return self.weights.local(place_of(name, self.config).name)

        lora.check_fits(self.config)
        check_copies(lora, self.config, rows_of)
        lora.bind(self.config, self.device, self.dtype)

    def ensure_bound(self, lora: Lora) -> None:
        """Bind if that was not done yet; an adapter bound to another kind of model is an error."""
        if lora.bound is None:
            self.bind(lora)
        elif lora.bound != (self.config, self.device, self.dtype):
            raise ValueError(
                f"the adapter is bound to {lora.bound[1:]}, the model is on "
                f"{(self.device, self.dtype)}; call model.bind(lora)"
            )

    def _adapters(
        self, i: int, lora: Lora | None, context: Packed | Cached, training: bool
    ) -> Adapters:
        """The adapter and the dropout of every group of layer i; dropout only in training."""
        if lora is None:
            return NO_ADAPTERS
        rate = lora.config.dropout if training else 0.0
        adapters: dict = {}
        for name in GROUPS:
            group, dropout = lora.group(i, name), None
            if group is not None and rate > 0:
                assert context.row_keys is not None, "dropout needs row keys in the Packed"
                key = mix("dropout", lora.config.seed, i, name)
                dropout = Dropout(rate, key, context.positions, context.row_keys, context.step)
            adapters[name] = (group, dropout)
        return adapters

    # ---- forward

    def forward(
        self,
        tokens: Tensor,  # (T,) int64
        context: Packed | Cached,
        *,
        lora: Lora | None = None,
        tape: Tape | None = None,
        cache: KVCache | None = None,
        logits_indices: Tensor | None = None,  # (n,) int64, rising
    ) -> Tensor:
        """Hidden states (T, D) after the last norm, or (n, D) of the tokens `logits_indices` alone.

        With a `Tape` (training; needs a Packed) the tensors for the backward are recorded and
        dropout is on; with a `Cached` the new keys and values are written into `cache`. After the
        last layer's attention only the tokens `logits_indices` are computed: of a prompt, its last.
        """
        assert (cache is None) == isinstance(context, Packed), "a Cached context needs a cache"
        assert tape is None or cache is None, "only packed rows can be trained on"
        assert logits_indices is None or tape is None, "a backward needs every token"
        if lora is not None:
            self.ensure_bound(lora)
        ops, eps = self.ops, self.config.rms_norm_eps
        self._grow_rope_table(context)
        h = self.weights.embed(tokens)  # (T, D)
        if self.fused_layers is not None and cache is not None and lora is None:
            x, h = self.fused_layers(
                h, context, self.cos_sin, cache.k, cache.v, eps, logits_indices
            )
        else:
            x, h = self._run_layers(h, context, lora, tape, cache, logits_indices)
        y, h, rstd = ops.add_rms_norm_forward(x, h, self.weights["norm"], eps)
        if tape is not None:
            tape.packed, tape.lora, tape.h, tape.rstd = context, lora, h, rstd
        return y  # (T, D) or (n, D)

    def _run_layers(
        self,
        h: Tensor,  # (T, D) embedded tokens
        context: Packed | Cached,
        lora: Lora | None,
        tape: Tape | None,
        cache: KVCache | None,
        logits_indices: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """The last layer's feed-forward output x and the residual stream h, to be added to it."""
        ops, w, eps = self.ops, self.weights, self.config.rms_norm_eps
        last = self.config.num_layers - 1
        x = None
        for i in self._gathered_layers(range(self.config.num_layers)):
            if i == 0:
                y, rstd = ops.rms_norm_forward(h, w["0.attn_norm"], eps)
            else:
                y, h, rstd = ops.add_rms_norm_forward(x, h, w[f"{i}.attn_norm"], eps)
            adapters = self._adapters(i, lora, context, training=tape is not None)
            saved = None if tape is None else Saved(adapters, h=h, rstd1=rstd)
            indices = logits_indices if i == last else None
            x, h = self._layer(i, y, h, context, adapters, saved, cache, indices)
            if tape is not None:
                saved.drop(tape.policy)
                tape.layers.append(saved)
        return x, h

    def _gathered_layers(self, order: Sequence[int]) -> Iterator[int]:
        """Layer numbers, in this order; a layer's weights are whole until the next is asked for."""
        for i, following in pairwise([*order, None]):
            with self.weights.layer(i, following):
                yield i

    def _layer(
        self,
        i: int,
        y: Tensor,  # (T, D) normed
        h: Tensor,  # (T, D) residual stream
        context: Packed | Cached,
        adapters: Adapters,
        saved: Saved | None,
        cache: KVCache | None = None,
        logits_indices: Tensor | None = None,  # (n,) the tokens that are needed after attention
    ) -> tuple[Tensor, Tensor]:
        """The feed-forward branch's output x and the residual stream h it is to be added to."""
        c, ops, w = self.config, self.ops, self.weights
        H, G = c.num_heads, c.num_kv_heads

        # 1. attention
        qkv, s_qkv = ops.lora_linear_forward(y, w[f"{i}.qkv"], *adapters["qkv"])
        qkv = ops.rope_(qkv, context.positions, self.cos_sin, H, G)  # (T, (H + 2G) d)
        lse = None
        if cache is None:
            o, lse = ops.attention_forward(qkv, context, H, G)  # (T, H d), (T, H)
        else:
            ops.kv_write_(qkv, cache.k[i], cache.v[i], context)
            o = ops.cached_attention(qkv, cache.k[i], cache.v[i], context)  # (T, H d)
        if logits_indices is not None:
            o, h = o[logits_indices], h[logits_indices]
        a, s_o = ops.lora_linear_forward(o, w[f"{i}.o"], *adapters["o"])  # (T, D)

        # 2. feed-forward
        y, h, rstd = ops.add_rms_norm_forward(a, h, w[f"{i}.mlp_norm"], c.rms_norm_eps)
        gate_up, s_gate_up = ops.lora_linear_forward(
            y, w[f"{i}.gate_up"], *adapters["gate_up"]
        )  # (T, 2F)
        m = ops.swiglu_forward(gate_up)  # (T, F)
        x, s_down = ops.lora_linear_forward(m, w[f"{i}.down"], *adapters["down"])  # (T, D)

        if saved is not None:
            saved.qkv, saved.o, saved.lse, saved.h_mid, saved.rstd2 = qkv, o, lse, h, rstd
            saved.gate_up = gate_up
            saved.s = {"qkv": s_qkv, "o": s_o, "gate_up": s_gate_up, "down": s_down}
        return x, h

    def _grow_rope_table(self, context: Packed | Cached) -> None:
        """Make `cos_sin` long enough for this forward; built once and doubled when outgrown."""
        if isinstance(context, Packed):
            longest = max((b - a for a, b in context.rows), default=0) + context.prefix
        else:
            pairs = zip(context.query_lens, context.context_lens, strict=True)
            longest = max((q + c for q, c in pairs), default=0)
        most = self.config.max_position
        assert longest <= most, f"a row of {longest} tokens, but the model was made for {most}"
        have = 0 if self.cos_sin is None else self.cos_sin.shape[0]
        if self.cos_sin is None or longest > have:
            positions = min(max(longest, 2 * have, 512), most)
            dtype = accumulate_dtype(self.dtype)
            self.cos_sin = cos_sin_table(self.config, positions, self.device, dtype)

    # ---- backward

    def backward(self, dhidden: Tensor, tape: Tape) -> None:
        """Add the gradients of every adapter tensor into `tape.lora.grads`; uses up the tape.

        dhidden (T, D) is the gradient of the loss with respect to the result of `forward`. Nothing
        is computed below the first adapter.
        """
        lora = tape.lora
        assert lora is not None and tape.h is not None, "the tape has no adapted forward"
        self._grow_rope_table(tape.packed)
        dh = self.ops.rms_norm_backward(dhidden, tape.h, self.weights["norm"], tape.rstd)
        tape.h = None
        layers = range(self.config.num_layers)
        groups = [(i, group) for i in layers for group in GROUPS]  # in the order of the forward
        first = next(place for place in groups if lora.group(*place) is not None)
        for i in self._gathered_layers(reversed(layers[first[0] :])):
            saved = tape.layers.pop()
            dh = self._layer_backward(i, dh, saved, tape.packed, first, tape.policy)
        tape.layers.clear()

    def _layer_backward(
        self,
        i: int,
        dh: Tensor,  # (T, D) gradient of the residual stream after the layer
        saved: Saved,
        packed: Packed,
        first_adapted: tuple[int, str],  # (layer, group): nothing below needs a gradient
        policy: str,
    ) -> Tensor | None:
        """The gradient (T, D) of the residual stream before the layer, None below the first
        adapter. Uses up `saved`."""
        ops, w = self.ops, self.weights
        H, G = self.config.num_heads, self.config.num_kv_heads

        def linear_backward(
            group: str, dy: Tensor, x: Tensor | None, need_dx: bool
        ) -> Tensor | None:
            adapter, dropout = saved.adapters[group]
            weight, s = w[f"{i}.{group}"], saved.s[group]
            return ops.lora_linear_backward(dy, x, weight, s, adapter, need_dx, dropout)

        # 1. tensors that the forward did not keep
        y1, y2, m = self._recompute(i, saved, packed, policy)

        # 2. feed-forward; x and h both receive dh
        need_dx = first_adapted != (i, "down")
        dm = linear_backward("down", dh, m, need_dx)  # (T, F)
        if not need_dx:
            return None
        dgate_up = ops.swiglu_backward(dm, saved.gate_up)  # (T, 2F)
        saved.gate_up = m = dm = None  # freed before the next product
        need_dx = first_adapted != (i, "gate_up")
        dy = linear_backward("gate_up", dgate_up, y2, need_dx)  # (T, D)
        if not need_dx:
            return None
        dh = ops.add_rms_norm_backward(dy, dh, saved.h_mid, w[f"{i}.mlp_norm"], saved.rstd2)

        # 3. attention; a and h both receive dh
        need_dx = first_adapted != (i, "o")
        do = linear_backward("o", dh, saved.o, need_dx)  # (T, H d)
        if not need_dx:
            return None
        dqkv = ops.attention_backward(do, saved.qkv, saved.o, saved.lse, packed, H, G)
        dqkv = ops.rope_(dqkv, packed.positions, self.cos_sin, H, G, inverse=True)
        need_dx = first_adapted != (i, "qkv")
        dy = linear_backward("qkv", dqkv, y1, need_dx)  # (T, D)
        if not need_dx:
            return None
        return ops.add_rms_norm_backward(dy, dh, saved.h, w[f"{i}.attn_norm"], saved.rstd1)

    def _recompute(
        self, i: int, saved: Saved, packed: Packed, policy: str
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Compute again, into `saved`, the tensors that the policy dropped.

        Returns the inputs of qkv (T, D), gate_up (T, D) and down (T, F). An input is needed for the
        gradient of A alone: it may be None where the group has no adapter.
        """
        ops, w, eps = self.ops, self.weights, self.config.rms_norm_eps
        adapted = {group for group, (adapter, _) in saved.adapters.items() if adapter is not None}
        y1 = y2 = m = None
        if policy == "full" or "qkv" in adapted:
            y1, _ = ops.rms_norm_forward(saved.h, w[f"{i}.attn_norm"], eps)  # (T, D)
        if policy == "full":
            self._layer(i, y1, saved.h, packed, saved.adapters, saved)
        if policy == "selective" or "gate_up" in adapted:
            y2, _ = ops.rms_norm_forward(saved.h_mid, w[f"{i}.mlp_norm"], eps)  # (T, D)
        if policy == "selective":
            saved.gate_up, _ = ops.lora_linear_forward(
                y2, w[f"{i}.gate_up"], *saved.adapters["gate_up"]
            )  # (T, 2F)
        if "down" in adapted:
            m = ops.swiglu_forward(saved.gate_up)  # (T, F)
        return y1, y2, m

    # ---- use

    def logits(self, tokens: Tensor, lora: Lora | None = None) -> Tensor:
        """(T, V) logits of one sequence (T,) of token ids."""
        tokens = torch.as_tensor(tokens, dtype=torch.int64, device=self.device)
        vocab, longest = self.config.vocab_size, self.config.max_position
        if tokens.dim() != 1 or len(tokens) > longest:
            raise ValueError(
                f"tokens {tuple(tokens.shape)}: expected one sequence (T,) of at most {longest}"
            )
        if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocab:
            low, high = int(tokens.min()), int(tokens.max())
            raise ValueError(f"token ids {low} to {high}: expected 0 to {vocab - 1}")
        packed = Packed.from_lengths([len(tokens)] if len(tokens) else [], self.device)
        return self.head(self.forward(tokens, packed, lora=lora))

    def head(self, hidden: Tensor) -> Tensor:
        """Logits (N, V) of hidden states (N, D)."""
        with self.weights.head() as head:
            return self.ops.linear(hidden, head)

    def nll(
        self, hidden: Tensor, targets: Tensor, need_grad: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """-log p of targets (N,) at hidden states (N, D), and the gradient of their sum (N, D)."""
        with self.weights.head() as head:
            return self.ops.linear_cross_entropy(hidden, head, targets, need_grad)
