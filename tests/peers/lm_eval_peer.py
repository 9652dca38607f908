"""lm-evaluation-harness's own `hf` model on local tasks: every answer, as one line of JSON.

python lm_eval_peer.py MODEL_DIR TASKS_DIR TASK,TASK
"""

import json
import sys

from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager

model, tasks, names = sys.argv[1:]
found = simple_evaluate(
    "hf",
    model_args={"pretrained": model, "dtype": "float32", "device": "cpu"},
    tasks=names.split(","),
    task_manager=TaskManager(include_path=tasks, include_defaults=False),
    batch_size=4,
    bootstrap_iters=0,  # standard errors are not compared
)
answers = {
    name: [s["filtered_resps"] for s in sorted(found["samples"][name], key=lambda s: s["doc_id"])]
    for name in names.split(",")
}
print()
print(json.dumps({"answers": answers, "results": found["results"]}, default=str))
