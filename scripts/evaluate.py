"""Score the answers of the seed model and of adapters: on rows of a file, or on benchmarks.

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

from engine.data.config import DataConfig
from engine.evaluate.lm_eval_harness import HarnessConfig, harness_job
from engine.evaluate.target_task import evaluate_job, nll_file
from engine.evaluate.tasks.run import TaskConfig, tasks_job
from engine.jobs.model_names import with_model_found
from engine.runtime.flags import InWords, add_flags, from_flags, make_parser, run_main
from engine.runtime.locking import lock_directory, lock_file
from engine.runtime.published_adapter import refuse_scale
from engine.runtime.resumable import meta_file
from engine.sampling.requests import SamplerConfig
from engine.session import ModelConfig, Session, as_begun, as_trained, parse_scales
from engine.verify.verifiers import get_verifier


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__, "evaluate")
    add_flags(parser, ModelConfig)
    add_flags(parser, DataConfig, data=InWords(None, "none (--task or --lm-eval instead)"))
    add_flags(parser, TaskConfig)
    add_flags(parser, HarnessConfig)
    add_flags(parser, SamplerConfig)
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        help="adapter directory (PEFT) to score beside the seed model; may be repeated "
        "[default: none]",
    )
    parser.add_argument(
        "--scale",
        metavar="LIST",
        help="strengths at which each adapter is scored, as in 0.25,0.5,1: 0 (the seed model) to 1 "
        "(as it was trained), at most 10 [default: 1]",
    )
    parser.add_argument(
        "--verify",
        default="number",
        help="how an answer is checked against its reference: number (the same last number), call "
        "(the same function calls), code (passes the row's tests), json (is valid JSON), exact, "
        "contains, regex:PATTERN, module:function (your own), or none (not checked)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="JSONL file of the answers to write; with --task or --lm-eval a directory",
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    absent = [args.data, args.task, args.lm_eval].count(None)
    if absent != 2:
        raise ValueError("give one of --data FILE (rows and a verifier), --task and --lm-eval")
    model = with_model_found(from_flags(ModelConfig, args))
    sampling = from_flags(SamplerConfig, args)
    scales = parse_scales(args.scale)
    refuse_scale(args.scale, args.model, args.adapter)
    if args.data:
        data = from_flags(DataConfig, args)
        get_verifier(args.verify)
        with lock_file(args.out):
            model = as_begun(model, meta_file(args.out), meta_file(nll_file(args.out)))
            session = Session.open(as_trained(model, args.adapter))
            evaluate_job(session, data, args.verify, args.adapter, args.out, sampling, scales)
        return

    if args.task:
        config = from_flags(TaskConfig, args)
        job = tasks_job
    else:
        config = from_flags(HarnessConfig, args)
        job = harness_job
    with lock_directory(args.out):
        model = as_begun(model, *sorted(args.out.glob("*.meta.json")))
        session = Session.open(as_trained(model, args.adapter), packed=True)
        job(session, config, args.adapter, args.out, sampling, scales)


if __name__ == "__main__":
    run_main(main)
