"""Llama, forward and backward, written out.

    residual stream h (T, D); per layer
        y1 = norm(h)            qkv = y1 Wqkv     rotate q, k      o = attention(qkv)    a = o Wo
        h  = h + a
        y2 = norm(h)            gu = y2 Wgu       m = swiglu(gu)                         x = m Wd
        h  = h + x
    hidden = norm(h)            logits = hidden head^T

No batch dimension and no padding: the tokens of all rows lie end to end, and a `Packed` or `Cached`
says who attends to whom. No autograd: `forward(..., tape=...)` records what the policy says and
`backward` walks the layers back, adding adapter gradients into `lora.grads`.

policy      kept per layer                                           computed again in the backward
none        h, qkv, o, lse, h after attention, gate_up, S of each    the norms, swiglu
selective   the same without gate_up                                 and gate_up
full        h                                                        the whole layer

Weights that are sharded (model/sharded.py) are whole, layer by layer, while they are used.
"""


# T = tokens, D = model width, V = vocabulary, H = query heads, G = key/value heads, d = head size

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from kernels import registry
from kernels.cached import Cached
from kernels.cpu.prepack import PackedWeight, Prepacked, prepack
from kernels.dtypes import accumulate_dtype, sum_products_in_fp32
from kernels.lora_linear.group import LoraGroup
from kernels.packed import Packed
from kernels.philox import Dropout, mix
from kernels.registry import TORCH, Ops
from kernels.select_ops import choose
from model.config import LlamaConfig
from model.kv_cache import KVCache
from model.lora import COPIED, GROUPS, Lora
from model.rope import cos_sin_table
from model.tape import Saved, Tape
from model.weights import load_weights, locate

NOTHING = {name: (None, None) for name in GROUPS}  # the adapters and dropouts of the seed model


def has_bf16_units(device: str | torch.device) -> bool:
    """Whether this is a GPU that computes in bf16; others (T4, V100) emulate it, slowly."""
    cuda = torch.device(device).type == "cuda"
    return cuda and torch.cuda.is_bf16_supported(including_emulation=False)


def default_dtype(device: str | torch.device) -> torch.dtype:
    """bf16 on a GPU with bf16 units, else fp32 (a CPU's text is then the same on every CPU run)."""
    return torch.bfloat16 if has_bf16_units(device) else torch.float32


