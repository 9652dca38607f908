"""Write a model with an adapter merged in, as a plain Hugging Face directory.

    python scripts/merge.py --model models/smollm2-135m-instruct --adapter runs/demo/sdft \\
        --out models/smollm2-demo
    python scripts/merge.py ... --scale 0.5         the adapter at half its strength

The output has the model's own files, shards and dtype; transformers, vLLM and this engine load it.
The chat template and the end token that the adapter was trained with are written with it. The
directory appears under its name only when it is complete; an existing one is never overwritten.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine.jobs.adapted_model import AdaptedModelConfig
from engine.runtime.flags import add_flags, from_flags, make_parser, run_main
from engine.runtime.locking import lock_file
from engine.runtime.published_adapter import published
from model.merge import merge


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__)
    add_flags(parser, AdaptedModelConfig, adapter=dataclasses.MISSING)  # an adapter is required
    parser.add_argument("--out", required=True, type=Path, help="directory to write")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    config = from_flags(AdaptedModelConfig, args)
    model = config.model_dir()
    with lock_file(args.out):
        lora, trained = config.load()
        install_chat = None if trained is None else trained.install
        (weights_hash,) = published(args.adapter).values()
        left_out = merge(model, lora, args.out, finish=install_chat, adapter=weights_hash)
    at_scale = "" if config.strength == 1 else f" at scale {config.strength:g}"
    modules = ", ".join(name.split(".")[1] for name in lora.config.module_names())
    print(f"{args.out} written: {model} with {modules} of {args.adapter} merged in{at_scale}")
    if trained is None:
        print(
            "the adapter has no chat.json, so its chat format is unknown: chat template and "
            "end token are the model's own"
        )
    else:
        print(f"with it: {trained.text()}")
    if left_out:
        print(f"not copied: {', '.join(left_out)}")


if __name__ == "__main__":
    run_main(
        main,
        "run the same command again",
        kept="nothing was written",
        lower="a shard of the model must fit into memory twice, in fp32 where it is adapted",
    )
