"""Random small Llamas as Hugging Face directories, with a tokenizer that has one token a byte."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from model.families import FAMILIES

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_llama(
    path: Path,
    *,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    hidden: int | None = None,  # default: heads * head_dim
    intermediate: int = 96,
    vocab: int = 320,
    tied: bool = True,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    tokenizer: bool = False,
    **config: object,
) -> Path:
    """Write a random Llama into the directory `path` and return it.

    With a `model_type` among the further settings it is a model of that family, with the tensors
    that the family has. The arguments are those of the fixture `tiny_llama_dir`
    (tests/conftest.py).
    """
    hidden = hidden or heads * head_dim
    model_type = str(config.get("model_type", "llama"))
    family = FAMILIES.get(model_type, FAMILIES["llama"])
    settings = {
        "architectures": [family.architecture],
        "model_type": model_type,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": vocab,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "bos_token_id": 257,
        "eos_token_id": 258,
        **config,
    }
    settings = {key: value for key, value in settings.items() if value is not None}
    (path / "config.json").write_text(json.dumps(settings, indent=2))

    shapes = {"model.embed_tokens": (vocab, hidden), "model.norm": (hidden,)}
    for i in range(layers):
        widths = (hidden, heads * head_dim, kv_heads * head_dim, intermediate)
        for name, shape in _layer_shapes(*widths).items():
            shapes[f"model.layers.{i}.{name}"] = shape
    if not tied:
        shapes["lm_head"] = (vocab, hidden)
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        # Norms near one, matrices keeping the variance: logits neither flat nor spiky.
        tensor = 1 + 0.1 * noise if len(shape) == 1 else noise / shape[-1] ** 0.5
        weights[f"{name}.weight"] = tensor.to(dtype)
    if family.qkv_bias:
        for name, shape in shapes.items():
            if name.endswith(("q_proj", "k_proj", "v_proj")):
                bias = torch.randn(shape[0], generator=generator)  # as large as what it is added to
                weights[f"{name}.bias"] = bias.to(dtype)
    if family.qk_norm:
        for i in range(layers):
            for name in ("q_norm", "k_norm"):
                weight = 1 + 0.3 * torch.randn(head_dim, generator=generator)
                weights[f"model.layers.{i}.self_attn.{name}.weight"] = weight.to(dtype)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    if tokenizer:
        _write_byte_tokenizer(path)
    return path


def _layer_shapes(
    hidden: int, queries: int, keys: int, intermediate: int
) -> dict[str, tuple[int, ...]]:
    """The matrices and norms of one layer, in the order in which their values are drawn."""
    return {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }


def _write_byte_tokenizer(path: Path) -> None:
    """A tokenizer.json with one token a byte, written by hand: making it needs no package."""
    # Byte-level BPE spells a byte as a printable character: itself where it has one, else 256 + n.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    spelling = {byte: chr(byte) for byte in printable}
    spelling |= {byte: chr(256 + n) for n, byte in enumerate(others)}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    added = [
        {"id": 256 + n, "content": text, "special": True, **flags} for n, text in enumerate(special)
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {**byte_level, "use_regex": True},
        "post_processor": None,
        "decoder": {**byte_level, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {spelling[byte]: byte for byte in range(256)},
            "merges": [],
        },
    }
    (path / "tokenizer.json").write_text(json.dumps(document))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "chat_template": CHATML,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
