"""Score answers of the seed model and of adapters over one base: on a file's rows, or on tasks.

    python scripts/evaluate.py --model MODEL_DIR --data test.json --verify number --out eval.jsonl
    python scripts/evaluate.py --model MODEL_DIR --adapter runs/sft --adapter runs/sdft \\
        --data test.json --verify number --out eval.jsonl
    python scripts/evaluate.py --model MODEL_DIR --adapter runs/sft --adapter runs/sdft \\
        --task gsm8k --task humaneval --tasks-dir DATA_DIR --out runs/tasks
    python scripts/evaluate.py --model MODEL_DIR --lm-eval arc_easy,winogrande --out runs/knowledge
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine.evaluate import evaluate_job
from engine.flags import add_flags, from_flags, make_parser, run_main
from engine.harness import HarnessConfig, harness_job
from engine.sampler import SamplerConfig
from engine.session import DataConfig, ModelConfig, Session, as_trained
from engine.tasks import TaskConfig, tasks_job


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__)
    add_flags(parser, ModelConfig)
    add_flags(parser, DataConfig, data=None)
    add_flags(parser, TaskConfig)
    add_flags(parser, HarnessConfig)
    add_flags(parser, SamplerConfig)
    parser.add_argument("--adapter", action="append", default=[], help="adapter directory (PEFT)")
    parser.add_argument(
        "--verify", default="number", help="none | number | call | code | ... (README)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="JSONL file of the answers; with --task, --lm-eval a directory",
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if [args.data, args.task, args.lm_eval].count(None) != 2:
        raise ValueError("give one of --data FILE (rows and a verifier), --task and --lm-eval")
    session = Session.open(as_trained(from_flags(ModelConfig, args), args.adapter))
    sampling = from_flags(SamplerConfig, args)
    if args.task:
        tasks_job(session, from_flags(TaskConfig, args), args.adapter, args.out, sampling)
    elif args.lm_eval:
        harness_job(session, from_flags(HarnessConfig, args), args.adapter, args.out, sampling)
    else:
        rows = from_flags(DataConfig, args).load()
        evaluate_job(session, rows, args.verify, args.adapter, args.out, sampling)


if __name__ == "__main__":
    run_main(main)
