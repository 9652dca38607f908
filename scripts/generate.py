"""Answer one prompt, or every prompt of a file.

    python scripts/generate.py --model MODEL_DIR --prompt "Why is the sky blue?"
    python scripts/generate.py --model MODEL_DIR --adapter runs/sdft --data prompts.json \\
        --temperature 0.7 --samples 3 --out answers.jsonl
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine.data.config import DataConfig
from engine.jobs.generate import generate_job
from engine.jobs.model_names import with_model_found
from engine.runtime.flags import InWords, add_flags, from_flags, make_parser, run_main
from engine.runtime.locking import lock_file
from engine.runtime.published_adapter import refuse_scale
from engine.sampling.requests import SamplerConfig
from engine.session import ModelConfig, ScaledAdapter, Session, as_trained
from model.lora import check_strength


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__, "generate")
    add_flags(parser, ModelConfig)
    add_flags(parser, SamplerConfig)
    add_flags(parser, DataConfig, {"drop_long"}, data=InWords(None, "none (--prompt is answered)"))
    parser.add_argument("--prompt", help="one user message to answer, in place of --data")
    parser.add_argument(
        "--prefix", default="", help="text that every answer begins with [default: none]"
    )
    parser.add_argument(
        "--adapter", help="adapter directory (PEFT) [default: none (the seed model answers)]"
    )
    parser.add_argument(
        "--scale",
        type=float,
        metavar="X",
        help="strength of the adapter: 0 (the seed model) to 1 (as it was trained), at most 10 "
        "[default: 1]",
    )
    parser.add_argument("--samples", type=int, default=1, metavar="N", help="answers per prompt")
    parser.add_argument("--out", type=Path, help="JSONL file to write [default: print the answers]")
    args = parser.parse_args()
    if (args.prompt is None) == (args.data is None):
        parser.error("give either --prompt TEXT or --data FILE")
    return args


def main() -> None:
    args = parse_args()
    sampling = from_flags(SamplerConfig, args)
    prompts = from_flags(DataConfig, args) if args.data else args.prompt
    adapters = [args.adapter] if args.adapter else []
    scale = 1.0 if args.scale is None else args.scale
    check_strength(scale)
    refuse_scale(args.scale, args.model, adapters)
    model = as_trained(with_model_found(from_flags(ModelConfig, args)), adapters)
    with lock_file(args.out):
        generate_job(
            Session.open(model, packed=True),
            prompts,
            sampling,
            adapter=ScaledAdapter(args.adapter, scale) if args.adapter else None,
            system=args.system,
            prefix=args.prefix,
            samples=args.samples,
            out=args.out,
        )


if __name__ == "__main__":
    run_main(
        main,
        "generation cannot be continued: run the command again with another --out",
        kept="finished answers are in the file of --out, if one was given",
    )
