"""Export of a model, or of an adapter alone, as a llama.cpp GGUF file.

    export_model      the weights of a Hugging Face directory, with W + s B A in place of every
                      adapted W; configuration, tokenizer and chat template
    export_adapter    the matrices A and B alone, which llama.cpp adds to the GGUF of the base
                      (llama-server --lora FILE)

Names and the order of the rows of q and k are those that gguf_weights.py reads. Which architecture
of llama.cpp a model is (llama, qwen2, qwen3, smollm3) follows from what it computes. A GGUF has one
alpha for all modules, and llama.cpp computes alpha / r with the rank r of each matrix. Where the
scale of a module differs from that (`alpha_pattern`), B is multiplied by the quotient.
"""

# K = inputs of a linear layer, N = its outputs, r = rank, d = head size

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.jobs.gguf_vocabulary import vocabulary
from engine.jobs.gguf_weights import gguf_name, pairs_of_heads, permuted_heads
from engine.jobs.gguf_writer import FILE_TYPES, Tensor, write_gguf
from model.config import LlamaConfig
from model.hf_checkpoint import Checkpoint, check_finite, locate
from model.layout import EMBEDDING, checkpoint_shapes
from model.lora import Lora, a_name, b_name
from model.peft_format import check_copies
from model.rope import inverse_frequencies
from model.trained_chat import TrainedChat

ROPE_DIVISORS = "rope_freqs.weight"
UNROTATED_INTERVAL = 4  # llama.cpp leaves every fourth layer of a SmolLM3 unrotated; no key says so


def export_model(
    model_dir: Path, lora: Lora | None, out: Path, kind: str, tokenizer_dir: Path | None = None
) -> dict[str, str]:
    """Write the model with the adapter merged in, if there is one, as the GGUF file `out`.

    kind: F32, F16, BF16 or Q8_0. tokenizer_dir: where the tokenizer, its chat template and the end
    tokens are read, if not in the model's directory. The sum W + s B A is made in fp32 and rounded
    once. Returns the number format of every tensor. ValueError where llama.cpp has no form of the
    model or of its tokenizer, the adapter does not fit, or a number is not finite.
    """
    stated = LlamaConfig.from_dir(model_dir)
    checkpoint = locate(model_dir, stated)
    config = checkpoint.config
    if lora is not None:
        lora.check_fits(config)
        check_copies(lora, config, lambda name: [(_tensor(checkpoint, name), 0)])
    metadata = {
        "general.type": "model",
        "general.name": model_dir.resolve().name,
        "general.file_type": FILE_TYPES[kind],
        "general.quantization_version": 2,  # of Q8_0's layout
        **config_metadata(config),
        **vocabulary(tokenizer_dir or model_dir, config.vocab_size),
    }
    tensors = _model_tensors(checkpoint, lora, model_dir)
    return write_gguf(out, architecture_of(config), metadata, tensors, kind)


# the files of a directory from which its tokenizer, chat template and end tokens are read
TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
)


def with_trained_chat(model_dir: Path, trained: TrainedChat | None, folder: Path) -> Path:
    """A directory with the model's tokenizer and the chat template and end token of a training.

    folder: an empty directory, which becomes that. The model's own directory where there was no
    training, or its format is not known.
    """
    if trained is None:
        return model_dir
    for name in TOKENIZER_FILES:
        if (model_dir / name).exists():
            shutil.copyfile(model_dir / name, folder / name)
    trained.install(folder)
    return folder


def architecture_of(config: LlamaConfig) -> str:
    """llama.cpp's name for what a model of this `config` computes.

    ValueError where llama.cpp computes it under no name.
    """
    if config.qk_norm:
        architecture = "qwen3"
    elif config.qkv_bias:
        architecture = "qwen2"
    elif config.unrotated_layers:
        architecture = "smollm3"
    else:
        architecture = "llama"
    computed = tuple(range(UNROTATED_INTERVAL - 1, config.num_layers, UNROTATED_INTERVAL))
    if architecture == "smollm3" and config.unrotated_layers != computed:
        raise ValueError(
            f"the layers {list(config.unrotated_layers)} are not rotated; llama.cpp computes a "
            f"SmolLM3 with every fourth layer unrotated, {list(computed)}, and no other"
        )
    if config.rope_scaling["rope_type"] == "llama3" and architecture != "llama":
        raise ValueError(
            f"rope type 'llama3' in a {architecture}; llama.cpp computes that scaling for a Llama "
            "only"
        )
    return architecture


