"""Train a LoRA adapter on distilled data, or on plain rows.

    python scripts/train.py --model MODEL_DIR --data distilled.jsonl --out runs/sdft
    python scripts/train.py --model MODEL_DIR --data distilled.jsonl --target reference \\
        --out runs/sft
    python scripts/train.py ... --show 2            print encoded rows with their loss and exit
    python scripts/train.py ... --resume            continue after an interruption
    python scripts/train.py ... --val-every 20 --val-data test.json --best nll      keep the best
    torchrun --nproc-per-node 2 scripts/train.py ...        several processes share the rows
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine.data.config import DataConfig
from engine.jobs.model_names import with_model_found
from engine.presets import parse
from engine.runtime.flags import add_flags, from_flags, make_parser, run_main
from engine.runtime.locking import lock_directory
from engine.session import ModelConfig, Session, as_begun
from engine.train.config import EncodeConfig, TrainConfig
from engine.train.replay import ReplayConfig
from engine.train.train import TrainJobConfig, train_job
from engine.train.validate import ValidateConfig
from model.lora import LoraConfig


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__, "train")
    for config in (
        ModelConfig,
        DataConfig,
        EncodeConfig,
        TrainConfig,
        ValidateConfig,
        ReplayConfig,
    ):
        add_flags(parser, config)
    add_flags(parser, LoraConfig, {"seed"})
    parser.add_argument(
        "--out", type=Path, help="run directory to write: adapter, checkpoints, metrics"
    )
    parser.add_argument(
        "--show",
        type=int,
        metavar="N",
        help="print the tokens of N rows, and which of them have a loss; then exit",
    )
    parser.add_argument("--resume", action="store_true", help="continue an interrupted run")
    args = parse(parser)
    if (args.out is None) == (args.show is None):
        parser.error("give either --out RUN or --show N")
    return args


def main() -> None:
    args = parse_args()
    model = with_model_found(from_flags(ModelConfig, args))
    config = TrainJobConfig(
        data=from_flags(DataConfig, args),
        encode=from_flags(EncodeConfig, args),
        train=from_flags(TrainConfig, args),
        lora=from_flags(LoraConfig, args),
        validate=from_flags(ValidateConfig, args),
        replay=from_flags(ReplayConfig, args),
    )
    with lock_directory(args.out):
        if args.out is not None:
            model = as_begun(model, args.out / "meta.json")
        session = Session.open(model)
        train_job(session, config, args.out, show_rows=args.show, resume=args.resume)


if __name__ == "__main__":
    run_main(main, "run the same command with --resume to continue")
