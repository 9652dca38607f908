"""The whole job: rewrite the data, train SFT and SDFT, measure both, print the table.

    python scripts/sdft.py --model MODEL_DIR --data train.json --out runs/mine
    python scripts/sdft.py --model MODEL_DIR --data train.json --eval-data test.json \\
        --verify number --out runs/mine
    python scripts/sdft.py --preset yang2024-gsm8k --model Llama-2-7b-chat --data train.json ...

The same command resumes an interrupted run.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine.data.config import DataConfig
from engine.distill.config import PAPER_SAMPLING, DistillConfig
from engine.evaluate.tasks.run import TaskConfig
from engine.jobs.sdft import SdftConfig, run
from engine.presets import parse
from engine.runtime.flags import add_flags, from_flags, make_parser, run_main
from engine.runtime.locking import lock_directory
from engine.runtime.resumable_answers import meta_of
from engine.sampling.requests import SamplerConfig
from engine.session import ModelConfig, Session, as_begun
from engine.train.config import EncodeConfig, TrainConfig
from engine.train.validate import ValidateConfig
from model.lora import LoraConfig


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__, "sdft")
    add_flags(parser, ModelConfig)
    add_flags(parser, DataConfig)
    add_flags(parser, SdftConfig)
    add_flags(parser, DistillConfig)
    add_flags(parser, SamplerConfig, {"max_new_tokens", "stop", "seed"}, **PAPER_SAMPLING)
    add_flags(parser, EncodeConfig, {"target"})
    add_flags(parser, TrainConfig)
    add_flags(parser, LoraConfig, {"seed"})
    add_flags(parser, TaskConfig, {"samples", "paper"})
    add_flags(parser, ValidateConfig)
    return parse(parser)


def main() -> None:
    args = parse_args()
    model, job = from_flags(ModelConfig, args), from_flags(SdftConfig, args)
    configs = [
        from_flags(DataConfig, args),
        job,
        from_flags(DistillConfig, args),
        from_flags(SamplerConfig, args, max_new_tokens=SamplerConfig.max_new_tokens),
        from_flags(EncodeConfig, args),
        from_flags(TrainConfig, args),
        from_flags(LoraConfig, args),
        from_flags(TaskConfig, args, samples=1, paper=False),
        from_flags(ValidateConfig, args),
    ]
    out = Path(job.out)
    with lock_directory(out):
        run(Session.open(as_begun(model, meta_of(out / "distilled.jsonl"))), *configs)


if __name__ == "__main__":
    run_main(main)
