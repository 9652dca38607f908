"""Before a long run, test on a few rows whether self-distillation will change anything.

    python scripts/preflight.py --model MODEL_DIR --data train.json --verify number
    python scripts/preflight.py ... --sample 32 --template gsm8k

Measures whether the model follows a reference that it is shown, and how long the whole job would
take. Takes the flags of scripts/sdft.py. Ends with GO or NO-GO, the reasons, and one line of JSON.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine.data.config import DataConfig
from engine.distill.config import PAPER_SAMPLING, DistillConfig
from engine.jobs.job_config import JobConfig
from engine.jobs.model_names import with_model_found
from engine.jobs.preflight import PreflightConfig, preflight
from engine.presets import parse
from engine.runtime.flags import add_flags, from_flags, make_parser, run_main
from engine.sampling.requests import SamplerConfig
from engine.session import ModelConfig, Session
from engine.train.config import EncodeConfig, TrainConfig
from model.lora import LoraConfig


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__, "preflight")
    add_flags(parser, ModelConfig)
    add_flags(parser, DataConfig)
    add_flags(parser, PreflightConfig)
    add_flags(parser, DistillConfig)
    add_flags(parser, SamplerConfig, {"max_new_tokens", "stop", "seed"}, **PAPER_SAMPLING)
    add_flags(parser, EncodeConfig, {"target", "mix"})
    add_flags(parser, TrainConfig)
    add_flags(parser, LoraConfig, {"seed"})
    return parse(parser)


def main() -> None:
    args = parse_args()
    config = JobConfig(
        model=with_model_found(from_flags(ModelConfig, args)),
        data=from_flags(DataConfig, args),
        job=from_flags(PreflightConfig, args),
        distill=from_flags(DistillConfig, args),
        sampling=from_flags(SamplerConfig, args, max_new_tokens=SamplerConfig.max_new_tokens),
        encode=from_flags(EncodeConfig, args),
        train=from_flags(TrainConfig, args),
        lora=from_flags(LoraConfig, args),
    )
    preflight(Session.open(config.model), config)


if __name__ == "__main__":
    run_main(main, "run the same command again", kept="nothing is kept")
