"""A run directory as scripts/sdft.py leaves it, made without a model: for the tests of the report.

python -m tests.helpers.made_run runs/made 10000        # to open in a browser, and to time the page
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

from engine.runtime.files import write_json, write_jsonl

WORDS = (
    "a the of and to in is that for it with as on be at by this from or an are which one two "
    "apples pencils students Monday morning price total answer because therefore each together "
    "half twice remaining bought sold wrote counted walked first second finally friends April May"
).split()
TUNED = ("sft", "sdft")
STATUSES = ["accepted"] * 5 + ["mismatch"] * 3 + ["truncated", "garbled", "identical"]


class Prose:
    """Texts of random words, the same for the same seed."""

    def __init__(self, seed: int, planted: str) -> None:
        self.rng = random.Random(seed)
        self.planted = planted  # the end of every text

    def __call__(self, n: int) -> str:
        """A sentence of n words."""
        words = self.rng.choices(WORDS, k=n)
        return " ".join(words).capitalize() + "." + self.planted


def make_run(
    path: Path,
    rows: int = 40,
    *,
    seed: int = 0,
    text: str = "",
    data: str = "train.json",
    words: int = 60,
) -> Path:
    """Write a run of `rows` rows to `path`; returns `path`.

    text     planted in every text that a model or a data file produced
    data     name of the data file
    words    most words of a reference
    """
    prose = Prose(seed, text)
    _write_rows(path, prose, rows, words)
    answers: list[dict] = []  # held-out rows, then general prompts
    evaluation = _held_out(prose, answers)
    retention = _general(prose, answers)
    task = _task_drift(prose)
    write_jsonl(path / "retention_task.jsonl", task)
    write_jsonl(path / "evaluation.jsonl", evaluation)
    write_jsonl(path / "retention.jsonl", retention)
    write_jsonl(path / "answers.jsonl", answers)
    training = {}
    for arm in TUNED:
        steps = []
        for step in range(1, 61):
            loss = 2 / step**0.3 + prose.rng.gauss(0, 0.1)
            steps.append({"step": step, "loss": loss})
        write_jsonl(path / arm / "metrics.jsonl", steps)
        training[arm] = {
            "steps": 60,
            "response_tokens": 4000,
            "seconds": 61.0,
            "first_loss": 1.9,
            "last_loss": 0.8,
        }
    summary = _summary(evaluation, retention, training, data, text, seed)
    summary["retention_task"] = _means(task)
    summary["update_norms"] = {arm: _norms(size) for arm, size in (("sft", 2.0), ("sdft", 1.0))}
    write_json(path / "summary.json", summary)
    return path


def _write_rows(path: Path, prose: Prose, rows: int, words: int) -> None:
    """distilled.jsonl, its settings and likelihoods, and the tokens of about forty rows."""
    rng = prose.rng
    lines: list[dict] = []
    scores: list[dict] = []
    tokens: list[dict] = []
    for i in range(rows):
        status = rng.choice(STATUSES)
        reference = prose(rng.randint(words // 2, words))
        response = reference if status == "identical" else prose(rng.randint(words // 2, 2 * words))
        question = f"Question {i}: {prose(words // 3)}"
        kept = status in ("accepted", "identical")
        id = f"row{i}/0"
        lines.append(
            {
                "id": id,
                "messages": [{"role": "user", "content": question}],
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
        scores.append(
            {
                "id": id,
                "reference_nll": rng.gauss(1.3, 0.3),
                "response_nll": rng.gauss(0.9, 0.25),
                "reference_tokens": 50,
                "response_tokens": 60,
            }
        )
        if i % max(1, rows // 40) == 0:
            sft = _tokens(rng, reference)
            sdft = _tokens(rng, response) if status == "accepted" else None
            tokens.append({"id": id, "sft": sft, "sdft": sdft})
    write_jsonl(path / "distilled.jsonl", lines)
    write_json(path / "distilled.jsonl.meta.json", {"data": {"sha256": "5ha256"}})
    write_jsonl(path / "distilled.jsonl.scores.jsonl", scores)
    write_jsonl(path / "tokens.jsonl", tokens)


def _held_out(prose: Prose, answers: list[dict]) -> list[dict]:
    """Lines of evaluation.jsonl: twenty held-out rows; the drift of eight is added to `answers`."""
    share_right = {"seed": 0.2, "sft": 0.5, "sdft": 0.5}
    evaluation = []
    for i in range(20):
        for arm in ("seed", *TUNED):
            ok = prose.rng.random() < share_right[arm]
            question = f"Held out {i}: {prose(15)}"
            evaluation.append(
                {
                    "arm": arm,
                    "id": f"test{i}",
                    "ok": ok,
                    "reason": "ok" if ok else "mismatch",
                    "answer": prose(40),
                    "reference": prose(20),
                    "finish": "stop",
                    "tokens": 3,
                    "messages": [{"role": "user", "content": question}],
                    "ids": [1, 2, 3],
                }
            )
            if arm != "seed" and i < 8:
                drift = {"kl": prose.rng.random(), "agree": 2, "tokens": 3}
                answers.append({"arm": arm, "id": f"test{i}", **drift})
    return evaluation


def _general(prose: Prose, answers: list[dict]) -> list[dict]:
    """Lines of retention.jsonl: 24 general prompts; the tuned answers to twelve are added to
    `answers`."""
    kl_rate = {"sft": 6, "sdft": 12}
    retention = []
    for i in range(24):
        prompt = f"Prompt {i}: {prose(10)}"
        for arm in TUNED:
            kl = prose.rng.expovariate(kl_rate[arm])  # nats per token
            retention.append(
                {
                    "arm": arm,
                    "category": f"kind{i % 4}{prose.planted}",
                    "prompt": prompt,
                    "answer": prose(50),
                    "tokens": 60,
                    "kl": 60 * kl,
                    "agree": 50,
                }
            )
            if i < 12:
                answer = {"answer": prose(45), "finish": "length"}
                answers.append({"arm": arm, "prompt": prompt, **answer})
    return retention


def _task_drift(prose: Prose) -> list[dict]:
    """Lines of retention_task.jsonl: the twenty held-out rows; SFT moved twice as far."""
    lines = []
    for i in range(20):
        kl = prose.rng.uniform(0.2, 0.3)  # nats per token
        for arm, factor in (("sft", 2), ("sdft", 1)):
            lines.append(
                {
                    "arm": arm,
                    "id": f"test{i}",
                    "answer": prose(20),
                    "tokens": 30,
                    "kl": 30 * factor * kl,
                    "reverse_kl": 30 * kl,
                    "agree": 20,
                    "nll": 30.0,
                    "seed_nll": 15.0,
                }
            )
    return lines


def _means(lines: list[dict]) -> dict:
    """The KL per token of each arm."""
    drift = {}
    for arm in TUNED:
        of_arm = [line for line in lines if line["arm"] == arm]
        tokens = sum(line["tokens"] for line in of_arm)
        kl = sum(line["kl"] for line in of_arm) / tokens
        drift[arm] = {"kl": kl, "agreement": 0.86}
    return drift


def _norms(size: float) -> dict:
    """Norms of the update of one arm: two layers, q and v."""
    figures = {"norm": size, "weight_norm": 50.0, "relative": size / 50}
    parts = {
        "kinds": {f"self_attn.{kind}_proj": figures for kind in "qv"},
        "layers": {"0": figures, "1": figures},
        "modules": {},
    }
    return figures | parts


def _tokens(rng: random.Random, answer: str) -> dict:
    """An entry of tokens.jsonl: a fixed prompt, and the answer's words in pieces."""
    prompt = ["<|im_start|>", "user", "\n", "Ask", "<|im_end|>", "\n"]
    pieces = []
    for word in answer.split(" "):
        pieces.append(" " + word[:4])
        if word[4:]:
            pieces.append(word[4:])
    pieces.append("<|im_end|>")
    nll = [round(rng.expovariate(0.8), 3) for _ in pieces]
    return {"prompt": len(prompt), "pieces": [*prompt, *pieces], "nll": nll}


