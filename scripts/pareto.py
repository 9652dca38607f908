"""Compare ways of training over learning rates, ranks, strengths, row counts and training seeds.

    python scripts/pareto.py --model MODEL_DIR --data train.json --eval-data test.json \\
        --verify number --lr 1e-4,1e-3 --rank 8,64 --mix 0,0.3 --seeds 3 --out runs/study
    python scripts/pareto.py ... --arms sft,sdft,stm:2.5,k3:0.02 --scales 0.25,0.5,0.75,1
    python scripts/pareto.py ... --rows-list 200,500,1000     how many rows are needed
    python scripts/pareto.py --preset yang2024-gsm8k ...      with the paper's settings
    python scripts/pareto.py --task advbench --task instructions --tasks-dir DIR ...    other skills

Every adapter is measured on held-out rows (the target) and on general prompts (retention), and the
ways of training are compared where all of them are equally good at the target. The first values of
all lists make the first setting; the other values are tried one list at a time, or in every
combination with --grid. The same command resumes an interrupted study.
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
from engine.jobs.study import study_job
from engine.jobs.study_config import StudyConfig
from engine.presets import parse
from engine.runtime.flags import add_flags, from_flags, make_parser, run_main
from engine.sampling.requests import SamplerConfig
from engine.session import ModelConfig
from engine.train.config import EncodeConfig, TrainConfig
from engine.train.replay import ReplayConfig
from model.lora import LoraConfig


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__, "pareto")
    add_flags(parser, ModelConfig)
    add_flags(parser, DataConfig)
    add_flags(parser, StudyConfig)
    add_flags(parser, DistillConfig)
    add_flags(parser, SamplerConfig, {"max_new_tokens", "stop", "seed"}, **PAPER_SAMPLING)
    add_flags(parser, EncodeConfig, {"target", "mix"})
    add_flags(parser, TrainConfig, {"lr"})
    add_flags(parser, LoraConfig, {"seed", "rank", "alpha"})
    add_flags(parser, ReplayConfig)
    add_flags(parser, TaskConfig, {"samples", "paper"})
    return parse(parser)


def main() -> None:
    args = parse_args()
    study_job(
        JobConfig(
            model=with_model_found(from_flags(ModelConfig, args)),
            data=from_flags(DataConfig, args),
            job=from_flags(StudyConfig, args),
            distill=from_flags(DistillConfig, args),
            sampling=from_flags(SamplerConfig, args, max_new_tokens=SamplerConfig.max_new_tokens),
            encode=from_flags(EncodeConfig, args, mix=0.0),
            train=from_flags(TrainConfig, args, lr=TrainConfig.lr),
            lora=from_flags(LoraConfig, args, rank=LoraConfig.rank, alpha=LoraConfig.alpha),
            tasks=from_flags(TaskConfig, args, samples=1, paper=False),
            replay=from_flags(ReplayConfig, args),
        )
    )


if __name__ == "__main__":
    run_main(main)
