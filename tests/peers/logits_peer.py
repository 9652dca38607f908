"""What transformers computes: logits in fp32 and in fp64, and greedy continuations.

    python logits_peer.py jobs.json out.safetensors

jobs.json   {"logits": {name: {"dir", "tokens", "keep"}},          keep: positions to report
             "greedy": {name: {"dir", "prompts", "new", "follow"}},   prompts: one user message each
             "continue": {name: {"dir", "prompts", "new"}}}           prompts: ids
out         NAME/fp32 and NAME/fp64 (kept positions, V), NAME/inv_freq (d / 2,) as the model uses it
last line   {NAME: {"prompts": ids, "continuations": ids}} of the greedy jobs, {NAME: continuations}
            of the others

Run in a process of its own, outside the clone.
"""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

# pytorch issue 188792: else, now and then, the first call is wrong for one thread's share
for function in (torch.cos, torch.sin, torch.exp, torch.log, torch.sqrt, torch.rsqrt):
    function(torch.ones(16))


def load(path: str, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a directory, in fp64 truly so."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
    if dtype == torch.float64:
        for module in model.modules():
            if type(module).__name__.endswith("RMSNorm"):
                module.forward = types.MethodType(norm_in_its_own_dtype, module)
    return model


def norm_in_its_own_dtype(self: torch.nn.Module, h: torch.Tensor) -> torch.Tensor:
    """transformers' norm goes through fp32 even in an fp64 model, which would be no truth."""
    return self.weight * (h * torch.rsqrt(h.square().mean(-1, True) + self.variance_epsilon))


@torch.no_grad()
def logits(model: torch.nn.Module, tokens: list[int], keep: list[int]) -> torch.Tensor:
    """(len(keep), V)"""
    return model(torch.tensor([tokens]), logits_to_keep=torch.tensor(keep)).logits[0].contiguous()


@torch.no_grad()
def greedy(dir: str, prompts: list[str], new: int, follow: list[list[int]] | None) -> dict:
    """Ids of chat-formatted prompts, and the `new` greedy tokens after each, an end or not.

    With `follow` those are the best tokens after each prompt and its first 0, 1, ... tokens of
    `follow`: one forward a row instead of `new`, and the same answer where `follow` is it.
    """
    tokenizer = AutoTokenizer.from_pretrained(dir, padding_side="left")
    model = load(dir, torch.float32)
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    batch = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    rows = zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ids = [row[mask.bool()].tolist() for row, mask in rows]
    if follow is not None:
        followed = []
        for prompt, tokens in zip(ids, follow, strict=True):
            keep = list(range(len(prompt) - 1, len(prompt) + new - 1))
            followed.append(logits(model, prompt + tokens, keep).argmax(-1).tolist())
        return {"prompts": ids, "continuations": followed}
    model.generation_config.eos_token_id = None
    out = model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        do_sample=False,
        max_new_tokens=new,
        pad_token_id=0,
    )
    return {"prompts": ids, "continuations": out[:, batch["input_ids"].shape[1] :].tolist()}


@torch.no_grad()
def continuations(dir: str, prompts: list[list[int]], new: int) -> list[list[int]]:
    """The `new` greedy tokens after each prompt, an end or not, by transformers' own cache."""
    model = load(dir, torch.float32)
    model.generation_config.eos_token_id = None
    texts = []
    for prompt in prompts:
        tokens = torch.tensor([prompt])
        out = model.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=False,
            max_new_tokens=new,
            pad_token_id=0,
        )
        texts.append(out[0, len(prompt) :].tolist())
    return texts


def main() -> None:
    jobs, tensors = json.loads(Path(sys.argv[1]).read_text()), {}
    for name, job in jobs.get("logits", {}).items():
        for dtype in (torch.float32, torch.float64):
            model = load(job["dir"], dtype)
            kind = "fp32" if dtype == torch.float32 else "fp64"
            tensors[f"{name}/{kind}"] = logits(model, job["tokens"], job["keep"])
            if dtype == torch.float32:
                tensors[f"{name}/inv_freq"] = model.model.rotary_emb.inv_freq.clone()
    save_file(tensors, sys.argv[2])
    texts = {name: greedy(**job) for name, job in jobs.get("greedy", {}).items()}
    texts |= {name: continuations(**job) for name, job in jobs.get("continue", {}).items()}
    print(json.dumps(texts))


if __name__ == "__main__":
    main()