def config_metadata(config: LlamaConfig) -> dict[str, Any]:
    """The keys of a model under its architecture's name (`llama.*`).

    The context is that of the sliding window, where there is one: llama.cpp has no window for these
    architectures, and within it there is no difference.
    """
    architecture = architecture_of(config)
    scaling = config.rope_scaling
    stated = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position,
        "embedding_length": config.hidden_size,
        "block_count": config.num_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": float(config.rope_theta),
    }
    if scaling["rope_type"] == "linear":
        stated["rope.scaling.type"] = "linear"
        stated["rope.scaling.factor"] = float(scaling["factor"])
    return {f"{architecture}.{key}": value for key, value in stated.items()}


def _model_tensors(checkpoint: Checkpoint, lora: Lora | None, model_dir: Path) -> Iterator[Tensor]:
    """Every tensor of the file, in the order of the layers."""
    config = checkpoint.config
    heads = permuted_heads(architecture_of(config), config)

    def of(name: str) -> Callable[[], np.ndarray]:
        def values() -> np.ndarray:
            weight = _tensor(checkpoint, name)
            check_finite(weight, name, model_dir)
            weight = weight.float()
            delta = None if lora is None else lora.delta(name)  # (N, K), as the weight
            if delta is not None:
                weight = weight + delta.cpu().float()
            rows = weight.numpy()
            module = name.split(".")[-2]
            return pairs_of_heads(rows, heads[module]) if module in heads else rows

        return values

    for name, shape in checkpoint_shapes(config).items():
        yield Tensor(gguf_name(name), tuple(shape), of(name))
    if config.rope_scaling["rope_type"] == "llama3":
        divisors = rope_divisors(config)
        yield Tensor(ROPE_DIVISORS, divisors.shape, lambda: divisors)


def rope_divisors(config: LlamaConfig) -> np.ndarray:
    """What Llama 3's scaling divides each frequency by, (d/2,) fp32."""
    plain = inverse_frequencies(replace(config, rope_scaling={"rope_type": "default"}))  # (d/2,)
    return (plain / inverse_frequencies(config)).float().numpy()


def _tensor(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """A whole tensor in the dtype in which it is stored; a tied head is the embedding."""
    stored = name if name in checkpoint.files else EMBEDDING
    shape = checkpoint_shapes(checkpoint.config)[stored]
    return checkpoint.rows(stored, 0, shape[0])


def export_adapter(lora: Lora, model_dir: Path, out: Path, kind: str) -> dict[str, str]:
    """Write an adapter alone as the GGUF file `out`, to be loaded beside the model's GGUF.

    Returns the number format of every tensor. ValueError where the adapter does not fit the model,
    and for one at strength 0, which would be the model itself.
    """
    config = LlamaConfig.from_dir(model_dir)
    lora.check_fits(config)
    if lora.strength == 0:
        raise ValueError("at scale 0 the adapter does nothing: export the model without it")
    alpha = lora.strength * lora.config.alpha
    if lora.config.rslora:
        alpha = lora.strength * lora.config.scale * lora.config.rank
    metadata = {
        "general.type": "adapter",
        "general.file_type": FILE_TYPES[kind],
        "general.quantization_version": 2,
        "adapter.type": "lora",
        "adapter.lora.alpha": float(alpha),
    }
    tensors = _adapter_tensors(lora, config, alpha)
    return write_gguf(out, architecture_of(config), metadata, tensors, kind)


def _adapter_tensors(lora: Lora, config: LlamaConfig, alpha: float) -> Iterator[Tensor]:
    """lora_a (r, K) and lora_b (N, r) of every adapted module, at the module's own rank."""
    heads = permuted_heads(architecture_of(config), config)

    def numbers(matrix: torch.Tensor) -> np.ndarray:
        return matrix.detach().cpu().float().numpy()

    def tensors_of(module: str) -> Iterator[Tensor]:
        rank = lora.module_rank(module)
        a = lora.view(lora.params, a_name(module))[:rank]  # (r, K)
        b = lora.view(lora.params, b_name(module))[:, :rank]  # (N, r)
        quotient = lora.strength * lora.group_scale(module) / (alpha / rank)
        short_name = module.split(".")[-1]

        def b_values() -> np.ndarray:
            as_trained = math.isclose(quotient, 1, rel_tol=1e-12)
            rows = numbers(b if as_trained else b * quotient)
            return pairs_of_heads(rows, heads[short_name]) if short_name in heads else rows

        name = gguf_name(f"{module}.weight")
        yield Tensor(f"{name}.lora_a", tuple(a.shape), lambda: numbers(a))
        yield Tensor(f"{name}.lora_b", tuple(b.shape), b_values)

    for name in checkpoint_shapes(config):
        module = name.removesuffix(".weight")
        if a_name(module) in lora.slots:
            yield from tensors_of(module)
