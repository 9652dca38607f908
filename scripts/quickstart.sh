#!/usr/bin/env bash
# The main job from nothing: .venv, the embedded model, made word problems, SFT beside SDFT, a table.
#
#     bash scripts/quickstart.sh
#
# A second run installs nothing and continues where the first one stopped. All files are written to
# .venv/, models/ and runs/.

source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

MODEL=models/smollm2-135m-instruct
DATA=runs/quickstart-data
TRAIN_ROWS=100
TEST_ROWS=40
# Chosen by trial on 48 rows: the templates gsm8k (greedy or sampled) and refer all give 23 rewrites
# (48 %) that keep the answer and differ from the reference. The greedy ones are the most likely under
# the seed model (NLL 0.84 a token; sampled 1.05, references 1.19). The learning rate is high because
# the model is small.
SDFT_FLAGS=(
    --data "$DATA/train.json"
    --eval-data "$DATA/test.json"
    --verify number
    --template gsm8k --temperature 0 --max-new-tokens 160
    --lr 1e-3 --epochs 2 --rank 8 --modules qv --dropout 0
    --eval-max-new 160 --retention-max-new 64 --report-rows 32 --report-answers 8
    --out runs/quickstart
)

make_venv quickstart bpe,report

say "the embedded model"
"$PYTHON" scripts/import_gguf.py --gguf demo --out "$MODEL"

say "$TRAIN_ROWS word problems to train on, $TEST_ROWS held out: $DATA"
"$PYTHON" -c "from pathlib import Path; from engine.jobs.demo import write_demo
write_demo(Path('$DATA'), $TRAIN_ROWS, $TEST_ROWS)"

say "python scripts/sdft.py --model $MODEL ${SDFT_FLAGS[*]}"
"$PYTHON" scripts/sdft.py --model "$MODEL" "${SDFT_FLAGS[@]}"