class Llama:
    """A frozen Llama. `forward(lora=None)` is the seed model; adapters come in as data."""

    def __init__(
        self,
        config: LlamaConfig,
        weights: Mapping[str, Tensor | PackedWeight],
        ops: Ops | None = None,
    ) -> None:
        self.config, self.weights = config, weights
        self.sharded = hasattr(weights, "whole")
        if self.device.type == "cuda":
            sum_products_in_fp32()
        self.ops = ops or choose("auto", self.device, self.dtype, config.widths)
        self._cos_sin: Tensor | None = None
        # set for packed weights: all layers in one call (kernels/cpu/fused_layers.py)
        packed = self.ops.layers is not None and not isinstance(weights["0.qkv"], Tensor)
        self.at_once = self.ops.layers(weights, config.num_layers) if packed else None

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
        a plain Llama (see model/config.py, model/weights.py).
        """
        path = Path(path)
        dtype = dtype or default_dtype(device)
        if dtype not in (torch.float32, torch.bfloat16, torch.float64):
            raise ValueError(f"dtype {dtype}: float32, bfloat16 or float64 is wanted")
        checkpoint = locate(path, LlamaConfig.from_dir(path))
        weights = load_weights(checkpoint, device, dtype, shard)
        return cls(checkpoint.config, weights, ops)

    @property
    def device(self) -> torch.device:
        return self.weights["norm"].device

    @property
    def dtype(self) -> torch.dtype:
        return self.weights["norm"].dtype

    def _layers(self, order: Iterable[int]) -> Iterator[int]:
        """Layer numbers; sharded weights of each are here until the next is asked for."""
        if not self.sharded:
            yield from order
            return
        for unit, following in pairwise([*map(str, order), None]):
            with self.weights.whole(unit, following):
                yield int(unit)

    def _whole_head(self) -> contextlib.AbstractContextManager:
        """Inside `with` the head is here."""
        return self.weights.whole_head() if self.sharded else contextlib.nullcontext()

    # ---- adapters

    def bind(self, lora: Lora) -> None:
        """Bind an adapter to this model's shapes, device and dtype.

        ValueError where its shapes differ, or where it holds copies of the base's embedding or
        head that are not equal to this model's (all of these matrices must be here, not released).
        """
        lora.check_fits(self.config)
        lora.check_copies(self.config, lambda name: self._rows_here(COPIED[name]))
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

    def _rows_here(self, name: str) -> Iterable[tuple[Tensor, int]]:
        """The rows of "embed" or "head" that this process holds: tensors, each with the number of
        its first row."""
        if self.sharded:
            return self.weights.local(name)
        weight = self.weights[name]
        return [(weight if isinstance(weight, Tensor) else weight.unpack(), 0)]

    # ---- forward

    def forward(
        self,
        tokens: Tensor,  # (T,) int64
        context: Packed | Cached,
        *,
        lora: Lora | None = None,
        tape: Tape | None = None,
        cache: KVCache | None = None,
        wanted: Tensor | None = None,  # (n,) int64 tokens
    ) -> Tensor:
        """Hidden states (T, D) after the last norm, or (n, D) of the `wanted` tokens alone.

        With a `Tape` (training; needs a Packed) what the backward needs is recorded and dropout
        is on; with a `Cached` the new keys and values are written into `cache`. Behind the last
        layer's attention only the wanted tokens are computed: of a prompt, its last.
        """
        assert (cache is None) == isinstance(context, Packed), "a Cached context needs a cache"
        assert tape is None or cache is None, "only packed rows can be trained on"
        assert wanted is None or tape is None, "a backward needs every token"
        if lora is not None:
            self.ensure_bound(lora)
        w, eps = self.weights, self.config.rms_norm_eps
        cos_sin = self._rope_table(context)
        h, x = w.embed(tokens) if self.sharded else w["embed"][tokens], None
        order = self._layers(range(self.config.num_layers))
        if self.at_once is not None and cache is not None and lora is None:
            x, h = self.at_once(h, context, cos_sin, cache.k, cache.v, eps, wanted)
            order = ()
        for i in order:
            if x is None:
                y, rstd = self.ops.rms_norm_forward(h, w[f"{i}.attn_norm"], eps)
            else:
                y, h, rstd = self.ops.add_rms_norm_forward(x, h, w[f"{i}.attn_norm"], eps)
            saved = None if tape is None else Saved(h=h, rstd1=rstd)
            last = wanted if i == self.config.num_layers - 1 else None
            x, h = self._layer(i, y, h, context, cos_sin, lora, saved, cache, last)
            if tape is not None:
                _drop(saved, tape.policy)
                tape.layers.append(saved)
        y, h, rstd = self.ops.add_rms_norm_forward(x, h, w["norm"], eps)
        if tape is not None:
            tape.packed, tape.lora, tape.h, tape.rstd = context, lora, h, rstd
        return y

    def _layer(
        self,
        i: int,
        y: Tensor,  # (T, D) normed
        h: Tensor,  # (T, D) residual stream
        context: Packed | Cached,
        cos_sin: Tensor,
        lora: Lora | None,
        saved: Saved | None,
        cache: KVCache | None = None,
        wanted: Tensor | None = None,  # (n,) the tokens that go on behind attention
    ) -> tuple[Tensor, Tensor]:
        """The feed-forward branch's output x and the residual stream h it is to be added to."""
        c, ops, w = self.config, self.ops, self.weights
        H, G = c.num_heads, c.num_kv_heads
        args = NOTHING
        if lora is not None:
            args = {g: self._adapter(i, g, lora, context, saved is not None) for g in GROUPS}

        qkv, s_qkv = ops.lora_linear_forward(y, w[f"{i}.qkv"], *args["qkv"])
        qkv = ops.rope_(qkv, context.positions, cos_sin, H, G)
        lse = None
        if cache is None:
            o, lse = ops.attention_forward(qkv, context, H, G)
        else:
            ops.kv_write_(qkv, cache.k[i], cache.v[i], context)
            o = ops.cached_attention(qkv, cache.k[i], cache.v[i], context)
        if wanted is not None:
            o, h = o[wanted], h[wanted]
        a, s_o = ops.lora_linear_forward(o, w[f"{i}.o"], *args["o"])
        y, h, rstd = ops.add_rms_norm_forward(a, h, w[f"{i}.mlp_norm"], c.rms_norm_eps)
        gate_up, s_gate_up = ops.lora_linear_forward(y, w[f"{i}.gate_up"], *args["gate_up"])
        m = ops.swiglu_forward(gate_up)
        x, s_down = ops.lora_linear_forward(m, w[f"{i}.down"], *args["down"])

        if saved is not None:
            saved.qkv, saved.o, saved.lse, saved.h_mid, saved.rstd2 = qkv, o, lse, h, rstd
            saved.gate_up = gate_up
            saved.s = {"qkv": s_qkv, "o": s_o, "gate_up": s_gate_up, "down": s_down}
        return x, h

    def _adapter(
        self, i: int, name: str, lora: Lora, context: Packed | Cached, training: bool
    ) -> tuple[LoraGroup | None, Dropout | None]:
        """Group and dropout of one input; dropout only where a tape records."""
        group = lora.group(i, name)
        if group is None or not training or lora.config.dropout == 0:
            return group, None
        assert context.row_keys is not None, "dropout needs row keys in the Packed"
        key = mix("dropout", lora.config.seed, i, name)
        return group, Dropout(
            lora.config.dropout, key, context.positions, context.row_keys, context.step
        )

    @property
    def angles(self) -> Tensor | None:
        """The rotary table in use: a longer row replaces it, so a captured forward must hold it."""
        return self._cos_sin

    def _rope_table(self, context: Packed | Cached) -> Tensor:
        """cos_sin, long enough for this forward; built once and doubled when outgrown."""
        if isinstance(context, Packed):
            longest = max((b - a for a, b in context.rows), default=0) + context.prefix
        else:
            pairs = zip(context.query_lens, context.context_lens, strict=True)
            longest = max((q + c for q, c in pairs), default=0)
        assert longest <= self.config.max_position, (
            f"a row of {longest} tokens, but the model was made for {self.config.max_position}"
        )
        have = 0 if self._cos_sin is None else self._cos_sin.shape[0]
        if self._cos_sin is None or longest > have:
            positions = min(max(longest, 2 * have, 512), self.config.max_position)
            dtype = accumulate_dtype(self.dtype)
            self._cos_sin = cos_sin_table(self.config, positions, self.device, dtype)
        return self._cos_sin

    # ---- backward

    def backward(self, dhidden: Tensor, tape: Tape) -> None:
        """Add the gradients of every adapter tensor into `tape.lora.grads`; uses up the tape.

        dhidden (T, D) is the gradient of the loss with respect to what `forward` returned. Nothing
        is computed below the first adapter.
        """
        assert tape.lora is not None and tape.h is not None, "the tape has no adapted forward"
        w, packed, lora = self.weights, tape.packed, tape.lora
        cos_sin = self._rope_table(packed)
        dh = self.ops.rms_norm_backward(dhidden, tape.h, w["norm"], tape.rstd)
        tape.h = None
        order = [(i, g) for i in range(self.config.num_layers) for g in GROUPS]
        lowest = next(place for place in order if lora.group(*place) is not None)
        for i in self._layers(reversed(range(lowest[0], self.config.num_layers))):
            saved = tape.layers.pop()
            dh = self._layer_backward(i, dh, saved, packed, cos_sin, lora, lowest, tape.policy)
        tape.layers.clear()

    def _layer_backward(
        self,
        i: int,
        dh: Tensor,  # (T, D) gradient of the residual stream after the layer
        saved: Saved,
        packed: Packed,
        cos_sin: Tensor,
        lora: Lora,
        lowest: tuple[int, str],  # the first adapted group: nothing below needs a gradient
        policy: str,
    ) -> Tensor | None:
        """The gradient of the residual stream before the layer, None below the first adapter."""
        c, ops, w = self.config, self.ops, self.weights
        H, G = c.num_heads, c.num_kv_heads
        args = {g: self._adapter(i, g, lora, packed, True) for g in GROUPS}

        def linear_backward(name: str, dy: Tensor, x: Tensor, need_dx: bool) -> Tensor | None:
            group, dropout = args[name]
            weight, s = w[f"{i}.{name}"], saved.s[name]
            return ops.lora_linear_backward(dy, x, weight, s, group, need_dx, dropout)

        # 1. what the policy dropped is computed again, and the inputs of adapted products; of the
        #    others the backward asks for nothing but the shape
        y1 = y2 = saved.h
        if policy == "full" or args["qkv"][0] is not None:
            y1, _ = ops.rms_norm_forward(saved.h, w[f"{i}.attn_norm"], c.rms_norm_eps)
        if policy == "full":
            self._layer(i, y1, saved.h, packed, cos_sin, lora, saved)
        if policy == "selective" or args["gate_up"][0] is not None:
            y2, _ = ops.rms_norm_forward(saved.h_mid, w[f"{i}.mlp_norm"], c.rms_norm_eps)
        if policy == "selective":
            saved.gate_up, _ = ops.lora_linear_forward(y2, w[f"{i}.gate_up"], *args["gate_up"])

        # 2. feed-forward; x and h both receive dh
        m = saved.gate_up[:, : c.intermediate_size]
        if args["down"][0] is not None:
            m = ops.swiglu_forward(saved.gate_up)
        dm = linear_backward("down", dh, m, lowest != (i, "down"))
        if dm is None:
            return None
        dgate_up = ops.swiglu_backward(dm, saved.gate_up)
        saved.gate_up = m = dm = None
        dy = linear_backward("gate_up", dgate_up, y2, lowest != (i, "gate_up"))
        if dy is None:
            return None
        dh = ops.add_rms_norm_backward(dy, dh, saved.h_mid, w[f"{i}.mlp_norm"], saved.rstd2)

        # 3. attention; a and h both receive dh
        do = linear_backward("o", dh, saved.o, lowest != (i, "o"))
        if do is None:
            return None
        dqkv = ops.attention_backward(do, saved.qkv, saved.o, saved.lse, packed, H, G)
        dqkv = ops.rope_(dqkv, packed.positions, cos_sin, H, G, inverse=True)
        dy = linear_backward("qkv", dqkv, y1, lowest != (i, "qkv"))
        if dy is None:
            return None
        return ops.add_rms_norm_backward(dy, dh, saved.h, w[f"{i}.attn_norm"], saved.rstd1)

    # ---- use

    def logits(self, tokens: Tensor, lora: Lora | None = None) -> Tensor:
        """(T, V) logits of one sequence (T,) of token ids."""
        tokens = torch.as_tensor(tokens, dtype=torch.int64, device=self.device)
        vocab, longest = self.config.vocab_size, self.config.max_position
        if tokens.dim() != 1 or len(tokens) > longest:
            raise ValueError(
                f"tokens {tuple(tokens.shape)}: one sequence (T,) of up to {longest} is wanted"
            )
        if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocab:
            low, high = int(tokens.min()), int(tokens.max())
            raise ValueError(f"token ids {low} to {high}: 0 to {vocab - 1} are wanted")
        packed = Packed.from_lengths([len(tokens)] if len(tokens) else [], self.device)
        return self.head(self.forward(tokens, packed, lora=lora))

    def head(self, hidden: Tensor) -> Tensor:
        """Logits (N, V) of hidden states (N, D)."""
        with self._whole_head():
            return self.ops.linear(hidden, self.weights["head"])

    def nll(
        self, hidden: Tensor, targets: Tensor, need_grad: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """-log p of targets (N,) at hidden states (N, D), and the gradient of their sum (N, D)."""
        with self._whole_head():
            head = self.weights["head"]
            return self.ops.linear_cross_entropy(hidden, head, targets, need_grad)

    def for_sampling(
        self, lora: Lora | None = None, release: bool = False, invariant: bool = False
    ) -> tuple[Llama, Lora | None]:
        """A model whose every product has one form for a whole run, and the adapter still to pass.

        On a CPU in fp32 the matrices are packed, the adapter merged into the copy (measured faster
        than two more products per group, and a row stays a row; the base stays as it is): into
        panels of our own C (kernels/cpu/panels.py; the embeddings too) where `ops` has them, else
        into
        oneDNN's layout. Elsewhere: this model and the adapter. `release` gives this model's own
        matrices up while they are packed, so that memory does not double, until `restore`; with
        an adapter they are kept, since a sum cannot be taken apart exactly.

        `invariant` asks that a row's bits be its own. That is so on a CPU, packed; elsewhere it is
        another table of operations over the same matrices, the adapter not merged: in bf16 a sum
        would lose the small changes. ValueError where there is no such table.
        """
        if self.sharded:
            raise ValueError(
                "sampling needs all weights in every process: it is done without --shard; only "
                "training and scoring share them out"
            )
        ops, embed = self.ops.sampled or self.ops, self.weights["embed"]
        native = ops.packs == "panels"
        if invariant and not (native or (ops is TORCH and Prepacked.available(embed))):
            return Llama(self.config, self.weights, registry.invariant(self.ops)), lora
        if not native and (ops.name == "reference" or not Prepacked.available(embed)):
            return self, lora  # the definition knows plain matrices only
        if lora is not None:
            self.ensure_bound(lora)
        tied = self.config.tie_embeddings
        packed: dict[str, Tensor | PackedWeight] = {}
        for name in sorted(self.weights, key="embed".__eq__):  # what is tied to another comes last
            weight = self.weights[name]
            layer, _, group = name.partition(".")
            assert lora is None or isinstance(weight, Tensor), "released: restore it first"
            if native and name == "embed" and tied:
                packed[name] = packed["head"]
            elif isinstance(weight, Tensor) and (
                group in GROUPS or name == "head" or (native and name == "embed")
            ):
                if lora is not None and group in GROUPS:
                    weight = _merged(weight, lora, layer, group)
                packed[name] = prepack(weight, native)
            else:
                packed[name] = weight
            if release and lora is None:
                self.weights[name] = packed[name]
        return Llama(self.config, packed, ops), None

    def restore(self) -> None:
        """Take back, bit for bit, the matrices that `for_sampling` released."""
        tied = self.config.tie_embeddings
        for name, weight in self.weights.items():
            if not isinstance(weight, Tensor) and not (tied and name == "head"):
                self.weights[name] = weight.unpack()
        if tied:
            self.weights["head"] = self.weights["embed"]


def _merged(weight: Tensor, lora: Lora, layer: str, name: str) -> Tensor:
    """W + s B A of a group's members, one below the other; W itself where there is no adapter."""
    adapters = lora.group(int(layer), name)
    if adapters is None:
        return weight
    deltas = [lora.delta(f"model.layers.{layer}.{member}.weight") for member in GROUPS[name]]
    parts = zip(weight.split(adapters.sizes), deltas, strict=True)
    return torch.cat([p if d is None else p + d for p, d in parts])


def _drop(saved: Saved, policy: str) -> None:
    """Forget what the policy says is computed again."""
    if policy == "selective":
        saved.gate_up = None
    elif policy == "full":
        saved.qkv = saved.o = saved.lse = saved.h_mid = saved.rstd2 = saved.gate_up = None
        saved.s = {}
