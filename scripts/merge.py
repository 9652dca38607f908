"""Write a model with an adapter merged in, as a plain Hugging Face directory.

    python scripts/merge.py --model models/smollm2-135m-instruct --adapter runs/demo/sdft \\
        --out models/smollm2-demo

The output has the model's own files, shards and dtype; transformers, vLLM and this engine load it.
It appears under its name only when it is whole, and an existing one is never written over.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import engine  # noqa: F401 before torch: how waiting threads wait
from model.lora import Lora, merge


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, type=Path, help="Hugging Face model directory")
    parser.add_argument("--adapter", required=True, type=Path, help="PEFT adapter directory")
    parser.add_argument("--out", required=True, type=Path, help="directory to write")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    try:
        lora = Lora.load(args.adapter)
        merge(args.model, lora, args.out)
    except (ValueError, OSError) as error:
        sys.exit(f"merge: {error}")
    modules = ", ".join(name.split(".")[1] for name in lora.config.module_names())
    print(f"{args.out} written: {args.model} with {modules} of {args.adapter} merged in")


if __name__ == "__main__":
    main()
