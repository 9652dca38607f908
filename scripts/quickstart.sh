#!/usr/bin/env bash
# The main job from nothing: .venv, the embedded model, made questions, SFT beside SDFT, a table.
#
#     bash scripts/quickstart.sh                    where to go in a made-up town hall
#     bash scripts/quickstart.sh --word-problems    arithmetic that this model cannot learn: a test, and
#                                                   for comparisons between machines
#
# A second run installs nothing and continues where the first one stopped. All files are written to
# .venv/, models/ and runs/.

source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

MODEL=models/smollm2-135m-instruct
case "${1:-}" in
"")
    OUT=runs/quickstart
    TRAIN_ROWS=200
    TEST_ROWS=40
    WHAT="visits to a made-up town hall"
    WRITE="from engine.jobs.demo_desk import write_desk as write"
    # Chosen by trial: shown "Question: ... Answer: Window 27" and asked for a complete sentence, the
    # model keeps the number in seven of ten rewrites. It is asked greedily. The learning rate is
    # high because the model is small and the steps are few: seen once, 200 rows taught SDFT 37 of
    # 40 held-out windows. Of six errands an office instead of four it learned 29, at 1e-3 22.
    SDFT_FLAGS=(
        --template engine/jobs/demo_desk_template.txt --temperature 0 --max-new-tokens 48
        --lr 2e-3 --epochs 1 --rank 8 --modules all --dropout 0 --batch-rows 4
        --eval-max-new 32 --retention-max-new 24 --no-score --report-rows 12 --report-answers 4
    )
    ;;
--word-problems)
    OUT=runs/quickstart-word-problems
    TRAIN_ROWS=100
    TEST_ROWS=40
    WHAT="word problems"
    WRITE="from engine.jobs.demo import write_demo as write"
    # Chosen by trial on 48 rows: the templates gsm8k (greedy or sampled) and refer all give 23
    # rewrites (48 %) that keep the answer and differ from the reference. The greedy ones are the most
    # likely under the seed model (NLL 0.84 a token; sampled 1.05, references 1.19).
    SDFT_FLAGS=(
        --template gsm8k --temperature 0 --max-new-tokens 160
        --lr 1e-3 --epochs 2 --rank 8 --modules qv --dropout 0
        --eval-max-new 160 --retention-max-new 64 --report-rows 32 --report-answers 8
    )
    ;;
*)
    echo "error: $1 is not known; expected nothing, or --word-problems" >&2
    exit 2
    ;;
esac
DATA="$OUT-data"
SDFT_FLAGS=(
    --data "$DATA/train.json" --eval-data "$DATA/test.json" --verify number
    "${SDFT_FLAGS[@]}" --out "$OUT"
)

make_venv quickstart bpe,report

say "the embedded model"
"$PYTHON" scripts/import_gguf.py --gguf demo --out "$MODEL"

say "$WHAT, $TRAIN_ROWS to train on, $TEST_ROWS held out: $DATA"
"$PYTHON" -c "from pathlib import Path; $WRITE
write(Path('$DATA'), $TRAIN_ROWS, $TEST_ROWS)"

say "python scripts/sdft.py --model $MODEL ${SDFT_FLAGS[*]}"
"$PYTHON" scripts/sdft.py --model "$MODEL" "${SDFT_FLAGS[@]}"
