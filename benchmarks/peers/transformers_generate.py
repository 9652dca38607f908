"""transformers' `generate` on given prompts, in a process of its own; last line JSON.

    python transformers_generate.py BATCH < JOB.json

JOB.json: {"model": dir, "threads": n, "rows": [{"prompt": [ids]}], "max_new": n, "end_ids": [ids],
"pad_id": id}. Left-padded batches in the given order, greedy, KV cache, fp32. Loading is timed
apart. Run with a directory outside the clone as cwd.
"""

import json
import sys
import time

import torch
from transformers import AutoModelForCausalLM

# pytorch issue 188792: else, now and then, the first call is wrong for one thread's share
for function in (torch.cos, torch.sin, torch.exp, torch.log, torch.sqrt, torch.rsqrt):
    function(torch.ones(16))


def main() -> None:
    batch, job = int(sys.argv[1]), json.load(sys.stdin)
    torch.set_num_threads(job["threads"])
    began = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    prompts, end_ids, pad = [r["prompt"] for r in job["rows"]], job["end_ids"], job["pad_id"]
    answers = []
    started = time.perf_counter()
    for i in range(0, len(prompts), batch):
        rows = prompts[i : i + batch]
        width = max(map(len, rows))
        ids = torch.tensor([[pad] * (width - len(r)) + r for r in rows])
        mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])
        with torch.no_grad():
            out = model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=job["max_new"],
                do_sample=False,
                eos_token_id=end_ids,
                pad_token_id=pad,
            )
        for row in out[:, width:].tolist():
            ends = [k for k, token in enumerate(row) if token in end_ids]
            answers.append(row[: ends[0]] if ends else row)
    seconds = time.perf_counter() - started
    # VmHWM: ru_maxrss would start at what the parent held when it forked
    with open("/proc/self/status") as file:
        rss = next(int(x.split()[1]) * 1024 for x in file if x.startswith("VmHWM"))
    loaded = started - began
    found = {"load_seconds": loaded, "seconds": seconds, "rss": rss, "answers": answers}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
