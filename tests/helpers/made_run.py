"""A run directory as scripts/sdft.py leaves it, made without a model: for the tests of the report.

python -m tests.helpers.made_run runs/made 10000        # to look at, and to measure the page with
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

from engine.runtime.files import write_json, write_jsonl

WORDS = (
    "a the of and to in is that for it with as on be at by this from or an are which one two "
    "apples pencils students Monday morning price total answer because therefore each together "
    "half twice remaining bought sold wrote counted walked first second finally friends April May"
).split()
STATUSES = ["accepted"] * 5 + ["mismatch"] * 3 + ["truncated", "garbled", "identical"]


def make_run(
    path: Path,
    rows: int = 40,
    *,
    seed: int = 0,
    text: str = "",
    data: str = "train.json",
    words: int = 60,
) -> Path:
    """Write a run of `rows` rows to `path`; `text` is planted in every text that a model or a data
    file produced, `data` is the name of the data file."""
    rng = random.Random(seed)

    def prose(n: int) -> str:
        return " ".join(rng.choices(WORDS, k=n)).capitalize() + "." + text

    lines, scores, tokens = [], [], []
    for i in range(rows):
        status = rng.choice(STATUSES)
        reference = prose(rng.randint(words // 2, words))
        response = reference if status == "identical" else prose(rng.randint(words // 2, 2 * words))
        kept = status in ("accepted", "identical")
        id = f"row{i}/0"
        lines.append(
            {
                "id": id,
                "messages": [{"role": "user", "content": f"Question {i}: {prose(words // 3)}"}],
                "reference": reference,
                "response": response,
                "response_ids": [1, 2, 3],
                "target": response if kept else reference,
                "status": status,
                "stage": "guided",
                "finish": "length" if status == "truncated" else "stop",
                "prompt_tokens": 30,
                "response_tokens": 3,
                "tries": {"guided": [status]},
            }
        )
        score = {"reference_nll": rng.gauss(1.3, 0.3), "response_nll": rng.gauss(0.9, 0.25)}
        scores.append({"id": id, **score, "reference_tokens": 50, "response_tokens": 60})
        if i % max(1, rows // 40) == 0:
            tokens.append({"id": id, "sft": _tokens(rng, reference)})
            tokens[-1]["sdft"] = _tokens(rng, response) if status == "accepted" else None
    write_jsonl(path / "distilled.jsonl", lines)
    write_json(path / "distilled.jsonl.meta.json", {"data": {"sha256": "5ha256"}})
    write_jsonl(path / "distilled.jsonl.scores.jsonl", scores)
    write_jsonl(path / "tokens.jsonl", tokens)

    arms = ("seed", "sft", "sdft")
    evaluation, retention, answers = [], [], []
    for i in range(20):
        for arm in arms:
            ok = rng.random() < {"seed": 0.2, "sft": 0.5, "sdft": 0.5}[arm]
            question = [{"role": "user", "content": f"Held out {i}: {prose(15)}"}]
            line = {"arm": arm, "id": f"test{i}", "ok": ok, "reason": "ok" if ok else "mismatch"}
            line |= {"answer": prose(40), "reference": prose(20), "finish": "stop", "tokens": 3}
            evaluation.append(line | {"messages": question, "ids": [1, 2, 3]})
            if arm != "seed" and i < 8:
                line = {"arm": arm, "id": f"test{i}", "kl": rng.random(), "agree": 2, "tokens": 3}
                answers.append(line)
    for i in range(24):
        prompt = f"Prompt {i}: {prose(10)}"
        for arm in arms[1:]:
            kl = rng.expovariate({"sft": 6, "sdft": 12}[arm])
            line = {"arm": arm, "category": f"kind{i % 4}{text}", "prompt": prompt}
            line |= {"answer": prose(50), "tokens": 60, "kl": 60 * kl, "agree": 50}
            retention.append(line)
            if i < 12:
                line = {"arm": arm, "prompt": prompt, "answer": prose(45), "finish": "length"}
                answers.append(line)
    write_jsonl(path / "evaluation.jsonl", evaluation)
    write_jsonl(path / "retention.jsonl", retention)
    write_jsonl(path / "answers.jsonl", answers)

    training = {}
    for arm in arms[1:]:
        steps = [{"step": s, "loss": 2 / s**0.3 + rng.gauss(0, 0.1)} for s in range(1, 61)]
        write_jsonl(path / arm / "metrics.jsonl", steps)
        training[arm] = {"steps": 60, "response_tokens": 4000, "seconds": 61.0}
        training[arm] |= {"first_loss": 1.9, "last_loss": 0.8}
    write_json(path / "summary.json", _summary(evaluation, retention, training, data, text, seed))
    return path


def _tokens(rng: random.Random, answer: str) -> dict:
    pieces = ["<|im_start|>", "user", "\n", "Ask", "<|im_end|>", "\n"]
    said = [part for word in answer.split(" ") for part in (" " + word[:4], word[4:]) if part]
    nll = [round(rng.expovariate(0.8), 3) for _ in range(len(said) + 1)]
    return {"prompt": len(pieces), "pieces": [*pieces, *said, "<|im_end|>"], "nll": nll}


def _summary(evaluation, retention, training, data, text, seed) -> dict:
    scores = {}
    for arm, nll in (("seed", 1.3), ("sft", 0.9), ("sdft", 1.0)):
        right = sum(line["ok"] for line in evaluation if line["arm"] == arm)
        scores[arm] = {"n": 20, "right": right, "truncated": 0, "nll": nll, "share": right / 20}
    drift = {}
    for arm in training:
        mine = [line for line in retention if line["arm"] == arm]
        tokens = sum(line["tokens"] for line in mine)
        drift[arm] = {"kl": sum(line["kl"] for line in mine) / tokens, "agreement": 0.86}
    settings = {
        "ModelConfig": {"model": f"models/made{text}"},
        "DataConfig": {"data": data, "limit": None},
        "SdftConfig": {"out": "runs/made", "eval_data": f"test{text}.json", "eval_limit": None},
        "DistillConfig": {"template": "using", "verify": "number"},
        "SamplerConfig": {"temperature": 0.95, "top_p": 0.7, "top_k": 50, "seed": seed},
        "EncodeConfig": {"max_length": 1024},
        "TrainConfig": {"lr": 1e-3, "epochs": 2, "batch_rows": 8, "seed": seed},
        "LoraConfig": {"rank": 8, "alpha": 16.0, "modules": "qv", "seed": seed},
    }
    environment = {"python": "3.11", "torch": "2.13", "machine": "x86_64", "cpu": "AVX512"}
    environment |= {"gpu": None, "threads": 2, "commit": "0" * 7, "command": ["sdft.py", data]}
    model = {"parameters": 135e6, "dtype": "torch.float32", "device": "cpu", "ops": "torch"}
    return {
        "settings": settings,
        "environment": environment,
        "model": model | {"ops_table": {"adamw_": "kernels.adamw.adamw_"}, "fingerprint": "f"},
        "distilled": {"counts": {}, "differ": 0.5},
        "likelihood": {"reference": 130.0, "reference_tokens": 100, "response": 90.0,
                       "response_tokens": 100},
        "training": training,
        "evaluation": scores,
        "retention": drift,
        "seconds": {"distill": 100.0, "all": 300.0},
    }  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(str(make_run(Path(sys.argv[1]), int(sys.argv[2])))))
