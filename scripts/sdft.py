"""The whole job: a model rewrites its training answers; ways of training are compared.

    python scripts/sdft.py --model MODEL_DIR --data train.json --out runs/mine
    python scripts/sdft.py --model MODEL_DIR --data train.json --eval-data test.json \\
        --verify number --out runs/mine
    python scripts/sdft.py --preset yang2024-gsm8k --model Llama-2-7b-chat --data train.json ...
    python scripts/sdft.py ... --arms sft,sdft,stm:2.5,dft,sft@0.5    further ways of training

The seed model (the model before training) rewrites every reference answer. One LoRA adapter is then
trained on the references (SFT), one on the rewrites (SDFT), and one for every further arm, all with
the same number of steps. All are measured on held-out rows and on general prompts. The same command
resumes an interrupted run.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine.data.config import DataConfig
from engine.distill.config import PAPER_SAMPLING, DistillConfig
from engine.evaluate.tasks.run import TaskConfig
from engine.jobs.job_config import JobConfig
from engine.jobs.model_names import with_model_found
from engine.jobs.sdft import SdftConfig, sdft_job
from engine.presets import parse
from engine.runtime.flags import add_flags, from_flags, make_parser, run_main
from engine.sampling.requests import SamplerConfig
from engine.session import ModelConfig
from engine.train.config import EncodeConfig, TrainConfig
from engine.train.replay import ReplayConfig
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
    add_flags(parser, ReplayConfig)
    add_flags(parser, TaskConfig, {"samples", "paper"})
    add_flags(parser, ValidateConfig)
    return parse(parser)


def main() -> None:
    args = parse_args()
    sdft_job(
        JobConfig(
            model=with_model_found(from_flags(ModelConfig, args)),
            data=from_flags(DataConfig, args),
            job=from_flags(SdftConfig, args),
            distill=from_flags(DistillConfig, args),
            sampling=from_flags(SamplerConfig, args, max_new_tokens=SamplerConfig.max_new_tokens),
            encode=from_flags(EncodeConfig, args),
            train=from_flags(TrainConfig, args),
            lora=from_flags(LoraConfig, args),
            tasks=from_flags(TaskConfig, args, samples=1, paper=False),
            replay=from_flags(ReplayConfig, args),
            validate=from_flags(ValidateConfig, args),
        )
    )


if __name__ == "__main__":
    run_main(main)
