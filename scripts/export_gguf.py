"""Write a model, or an adapter alone, as a GGUF file for llama.cpp and the programs made of it.

    python scripts/export_gguf.py --model models/smollm2-135m-instruct --adapter runs/demo/sdft \\
        --out smollm2-demo.gguf                         the adapter merged into the model
    python scripts/export_gguf.py ... --type q8_0       8 bits a number
    python scripts/export_gguf.py ... --adapter-only --out demo-lora.gguf
                                                        for llama-server -m BASE.gguf --lora FILE

The chat template and the end token that the adapter was trained with are written into the model.
Needs the packages gguf and tokenizers. An existing file is never overwritten.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine.jobs.adapted_model import AdaptedModelConfig
from engine.jobs.gguf_export import export_adapter, export_model, with_trained_chat
from engine.jobs.gguf_writer import FILE_TYPES, summary
from engine.runtime.flags import add_flags, from_flags, make_parser, run_main
from engine.runtime.locking import lock_file


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__)
    add_flags(parser, AdaptedModelConfig)
    parser.add_argument(
        "--adapter-only",
        action="store_true",
        help="write the adapter's matrices alone, to be loaded beside the GGUF of the model",
    )
    parser.add_argument(
        "--type",
        choices=[name.lower() for name in FILE_TYPES],
        default="f16",
        help="number format of the matrices: f32, f16, bf16, or q8_0 (8 bits, a shared scale for "
        "32 numbers) [default: f16]",
    )
    parser.add_argument("--out", required=True, type=Path, help=".gguf file to write")
    args = parser.parse_args()
    if args.adapter_only and args.adapter is None:
        parser.error("--adapter-only needs --adapter DIR")
    return args


def main() -> None:
    args = parse_args()
    config = from_flags(AdaptedModelConfig, args)
    model = config.model_dir()
    kind = args.type.upper()
    with lock_file(args.out):
        lora, trained = config.load()
        if args.adapter_only:
            formats = export_adapter(lora, model, args.out, kind)
        else:
            with tempfile.TemporaryDirectory() as folder:
                tokenizer = with_trained_chat(model, trained, Path(folder))
                formats = export_model(model, lora, args.out, kind, tokenizer)
    print(f"{args.out} written: {summary(formats, args.out)}")
    if trained is not None:
        print(f"the adapter was trained with {trained.text()}")


if __name__ == "__main__":
    run_main(
        main,
        "run the same command again",
        kept="nothing was written",
        lower="the largest matrix of the model must fit into memory twice, in fp32",
    )
