"""LoRA training steps of transformers and peft on given rows, a process that waits for orders.

    python transformers_train.py JOB.json ROWS_OF_A_MICRO_BATCH

JOB.json (benchmarks/train.py writes it): {"model": dir, "adapter": dir, "steps": [[{"ids": [...],
"n_prompt": n}]], "lr": x, "clip": x}. A line N on stdin trains on steps[N]; the answer is one line
of JSON. Micro-batches are padded on the right to their longest row; the loss is the sum over the
response tokens divided by those of the whole step, as transformers' Trainer does it. Run with a
directory outside the clone as cwd.
"""

import json
import sys
import time

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

# pytorch issue 188792: else, now and then, the first call is wrong for one thread's share
for function in (torch.cos, torch.sin, torch.exp, torch.log, torch.sqrt, torch.rsqrt):
    function(torch.ones(16))


def peak_rss() -> int:
    """Bytes; VmHWM, since ru_maxrss would start at what the parent held when it forked."""
    with open("/proc/self/status") as file:
        return next(int(x.split()[1]) * 1024 for x in file if x.startswith("VmHWM"))


def micro_batch(rows: list[dict]) -> dict[str, torch.Tensor]:
    width = max(len(row["ids"]) for row in rows)
    ids, mask, labels = [], [], []
    for row in rows:
        pad = width - len(row["ids"])
        ids.append(row["ids"] + [0] * pad)
        mask.append([1] * len(row["ids"]) + [0] * pad)
        labels.append([-100] * row["n_prompt"] + row["ids"][row["n_prompt"] :] + [-100] * pad)
    columns = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {name: torch.tensor(values) for name, values in columns.items()}


def main() -> None:
    with open(sys.argv[1]) as file:
        job = json.load(file)
    size = int(sys.argv[2])
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    model = PeftModel.from_pretrained(model, job["adapter"], is_trainable=True).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=job["lr"], weight_decay=0.0)
    for line in sys.stdin:
        rows = job["steps"][int(line)]
        started = time.perf_counter()
        response = sum(len(row["ids"]) - row["n_prompt"] for row in rows)
        loss = 0.0
        for i in range(0, len(rows), size):
            batch = micro_batch(rows[i : i + size])
            share = model(**batch, use_cache=False, num_items_in_batch=response).loss
            share.backward()
            loss += share.item()
        norm = torch.nn.utils.clip_grad_norm_(trained, job["clip"]).item()
        optimizer.step()
        optimizer.zero_grad()
        seconds = time.perf_counter() - started
        told = {"seconds": seconds, "loss": loss, "grad_norm": norm, "rss": peak_rss()}
        print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
