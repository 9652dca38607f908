"""Adapters with a nonzero B for the tests, and a run of peft in a process of its own."""

from __future__ import annotations

import json

import torch
from safetensors.torch import load_file

from model.lora import Lora, LoraConfig

TOKENS = torch.randint(320, (40,), generator=torch.Generator().manual_seed(7)).tolist()


def new_lora(model, **settings):
    """A fresh adapter bound to `model`; `settings` are fields of LoraConfig."""
    return Lora.init(LoraConfig(**settings), model.config, model.device, model.dtype)


def random_lora(model, modules, rslora=False, rank=8):
    """An adapter that changes the logits: B is not zero."""
    lora = new_lora(model, rank=rank, alpha=16.0, modules=modules, seed=3, rslora=rslora)
    generator = torch.Generator().manual_seed(4)
    for name, view in lora.views(lora.params).items():
        if ".lora_B." in name:
            view.copy_(0.02 * torch.randn(view.shape, generator=generator))
    return lora


def ask_peft(run_peer, tmp_path, **jobs):
    """The tensors that tests/peers/lora_peer.py computes for `jobs`, by name."""
    (tmp_path / "jobs.json").write_text(json.dumps(jobs, default=str))
    run_peer("lora_peer.py", tmp_path / "jobs.json", tmp_path / "out.safetensors")
    return load_file(tmp_path / "out.safetensors")


def distance(a, b):
    """The largest absolute difference of two tensors, in fp64."""
    return (a.double() - b.double()).abs().max().item()
