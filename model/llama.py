"""Llama, forward and backward, written out; other families add a few facts (model/families.py).

    h = embed(tokens)                     (T, D)   residual stream
    in every layer
        y1 = rms_norm(h)                  (T, D)
        qkv = y1 Wqkv^T                   (T, (H + 2G) d)   + bias, where the family has one
        rope(qkv)                         queries and keys rotated by their positions; there may be
                                          a norm of each head before, or layers without rotation
        o = attention(qkv)                (T, H d)
        a = o Wo^T                        (T, D)
        h_mid = h + a                     (T, D)
        y2 = rms_norm(h_mid)              (T, D)
        gate_up = y2 Wgate_up^T           (T, 2F)
        m = silu(gate) * up               (T, F)
        x = m Wdown^T                     (T, D)
        h = h_mid + x                     (T, D)
    hidden = rms_norm(h)                  (T, D)
    logits = hidden head^T                (T, V)

A sum and the norm after it are one operation (`add_rms_norm_forward`): a layer therefore returns x
and h_mid, and the next norm adds them. Each of the four products may have a LoRA adapter.

No batch dimension and no padding: the tokens of all rows lie end to end, and a `Packed` or `Cached`
says who attends to whom. No autograd: `forward(..., tape=...)` records what the recomputation
policy keeps (model/tape.py) and `backward` walks the layers back, adding adapter gradients into
`lora.grads`. Sharded weights (model/sharded.py) are gathered layer by layer while they are used.
"""

# T = tokens, D = model width, F = feed-forward width, V = vocabulary
# H = query heads, G = key/value heads, d = head size

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kernels.cached import Cached
from kernels.dtypes import sum_products_in_fp32
from kernels.packed import Packed
from kernels.philox import Dropout, mix
from kernels.registry import Ops
from kernels.select_ops import choose
from model.config import LlamaConfig
from model.hf_checkpoint import locate
from model.kv_cache import KVCache
from model.layout import GROUPS, bias_name, biased_groups, place_of
from model.lora import Lora
from model.packed_weights import samples_from_panels
from model.peft_format import check_copies
from model.rotation import Rotation
from model.tape import Adapters, GroupAdapter, Saved, Tape
from model.weights import Weights, load_packed_weights, load_weights

NO_ADAPTERS: Adapters = {group: GroupAdapter(None, None) for group in GROUPS}  # the seed model's


def has_bf16_units(device: str | torch.device) -> bool:
    """Whether this is a GPU that computes in bf16; others (T4, V100) emulate it, slowly."""
    if torch.device(device).type != "cuda":
        return False
    return torch.cuda.is_bf16_supported(including_emulation=False)


def default_dtype(device: str | torch.device) -> torch.dtype:
    """bf16 on a GPU with bf16 units, else fp32 (a CPU's text is then the same on every CPU run)."""
    return torch.bfloat16 if has_bf16_units(device) else torch.float32


@dataclass(frozen=True)
class ForwardInputs:
    """The inputs of one forward that every layer reads."""

    context: Packed | Cached  # who attends to whom
    cache: KVCache | None = None  # the pages of a Cached context
    logits_indices: Tensor | None = None  # (n,) int64: the tokens that are needed after the last
    #   layer's attention; None: all


