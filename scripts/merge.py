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
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine.jobs.model_names import find_model
from engine.runtime.flags import make_parser, run_main
from engine.runtime.locking import lock_file
from engine.runtime.published_adapter import published, refuse_damaged, refuse_scale
from model.lora import check_strength
from model.merge import merge
from model.peft_format import load_lora
from model.trained_chat import TrainedChat


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--model",
        required=True,
        help="Hugging Face model directory, a .gguf file, or ORG/NAME in the local Hugging Face "
        "cache",
    )
    parser.add_argument("--adapter", required=True, type=Path, help="PEFT adapter directory")
    parser.add_argument(
        "--scale",
        type=float,
        metavar="X",
        help="strength at which the adapter is merged: 0 (the model stays as it is) to 1 (as it "
        "was trained), at most 10 [default: 1]",
    )
    parser.add_argument("--out", required=True, type=Path, help="directory to write")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    scale = 1.0 if args.scale is None else args.scale
    check_strength(scale)
    model = find_model(args.model)
    refuse_scale(args.scale, model, [args.adapter])
    with lock_file(args.out):
        refuse_damaged(args.adapter)
        lora = load_lora(args.adapter).scaled(scale)
        trained = TrainedChat.read(args.adapter)
        install_chat = None if trained is None else trained.install
        (weights_hash,) = published(args.adapter).values()
        left_out = merge(model, lora, args.out, finish=install_chat, adapter=weights_hash)
    at_scale = "" if scale == 1 else f" at scale {scale:g}"
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
