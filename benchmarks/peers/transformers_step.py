"""A LoRA training step of transformers and peft on random weights; last line JSON.

    python transformers_step.py '{"config": {...}, "lengths": [...], "rank": 8, ...}'

What benchmarks/step.py asks for: a Llama of that config made on the device, adapters on those
modules, rows of one length, torch's AdamW and clipping at 1. The most favourable way that fits
into memory is taken: all rows at once; a row at a time, gradients accumulated; with checkpointing.
Run with a directory outside the clone as cwd.
"""

import json
import sys
import time

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

# pytorch issue 188792: else, now and then, the first call is wrong for one thread's share
for function in (torch.cos, torch.sin, torch.exp, torch.log, torch.sqrt, torch.rsqrt):
    function(torch.ones(16))

WAYS = ((0, False), (1, False), (1, True))  # rows of a forward (0: all), checkpointing


def build(asked: dict) -> torch.nn.Module:
    c = asked["config"]
    config = LlamaConfig(
        vocab_size=c["vocab_size"],
        hidden_size=c["hidden_size"],
        intermediate_size=c["intermediate_size"],
        num_hidden_layers=c["num_layers"],
        num_attention_heads=c["num_heads"],
        num_key_value_heads=c["num_kv_heads"],
        head_dim=c["head_dim"],
        rms_norm_eps=c["rms_norm_eps"],
        max_position_embeddings=c["max_position"],
        tie_word_embeddings=c["tie_embeddings"],
        rope_parameters={"rope_type": "default", "rope_theta": c["rope_theta"]},
        use_cache=False,
    )
    dtype = getattr(torch, asked["dtype"])
    with torch.device(asked["device"]):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=dtype)
    r = asked["rank"]
    lora = LoraConfig(
        r=r,
        lora_alpha=2 * r,
        lora_dropout=asked["dropout"],
        target_modules=asked["modules"],
        bias="none",
    )
    return get_peft_model(model, lora).to(asked["device"]).train()


def run(asked: dict, rows: int, checkpointing: bool) -> list[dict]:
    torch.manual_seed(0)
    model = build(asked)
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    gpu = asked["device"].startswith("cuda")
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=gpu)
    (length,) = set(asked["lengths"])  # rows of one length need no padding
    generator = torch.Generator().manual_seed(1)
    vocab = asked["config"]["vocab_size"]
    ids = [torch.randint(vocab, (length,), generator=generator) for _ in asked["lengths"]]
    ids = torch.stack(ids).to(asked["device"])
    parts = ids.split(rows or len(ids))
    steps = []
    for _ in range(asked["steps"] + 2):
        if gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        loss = 0.0
        for part in parts:
            share = model(input_ids=part, labels=part).loss * (len(part) / len(ids))
            share.backward()
            loss = loss + share.detach()
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss, norm = float(loss), float(norm)
        if gpu:
            torch.cuda.synchronize()
        step = {"seconds": time.perf_counter() - started, "loss": loss, "grad_norm": norm}
        step["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30 if gpu else None
        steps.append(step)
    return steps


def main() -> None:
    asked = json.loads(sys.argv[1])
    for rows, checkpointing in WAYS:
        how = f"{rows or len(asked['lengths'])} rows a forward"
        how += ", gradient checkpointing" if checkpointing else ""
        try:
            steps = run(asked, rows, checkpointing)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            continue
        print(json.dumps({"steps": steps, "how": how}))
        return
    sys.exit("out of memory in every way")


if __name__ == "__main__":
    main()