class Llama:
    """A frozen Llama. `forward(lora=None)` is the seed model; adapters come in as data."""

    def __init__(self, config: LlamaConfig, weights: Weights, ops: Ops | None = None) -> None:
        self.config = config
        self.weights = weights
        if self.device.type == "cuda":
            sum_products_in_fp32()
        self.ops = ops or choose("auto", self.device, self.dtype, config.widths)
        self.biased_groups = biased_groups(config)
        self.rotation = Rotation(config)
        # for packed weights: all layers in one call (kernels/cpu/fused_layers.py)
        self.fused_layers = None
        if self.ops.layers is not None and not isinstance(weights["0.qkv"], Tensor):
            self.fused_layers = self.ops.layers(weights, config.num_layers, config.unrotated_layers)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        ops: Ops | None = None,
        shard: bool = False,
        packed: bool = False,
    ) -> Llama:
        """Load a Hugging Face directory: config.json and F32/F16/BF16 safetensors.

        dtype None is bf16 on a device with bf16 units, else fp32. With `shard` the processes of
        the job share the weights out. `packed`, for sampling alone: where it would pack the
        matrices in panels, they are packed as they are read, and never held in fp32 together.
        Raises ValueError naming the file for anything that is not a plain Llama (see
        model/config.py, model/hf_checkpoint.py).
        """
        path = Path(path)
        dtype = dtype or default_dtype(device)
        if dtype not in (torch.float32, torch.bfloat16, torch.float64):
            raise ValueError(f"dtype {dtype}: expected float32, bfloat16 or float64")
        checkpoint = locate(path, LlamaConfig.from_dir(path))
        if packed:
            ops = ops or choose("auto", device, dtype, checkpoint.config.widths)
        if packed and not shard and samples_from_panels(ops, dtype):
            weights = load_packed_weights(checkpoint)
        else:
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
        """Bind an adapter that is not bound yet; ValueError where it is bound to another model."""
        if lora.bound is None:
            self.bind(lora)
        elif lora.bound != (self.config, self.device, self.dtype):
            _, device, dtype = lora.bound
            raise ValueError(
                f"the adapter is bound to another model ({device}, {dtype}), this one is on "
                f"{self.device} in {self.dtype}; call model.bind(lora)"
            )

    def _adapters(
        self, i: int, lora: Lora | None, context: Packed | Cached, training: bool
    ) -> Adapters:
        """The adapter and the dropout of every group of layer i; dropout only in training."""
        if lora is None:
            return NO_ADAPTERS
        rate = lora.config.dropout if training else 0.0
        adapters: dict[str, GroupAdapter] = {}
        for name in GROUPS:
            group = lora.group(i, name)
            dropout = None
            if group is not None and rate > 0:
                assert context.row_keys is not None, "dropout needs row keys in the Packed"
                key = mix("dropout", lora.config.seed, i, name)
                dropout = Dropout(rate, key, context.positions, context.row_keys, context.step)
            adapters[name] = GroupAdapter(group, dropout)
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
        logits_indices: Tensor | None = None,  # (n,) int64, increasing
    ) -> Tensor:
        """Hidden states (T, D) after the last norm; with `logits_indices` (n, D) of those tokens.

        With a `tape` (training; the context must be a Packed) the tensors for the backward are
        recorded and dropout is on. With a Cached context the new keys and values are written into
        `cache`. `logits_indices` names the tokens whose results are needed (the last one of a
        prompt): after the last layer's attention only these are computed.
        """
        assert (cache is None) == isinstance(context, Packed), "a Cached context needs a cache"
        assert tape is None or cache is None, "only packed rows can be trained on"
        assert logits_indices is None or tape is None, "a backward needs every token"
        if lora is not None:
            self.ensure_bound(lora)
            if lora.strength == 0:
                lora = None  # the seed's own path, so that every bit is the seed's
        eps = self.config.rms_norm_eps
        self.rotation.grow(context, self.device, self.dtype)
        h = self.weights.embed(tokens)  # (T, D)
        if self.fused_layers is not None and cache is not None and lora is None:
            x, h = self.fused_layers(
                h, context, self.rotation.cos_sin, cache.k, cache.v, eps, logits_indices
            )  # (n, D), (n, D)
        else:
            inputs = ForwardInputs(context, cache, logits_indices)
            x, h = self._run_layers(h, inputs, lora, tape)  # (n, D), (n, D)
        norm = self.weights["norm"]  # (D,)
        hidden, h, rstd = self.ops.add_rms_norm_forward(x, h, norm, eps)  # (n, D), (n, D), (n,)
        if tape is not None:
            tape.packed = context
            tape.lora = lora
            tape.h = h
            tape.rstd = rstd
        return hidden  # (T, D) or (n, D)

    def _run_layers(
        self,
        h: Tensor,  # (T, D) embedded tokens
        inputs: ForwardInputs,
        lora: Lora | None,
        tape: Tape | None,
    ) -> tuple[Tensor, Tensor]:
        """The last layer's feed-forward output x and the residual stream h, to be added to it."""
        ops = self.ops
        w = self.weights
        eps = self.config.rms_norm_eps
        x = None
        for i in self._gathered_layers(range(self.config.num_layers)):
            if i == 0:
                y1, rstd1 = ops.rms_norm_forward(h, w["0.attn_norm"], eps)  # (T, D), (T,)
            else:
                attn_norm = w[f"{i}.attn_norm"]  # (D,)
                y1, h, rstd1 = ops.add_rms_norm_forward(x, h, attn_norm, eps)
            adapters = self._adapters(i, lora, inputs.context, training=tape is not None)
            saved = None
            if tape is not None:
                saved = Saved(adapters, h=h, rstd1=rstd1)
            x, h = self._layer(i, y1, h, inputs, adapters, saved)  # (T, D), (T, D)
            if tape is not None:
                saved.drop(tape.policy)
                tape.layers.append(saved)
        return x, h

    def _gathered_layers(self, order: Sequence[int]) -> Iterator[int]:
        """Layer numbers, in this order; a layer's weights are whole until the next is asked for."""
        following = [*order[1:], None]
        for i, next_layer in zip(order, following, strict=True):
            with self.weights.layer(i, next_layer):
                yield i

    def _layer(
        self,
        i: int,
        y1: Tensor,  # (T, D) rms_norm(h)
        h: Tensor,  # (T, D) residual stream
        inputs: ForwardInputs,
        adapters: Adapters,
        saved: Saved | None,  # receives the tensors that the backward needs
    ) -> tuple[Tensor, Tensor]:
        """The feed-forward output x and the residual stream h_mid that it is to be added to.

        Both are (T, D), after the last layer (n, D) where `inputs` have `logits_indices`.
        """
        ops = self.ops
        w = self.weights
        context = inputs.context
        cache = inputs.cache
        eps = self.config.rms_norm_eps
        H = self.config.num_heads
        G = self.config.num_kv_heads

        # 1. attention
        plain_qkv, s_qkv = self._linear(i, "qkv", y1, adapters)  # (T, (H + 2G) d), (T, R)
        qkv = self.rotation.forward(ops, w, i, plain_qkv, context.positions)  # (T, (H + 2G) d)
        lse = None
        if cache is None:
            o, lse = ops.attention_forward(qkv, context, H, G)  # (T, H d), (T, H)
        else:
            ops.kv_write_(qkv, cache.k[i], cache.v[i], context)
            o = ops.cached_attention(qkv, cache.k[i], cache.v[i], context)  # (T, H d)
        is_last = i == self.config.num_layers - 1
        if is_last and inputs.logits_indices is not None:
            o = o[inputs.logits_indices]  # (n, H d)
            h = h[inputs.logits_indices]  # (n, D)
        a, s_o = self._linear(i, "o", o, adapters)  # (T, D), (T, R)

        # 2. feed-forward
        mlp_norm = w[f"{i}.mlp_norm"]  # (D,)
        y2, h_mid, rstd2 = ops.add_rms_norm_forward(a, h, mlp_norm, eps)  # (T, D), (T, D), (T,)
        gate_up, s_gate_up = self._linear(i, "gate_up", y2, adapters)  # (T, 2F), (T, R)
        x, s_down = None, None
        if saved is None or saved.needs_output or adapters["down"].lora is not None:
            m = ops.swiglu_forward(gate_up)  # (T, F)
            x, s_down = self._linear(i, "down", m, adapters)  # (T, D), (T, R)

        if saved is not None:
            saved.qkv = plain_qkv if self.config.qk_norm else qkv
            saved.o = o
            saved.lse = lse
            saved.h_mid = h_mid
            saved.rstd2 = rstd2
            saved.gate_up = gate_up
            saved.s = {"qkv": s_qkv, "o": s_o, "gate_up": s_gate_up, "down": s_down}
        return x, h_mid

    def _linear(
        self, i: int, group: str, x: Tensor, adapters: Adapters
    ) -> tuple[Tensor, Tensor | None]:
        """One product of layer i: W x + s B A x (T, N) of x (T, K), and A x (T, R) of its adapter.

        Without an adapter it is W x, and None. Where the group has a bias, that is added.
        """
        weight = self.weights[f"{i}.{group}"]  # (N, K)
        adapter = adapters[group]
        bias = None
        if group in self.biased_groups:
            bias = self.weights[bias_name(i, group)]  # (N,)
        return self.ops.lora_linear_forward(x, weight, adapter.lora, adapter.dropout, bias)

    # ---- backward

    def backward(self, dhidden: Tensor, tape: Tape) -> None:
        """Add the gradients of every adapter tensor into `tape.lora.grads`; uses up the tape.

        dhidden (T, D) is the gradient of the loss with respect to the result of `forward`. Nothing
        is computed below the first adapter.
        """
        lora = tape.lora
        assert lora is not None and tape.h is not None, "the tape has no adapted forward"
        self.rotation.grow(tape.packed, self.device, self.dtype)
        dh = self.ops.rms_norm_backward(dhidden, tape.h, self.weights["norm"], tape.rstd)  # (T, D)
        tape.h = None
        first_layer, first_group = self._first_adapter(lora)
        last_layer = self.config.num_layers - 1
        for i in self._gathered_layers(range(last_layer, first_layer - 1, -1)):
            saved = tape.layers.pop()
            stop_at = first_group if i == first_layer else None
            dh = self._layer_backward(i, dh, saved, tape.packed, tape.policy, stop_at)
        tape.layers.clear()

    def _first_adapter(self, lora: Lora) -> tuple[int, str]:
        """Layer and group of the first adapter in the order of the forward."""
        for i in range(self.config.num_layers):
            for group in GROUPS:
                if lora.group(i, group) is not None:
                    return i, group
        raise AssertionError("the adapter has no matrices")

    def _layer_backward(
        self,
        i: int,
        dh: Tensor,  # (T, D) gradient of the residual stream after the layer
        saved: Saved,
        packed: Packed,
        policy: str,
        stop_at: str | None,  # the group of the model's first adapter, where this layer has it
    ) -> Tensor | None:
        """The gradient (T, D) of the residual stream before the layer. Uses up `saved`.

        Nothing before `stop_at` needs a gradient: the walk ends there, with None.
        """
        ops = self.ops
        w = self.weights
        H = self.config.num_heads
        G = self.config.num_kv_heads

        # 1. tensors that the forward did not keep
        y1, y2, m = self._recompute(i, saved, packed, policy)  # (T, D), (T, D), (T, F)

        # 2. feed-forward; h = h_mid + x, so h_mid and x both receive dh
        need_dx = stop_at != "down"
        dm = self._linear_backward(i, "down", dh, m, saved, need_dx)  # (T, F)
        if not need_dx:
            return None
        dgate_up = ops.swiglu_backward(dm, saved.gate_up)  # (T, 2F)
        saved.gate_up = None
        del m, dm  # free memory before the next product
        need_dx = stop_at != "gate_up"
        dy = self._linear_backward(i, "gate_up", dgate_up, y2, saved, need_dx)  # (T, D) of y2
        if not need_dx:
            return None
        mlp_norm = w[f"{i}.mlp_norm"]  # (D,)
        dh = ops.add_rms_norm_backward(dy, dh, saved.h_mid, mlp_norm, saved.rstd2)  # (T, D)

        # 3. attention; h_mid = h + a, so h and a both receive dh
        need_dx = stop_at != "o"
        do = self._linear_backward(i, "o", dh, saved.o, saved, need_dx)  # (T, H d)
        if not need_dx:
            return None
        qkv = saved.qkv  # (T, (H + 2G) d)
        if self.config.qk_norm:  # the plain ones were kept
            qkv = self.rotation.forward(ops, w, i, qkv, packed.positions)
        # (T, (H + 2G) d)
        dqkv = ops.attention_backward(do, qkv, saved.o, saved.lse, packed, H, G)
        del qkv  # free memory before the next product
        dqkv = self.rotation.backward(ops, w, i, dqkv, saved.qkv, packed.positions)
        need_dx = stop_at != "qkv"
        dy = self._linear_backward(i, "qkv", dqkv, y1, saved, need_dx)  # (T, D) of y1
        if not need_dx:
            return None
        attn_norm = w[f"{i}.attn_norm"]  # (D,)
        return ops.add_rms_norm_backward(dy, dh, saved.h, attn_norm, saved.rstd1)  # (T, D)

    def _linear_backward(
        self, i: int, group: str, dy: Tensor, x: Tensor | None, saved: Saved, need_dx: bool
    ) -> Tensor | None:
        """Add the gradients of A and B of one product of layer i; its dx (T, K) if that is needed.

        dy (T, N) is the gradient of its output, x (T, K) its input, which only the gradient of A
        needs: it may be None where the group has no adapter.
        """
        weight = self.weights[f"{i}.{group}"]  # (N, K)
        s = saved.s[group]  # (T, R)
        adapter = saved.adapters[group]
        return self.ops.lora_linear_backward(
            dy, x, weight, s, adapter.lora, need_dx, adapter.dropout
        )

    def _recompute(
        self, i: int, saved: Saved, packed: Packed, policy: str
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Compute again, into `saved`, the tensors that the policy dropped.

        Returns the inputs of qkv (T, D), gate_up (T, D) and down (T, F), each None where neither an
        adapter nor a recomputation needs it.
        """
        ops = self.ops
        w = self.weights
        eps = self.config.rms_norm_eps
        adapters = saved.adapters
        y1 = None
        if policy == "full" or adapters["qkv"].lora is not None:
            y1, _ = ops.rms_norm_forward(saved.h, w[f"{i}.attn_norm"], eps)  # (T, D)
        if policy == "full":
            self._layer(i, y1, saved.h, ForwardInputs(packed), adapters, saved)
        y2 = None
        if policy == "selective" or adapters["gate_up"].lora is not None:
            y2, _ = ops.rms_norm_forward(saved.h_mid, w[f"{i}.mlp_norm"], eps)  # (T, D)
        if policy == "selective":
            saved.gate_up, _ = self._linear(i, "gate_up", y2, adapters)  # (T, 2F)
        m = None
        if adapters["down"].lora is not None:
            m = ops.swiglu_forward(saved.gate_up)  # (T, F)
        return y1, y2, m

    # ---- use

    def logits(self, tokens: Tensor, lora: Lora | None = None) -> Tensor:
        """(T, V) logits of one sequence (T,) of token ids, in the model's dtype.

        ValueError where tokens has another shape, is longer than the model was made for, or holds
        an id that is not in the vocabulary.
        """
        tokens = torch.as_tensor(tokens, dtype=torch.int64, device=self.device)
        vocab = self.config.vocab_size
        longest = self.config.max_position
        if tokens.dim() != 1 or len(tokens) > longest:
            raise ValueError(
                f"tokens {tuple(tokens.shape)}: expected one sequence (T,) of at most {longest}"
            )
        lengths = []
        if len(tokens) > 0:
            low, high = int(tokens.min()), int(tokens.max())
            if low < 0 or high >= vocab:
                raise ValueError(f"token ids {low} to {high}: expected 0 to {vocab - 1}")
            lengths = [len(tokens)]
        packed = Packed.from_lengths(lengths, self.device)
        hidden = self.forward(tokens, packed, lora=lora)  # (T, D)
        return self.head(hidden)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits (N, V) of hidden states (N, D)."""
        with self.weights.head() as head:  # (V, D)
            return self.ops.linear(hidden, head)

    def nll(
        self,
        hidden: Tensor,
        targets: Tensor,
        need_grad: bool = True,
        entropy: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Cross-entropy (N,) in nats of targets (N,) int64, predicted from hidden states (N, D).

        The second result is the gradient (N, D) of its sum with respect to `hidden`, None without
        `need_grad`. entropy (N,), if given, receives the entropy of the likeliest tokens
        (kernels/linear_cross_entropy.py).
        """
        with self.weights.head() as head:  # (V, D)
            return self.ops.linear_cross_entropy(hidden, head, targets, need_grad, entropy)
