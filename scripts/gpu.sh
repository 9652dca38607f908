#!/usr/bin/env bash
# Everything that needs a GPU, from a bare clone, in about eight minutes: the kernels' tests on the
# card, the tuning of their tiles, their times beside torch's, a training step and decoding at
# Llama-2-7B's shapes, and the same step by transformers and peft where those are installed.
#
#     bash scripts/gpu.sh
#     SKIP="tune peers" PYTHON=/usr/bin/python3 bash scripts/gpu.sh
#     bash scripts/gpu.sh --dry            a rehearsal on a CPU: tiny shapes, triton's interpreter
#
# It needs torch, triton, numpy, safetensors, sentencepiece, tqdm and pytest; it installs nothing and
# uses no network. Each part is a process of its own with its own time limit, so the others still run
# when one fails or hangs; the exit code is then 1. Logs and JSON are written to $OUT, by default
# benchmarks/results/gpu/. The tiles that tuning finds are written to $OUT/tiles only: copy them to
# kernels/launch/tiles to keep them.

set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-python3}
SKIP=${SKIP:-}
DRY=""
if [[ ${1:-} == --dry ]]; then
    DRY=1
    export TRITON_INTERPRET=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
elif [[ $# -gt 0 ]]; then
    echo "gpu.sh: unknown argument $1; expected --dry or nothing" >&2
    exit 2
elif ! "$PYTHON" -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
    echo "gpu.sh: $PYTHON has no torch that finds a GPU here; --dry rehearses without one" >&2
    exit 2
fi
if [[ -n $DRY ]]; then
    export OUT=${OUT:-$(mktemp -d)}
fi
export OUT=${OUT:-$PWD/benchmarks/results/gpu} PYTHONUNBUFFERED=1
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)

SUMMARY=("part|seconds|outcome")
FAILED=0

# part NAME LIMIT COMMAND...: runs the command for at most LIMIT seconds, shows and keeps its output.
part() {
    local name=$1 limit=$2 started=$SECONDS code outcome=ok
    shift 2
    if [[ " $SKIP " == *" $name "* ]]; then
        SUMMARY+=("$name|0|skipped as asked")
        return
    fi
    printf '\n== %s (at most %s s): %s\n' "$name" "$limit" "$*"
    timeout --kill-after=10 "$limit" "$@" 2>&1 | tee "$OUT/$name.log" | cut -c1-400
    code=${PIPESTATUS[0]}
    if [[ $name == tests && -n $DRY && $code == 5 ]]; then
        outcome="no GPU, so no test to run" # exit code 5 of pytest: no test was selected
    elif [[ $code == 124 || $code == 137 ]]; then
        outcome="FAILED: ran past $limit s"
        FAILED=1
    elif [[ $code != 0 ]]; then
        outcome="FAILED ($code), see $OUT/$name.log"
        FAILED=1
    fi
    SUMMARY+=("$name|$((SECONDS - started))|$outcome")
}

PYTEST=("$PYTHON" -m pytest -q -p no:cacheprovider -m gpu)
PYTEST+=(tests/kernels/test_operations.py tests/model/test_triton_model.py tests/kernels/test_batch_invariant.py)
PYTEST+=(tests/kernels/test_cached_attention_triton.py tests/sampling/test_cuda_graphs.py)
# On the card most of a test's time is compilation, on one core: shares of the tests run side by side.
SHARES=("rms_norm or rope or swiglu" "adamw or linear_cross_entropy" "cached_attention" "sample")
SHARES+=("attention and not cached_attention" "lora_linear and bfloat16" "test_triton_model")
SHARES+=("lora_linear and float16 and not bfloat16" "lora_linear and not float16")
SHARES+=("test_cuda_graphs and not whole" "test_cuda_graphs and whole" "test_batch_invariant")
SHARES+=("linear and not lora_linear and not cross_entropy and not test_batch_invariant")
SHARE='"${@:2}" -k "$1" >"$OUT/tests-${1// /_}.log" 2>&1; code=$?; echo "-- $1"
    tail -n 15 "$OUT/tests-${1// /_}.log"; exit $code'
IN_SHARES=(xargs -0 -a "$OUT/.shares" -P 16 -I{} bash -c "$SHARE" share {})
TESTS=("${IN_SHARES[@]}" "${PYTEST[@]}")
if "$PYTHON" -c "import xdist" 2>/dev/null; then # better: each process takes the next test
    TESTS=("${PYTEST[@]}" -n 16)
fi
TUNE=("$PYTHON" -m benchmarks.tuning.tune --out "$OUT/tiles" --jobs "$(nproc)")
KERNELS=("$PYTHON" -m benchmarks.kernels)
STEP=("$PYTHON" -m benchmarks.step)

if [[ -n $DRY ]]; then
    tiny=(--model tiny --tokens 32 --row 16 --steps 1 --rows 2 --prompt 5 --new 3)
    part tests 60 "${PYTEST[@]}"
    part tune 60 "${TUNE[@]}" --dry --kernel rms_norm --seconds 20
    part kernels 120 "${KERNELS[@]}" --dry
    part backward 120 "${KERNELS[@]}" --dry --backward
    part step-qv 120 "${STEP[@]}" "${tiny[@]}" --rank 8 --modules qv --invariant
    part step-all 120 "${STEP[@]}" "${tiny[@]}" --tokens 16 --rank 16 --modules all --no-decode
    part peers 120 "${STEP[@]}" "${tiny[@]}" --rank 8 --modules qv --ops peft
else
    printf '%s\0' "${SHARES[@]}" >"$OUT/.shares"
    part tests 90 "${TESTS[@]}"
    part tune 80 "${TUNE[@]}" --seconds 66
    part kernels 75 "${KERNELS[@]}" --seconds 55 --slot 0.03
    part backward 65 "${KERNELS[@]}" --seconds 45 --slot 0.03 --backward
    part step-qv 90 "${STEP[@]}" --rank 8 --modules qv --invariant
    part step-all 40 "${STEP[@]}" --rank 16 --modules all --no-decode
    part peers 40 "${STEP[@]}" --rank 8 --modules qv --ops peft
fi

printf '\n== summary\n'
for line in "${SUMMARY[@]}"; do
    IFS='|' read -r name seconds outcome <<<"$line"
    printf '%-10s %8s  %s\n' "$name" "$seconds" "$outcome"
done
for name in step-qv step-all peers; do
    [[ -f $OUT/$name.log && " $SKIP " != *" $name "* ]] || continue
    printf '\n%s\n' "$name"
    grep -vE '^(\{|device |ceilings )' "$OUT/$name.log"
done
printf '\nlogs and JSON: %s\n' "$OUT"
exit "$FAILED"
