#!/usr/bin/env bash
# Everything that needs a GPU, in parts; the order is that of their worth.
#
#     bash scripts/gpu.sh [--dry] [PART...]      parts: product measure tests decode kernels tune
#     BUDGET=300 bash scripts/gpu.sh product measure
#     bash scripts/gpu.sh prepare                before, on a machine with a network: writes .gpu/
#     bash scripts/gpu.sh --dry                  a rehearsal on a CPU: tiny shapes, the interpreter
#
# product   whole jobs with the embedded model on the card, texts and figures beside a CPU's;
#           trained twice, killed and resumed; two processes; memory short on purpose; drafts
# measure   one 7B of random weights: training steps and decoding, in order of worth
# tests     the tests that need a GPU
# decode    the decoding of `measure` alone
# kernels   every operation beside torch's forms
# tune      tile configurations: written to $OUT/tiles.tar, copied nowhere
#
# Without a PART all of them run. Each is a process with a time limit of its own; BUDGET=seconds cuts
# from the end, and says so. Figures are in $OUT (default benchmarks/results/gpu/) as soon as they
# are known, one JSON line each in figures.jsonl, so a killed part leaves those it has. The exit
# code is 1 if a part failed, 2 for a wrong argument. Nothing is installed outside .gpu/, nothing
# but `prepare` uses a network. benchmarks/README.md says how a session on a card goes.
#
# It needs torch, triton, numpy, safetensors, sentencepiece, tokenizers, tqdm, jinja2 and pytest, of
# the Python that PYTHON names (default python3).

set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
if [[ ${1:-} == prepare ]]; then
    exec "${PYTHON:-python3}" -m benchmarks.card.prepare "${@:2}"
fi
exec "${PYTHON:-python3}" -m benchmarks.card "$@"
