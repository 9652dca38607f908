"""transformers' `generate` on given prompts, in a process of its own; last line JSON.

    python transformers_generate.py MODEL_DIR PROMPTS.json BATCH

PROMPTS.json: {"prompts": [[ids]], "max_new": n, "end_ids": [ids], "pad_id": id}. Left-padded
batches in the given order, greedy, KV cache. Run with a directory outside the clone as cwd.
"""

import json
import sys
import time

import torch
from transformers import AutoModelForCausalLM


def main() -> None:
    path, prompts_file, batch = sys.argv[1], sys.argv[2], int(sys.argv[3])
    with open(prompts_file) as file:
        asked = json.load(file)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    prompts, end_ids, pad = asked["prompts"], asked["end_ids"], asked["pad_id"]
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
                max_new_tokens=asked["max_new"],
                do_sample=False,
                eos_token_id=end_ids,
                pad_token_id=pad,
            )
        for row in out[:, width:].tolist():
            ends = [k for k, token in enumerate(row) if token in end_ids]
            answers.append(row[: ends[0]] if ends else row)
    seconds = time.perf_counter() - started
    # the end token is a useful token too: it was sampled
    useful = sum(len(a) + (len(a) < asked["max_new"]) for a in answers)
    # VmHWM: ru_maxrss would start at what the parent held when it forked
    with open("/proc/self/status") as file:
        rss = next(int(x.split()[1]) * 1024 for x in file if x.startswith("VmHWM"))
    print(json.dumps({"seconds": seconds, "tokens": useful, "rss": rss, "answers": answers}))


if __name__ == "__main__":
    main()
