"""What peft computes: adapters of its own making, logits under adapters, gradients.

    python lora_peer.py jobs.json out.safetensors

jobs.json   {"make":      {name: {"dir", "out", "config"}},        config: arguments of LoraConfig
             "merge":     {name: {"dir", "adapter", "out"}},       peft's own merged model
             "logits":    {name: {"dir", "adapter", "tokens"}},    adapter None: the model alone
             "gradients": {name: {"dir", "adapter", "rows", "dtype"}}}  rows: [ids, prompt tokens]
out         NAME/fp32 and NAME/fp64 (T, V) of the logits, NAME/grad/TENSOR of the gradients of the
            summed negative log-likelihood of the response tokens, each row in a forward of its own

The jobs are done in that order. Run in a process of its own, outside the clone.
"""

from __future__ import annotations

import json
import sys
from functools import cache
from pathlib import Path

import torch
from logits_peer import load, logits
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file

base = cache(load)  # an adapter is put into it and taken out again


def make(dir: str, out: str, config: dict) -> None:
    torch.manual_seed(0)
    model = load(dir, torch.float32)  # some initialisations change the weights themselves
    copies = config.pop("save_embedding_layers", False)
    made = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **config))
    made.save_pretrained(out, save_embedding_layers=copies)


def logits_under(dir: str, adapter: str | None, tokens: list[int], dtype: torch.dtype):
    model, keep = base(dir, dtype), list(range(len(tokens)))
    if adapter is None:
        return logits(model, tokens, keep)
    adapted = PeftModel.from_pretrained(model, adapter).eval().to(dtype)
    result = logits(adapted, tokens, keep)
    adapted.unload()
    return result


def merge(dir: str, adapter: str, out: str) -> None:
    model = load(dir, "auto")  # in the dtype it is stored in
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)


def gradients(dir: str, adapter: str, rows: list, dtype: str) -> dict[str, torch.Tensor]:
    """The loss is fp64 even of fp32 logits: torch's own fp32 cross_entropy is what would be
    compared otherwise. On SmolLM2 it puts gradients 4e-4 away from the truth, the rest 1e-5."""
    dtype = getattr(torch, dtype)
    model = PeftModel.from_pretrained(base(dir, dtype), adapter, is_trainable=True).to(dtype)
    for ids, prompt in rows:
        z = model(torch.tensor([ids])).logits[0, prompt - 1 : -1].double()
        targets = torch.tensor(ids[prompt:])
        torch.nn.functional.cross_entropy(z, targets, reduction="sum").backward()
    named = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    model.unload()
    return {name.replace(".default", ""): grad for name, grad in named.items()}


def main() -> None:
    jobs, tensors = json.loads(Path(sys.argv[1]).read_text()), {}
    for job in jobs.get("make", {}).values():
        make(**job)
    for job in jobs.get("merge", {}).values():
        merge(**job)
    for name, job in jobs.get("logits", {}).items():
        tensors[f"{name}/fp32"] = logits_under(**job, dtype=torch.float32)
        tensors[f"{name}/fp64"] = logits_under(**job, dtype=torch.float64)
    for name, job in jobs.get("gradients", {}).items():
        grads = gradients(**job)
        tensors |= {f"{name}/grad/{tensor}": grad for tensor, grad in grads.items()}
    save_file(tensors, sys.argv[2])
    print("{}")


if __name__ == "__main__":
    main()
