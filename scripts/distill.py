"""Let the model (the seed model) rewrite every reference answer; verify and score the rewrites.

    python scripts/distill.py --model MODEL_DIR --data train.json --out distilled.jsonl
    python scripts/distill.py --model MODEL_DIR --data gsm8k.json --template gsm8k \\
        --verify number --cascade unguided:2,guided:2,cooler:1 --out distilled.jsonl
    python scripts/distill.py --preset yang2024-alpaca ...      with the paper's settings
    python scripts/distill.py ... --resume          continue after an interruption
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine.data.config import DataConfig
from engine.distill.config import PAPER_SAMPLING, DistillConfig
from engine.distill.distill import distill_file
from engine.jobs.model_names import with_model_found
from engine.presets import parse
from engine.runtime.flags import add_flags, from_flags, make_parser, run_main
from engine.runtime.locking import lock_file
from engine.runtime.resumable import meta_file
from engine.sampling.requests import SamplerConfig
from engine.session import ModelConfig, Session, as_begun


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__, "distill")
    add_flags(parser, ModelConfig)
    add_flags(parser, DataConfig, {"drop_long"})
    add_flags(parser, DistillConfig)
    add_flags(parser, SamplerConfig, {"max_new_tokens", "stop"}, **PAPER_SAMPLING)
    parser.add_argument(
        "--out", type=Path, required=True, help="JSONL file to write: the distilled data"
    )
    parser.add_argument(
        "--no-score",
        action="store_true",
        help="do not measure the seed model's likelihood of references and rewrites",
    )
    parser.add_argument("--resume", action="store_true", help="continue an interrupted run")
    return parse(parser)


def main() -> None:
    args = parse_args()
    model = with_model_found(from_flags(ModelConfig, args))
    data = from_flags(DataConfig, args)
    distilling = from_flags(DistillConfig, args)
    sampling = from_flags(SamplerConfig, args, max_new_tokens=SamplerConfig.max_new_tokens)
    with lock_file(args.out):
        distill_file(
            Session.open(as_begun(model, meta_file(args.out)), packed=True),
            data,
            args.out,
            distilling,
            sampling,
            scoring=not args.no_score,
            resume=args.resume,
        )


if __name__ == "__main__":
    run_main(main, "run the same command with --resume to continue")