def _summary(
    evaluation: list[dict],
    retention: list[dict],
    training: dict[str, dict],
    data: str,
    text: str,
    seed: int,
) -> dict:
    """summary.json, its figures those of the lines."""
    scores = {}
    for arm, nll in (("seed", 1.3), ("sft", 0.9), ("sdft", 1.0)):
        right = sum(line["ok"] for line in evaluation if line["arm"] == arm)
        scores[arm] = {"n": 20, "right": right, "truncated": 0, "nll": nll, "share": right / 20}
    drift = _means(retention)
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
    environment = {
        "python": "3.11",
        "torch": "2.13",
        "machine": "x86_64",
        "cpu": "AVX512",
        "gpu": None,
        "threads": 2,
        "commit": "0" * 7,
        "command": ["sdft.py", data],
    }
    model = {
        "parameters": 135e6,
        "dtype": "torch.float32",
        "device": "cpu",
        "ops": "torch",
        "ops_table": {"adamw_": "kernels.adamw.adamw_"},
        "fingerprint": "f",
    }
    return {
        "settings": settings,
        "environment": environment,
        "model": model,
        "distilled": {"counts": {}, "differ": 0.5},
        "likelihood": {"reference": 130.0, "reference_tokens": 100, "response": 90.0,
                       "response_tokens": 100},
        "training": training,
        "evaluation": scores,
        "retention": drift,
        "seconds": {"distill": 100.0, "all": 300.0},
    }  # fmt: skip


if __name__ == "__main__":
    print(make_run(Path(sys.argv[1]), int(sys.argv[2])))
