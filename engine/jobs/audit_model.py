"""A tiny random Llama with a tokenizer, for an audit without a checkpoint."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from safetensors.torch import save_file

from engine.runtime.files import write_json
from model.config import LlamaConfig
from model.layout import checkpoint_shapes

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 512,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SENTENCES = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.",
    "### Instruction:",
    "### Response:",
    "the quick brown fox jumps over the lazy dog and the dog sleeps on",
    "write a response to the instruction that completes the request",
    "the answer to the question is the number of pieces in the text",
    "rewrite the answer below in your own words; keep 12 and 34 as they are",
)


def write_tiny_llama(path: Path) -> Path:
    """Write a Llama of two layers, the same every time, with a byte-fallback BPE tokenizer."""
    path.mkdir(parents=True, exist_ok=True)
    write_json(path / "config.json", CONFIG)
    tokenizer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 4),
        model_writer=tokenizer,
        vocab_size=CONFIG["vocab_size"],
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (path / "tokenizer.model").write_bytes(tokenizer.getvalue())
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "add_bos_token": True,
    }
    write_json(path / "tokenizer_config.json", settings)
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, shape in checkpoint_shapes(LlamaConfig.from_dir(path)).items():
        noise = torch.randn(shape, generator=generator)
        # norms near one, matrices that keep the variance
        weights[name] = 1 + 0.1 * noise if len(shape) == 1 else noise / shape[-1] ** 0.5
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path
