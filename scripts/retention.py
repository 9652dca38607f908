"""Measure how far training moved a model on general prompts: KL and agreement with the seed model.

    python scripts/retention.py --model MODEL_DIR --adapter runs/sft --adapter runs/sdft \\
        --out retention.jsonl
    python scripts/retention.py ... --data prompts.json     your prompts, instead of our 64
    python scripts/retention.py ... --eval-data test.json   the prompts of the trained task beside
    python scripts/retention.py ... --similarity            compare the answers too
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine.data.config import DataConfig
from engine.evaluate.retention import retention_job, retention_metas
from engine.jobs.model_names import with_model_found
from engine.runtime.flags import InWords, add_flags, from_flags, make_parser, run_main
from engine.runtime.locking import lock_file
from engine.runtime.published_adapter import refuse_scale
from engine.sampling.requests import SamplerConfig
from engine.session import ModelConfig, Session, as_begun, as_trained, parse_scales


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__, "retention")
    add_flags(parser, ModelConfig)
    add_flags(parser, SamplerConfig, max_new_tokens=96)
    parser.add_argument(
        "--adapter",
        action="append",
        required=True,
        help="adapter directory (PEFT) to compare with the seed model; may be repeated",
    )
    parser.add_argument(
        "--scale",
        metavar="LIST",
        help="strengths at which each adapter is measured, as in 0.25,0.5,1: 0 (the seed model) to "
        "1 (as it was trained), at most 10 [default: 1]",
    )
    add_flags(
        parser, DataConfig, {"drop_long", "system"}, data=InWords(None, "our 64 general prompts")
    )
    parser.add_argument(
        "--eval-data",
        help="held-out rows of the task that the adapters were trained on: the drift over the seed "
        "model's answers to their prompts is measured too; read as --data is [default: none]",
    )
    parser.add_argument(
        "--similarity",
        action="store_true",
        help="also compare the answers themselves, by sentence embeddings",
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="JSONL file to write, one line per prompt"
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    model = with_model_found(from_flags(ModelConfig, args))
    sampling = from_flags(SamplerConfig, args)
    scales = parse_scales(args.scale)
    refuse_scale(args.scale, args.model, args.adapter)
    files = from_flags(DataConfig, args)
    data = files if args.data else None
    held_out = files.beside(args.eval_data, limit=None) if args.eval_data else None
    with lock_file(args.out):
        model = as_begun(model, *retention_metas(args.out))
        retention_job(
            Session.open(as_trained(model, args.adapter)),
            args.adapter,
            args.out,
            sampling,
            data,
            similar=args.similarity,
            scales=scales,
            held_out=held_out,
        )


if __name__ == "__main__":
    run_main(main)
