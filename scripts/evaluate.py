"""Score greedy answers of the seed model and of adapters over one base.

    python scripts/evaluate.py --model MODEL_DIR --data test.json --verify number --out eval.jsonl
    python scripts/evaluate.py --model MODEL_DIR --adapter runs/sft --adapter runs/sdft \\
        --data test.json --verify number --out eval.jsonl
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine.evaluate import evaluate_job
from engine.flags import add_flags, from_flags, make_parser, run_main
from engine.sampler import SamplerConfig
from engine.session import DataConfig, ModelConfig, Session


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__)
    add_flags(parser, ModelConfig)
    add_flags(parser, DataConfig)
    add_flags(parser, SamplerConfig)
    parser.add_argument("--adapter", action="append", default=[], help="adapter directory (PEFT)")
    parser.add_argument(
        "--verify", default="number", help="none | number | call | code | ... (README)"
    )
    parser.add_argument("--out", type=Path, required=True, help="JSONL file of the answers")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    evaluate_job(
        Session.open(from_flags(ModelConfig, args)),
        from_flags(DataConfig, args).load(),
        args.verify,
        args.adapter,
        args.out,
        from_flags(SamplerConfig, args),
    )


if __name__ == "__main__":
    run_main(main)
