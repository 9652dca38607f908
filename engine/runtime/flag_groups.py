"""Tables about the scripts' flags: headings of the help, the short list of each script, synonyms.

The meaning of a flag stands beside its field (engine/runtime/flags.py). tests/runtime/test_help.py
fails where a table and the flags of the scripts differ.
"""

from __future__ import annotations

# heading -> its flags, both in the order in which the help shows them
GROUPS = {
    "Presets": "preset",
    "Audit": "what tiny",
    "Input": "gguf runs",
    "Model": "model adapter adapter-only scale chat-format enable-thinking date",
    "Data": "data columns prompt system verify limit sample skip-bad drop-long thinking prefix",
    "Rewriting the answers": "template cascade choose paper-exact",
    "Sampling": """
        max-new-tokens temperature samples top-k top-p min-p repetition-penalty stop ignore-eos""",
    "Training": """
        lr epochs batch-rows rank modules alpha dropout rslora loss target mix drop-rejected
        max-length truncate cut-in-proportion max-steps schedule warmup weight-decay clip""",
    "Replay of the model's own answers": "replay replay-share replay-max-new",
    "What is compared": "arms seeds rows-list scales checkpoints grid",
    "Evaluation": """
        eval-data eval-limit eval-max-new retention-max-new similarity val-every val-data
        val-limit val-prompts best patience stop-kl task tasks-dir task-data task-limit paper
        lm-eval lm-eval-path lm-eval-shots lm-eval-limit""",
    "Speed and memory": """
        device dtype ops threads shard rows kv-memory prefill-tokens page-size draft
        batch-invariant graphs overlap steps micro-tokens recompute memory-gb""",
    "Output and reproducibility": """
        out type resume seed show open save-every keep no-score report-rows report-answers""",
    "Help": "help help-all",
}

# script -> the flags of its `--help`; `--help-all` shows all of them
COMMON = {
    "sdft": """
        preset model data columns verify limit template lr epochs batch-rows rank modules arms
        eval-data device out""",
    "distill": """
        preset model data columns verify limit template cascade temperature max-new-tokens
        device rows out resume""",
    "train": """
        preset model data target lr epochs batch-rows rank modules max-length val-every val-data
        device out resume show""",
    "evaluate": """
        model adapter data columns verify limit task tasks-dir lm-eval temperature max-new-tokens
        device rows out""",
    "retention": "model adapter data eval-data similarity max-new-tokens device rows out",
    "generate": """
        model adapter chat-format prompt data system temperature max-new-tokens samples
        device out seed""",
    "pareto": """
        preset model data verify lr rank mix epochs arms seeds rows-list scales eval-data task
        device out""",
    "preflight": """
        preset model data columns verify sample template cascade temperature max-new-tokens
        device""",
}

# field -> the name of its flag, where that differs; the field's own name is accepted too
RENAMED = {"invariant": "batch-invariant"}

# names that other programs use (transformers, peft, TRL, LLaMA-Factory, vLLM) -> the flag here
SYNONYMS = {
    "base-model": "model",
    "model-name": "model",
    "model-name-or-path": "model",
    "model-path": "model",
    "adapter-name-or-path": "adapter",
    "lora-path": "adapter",
    "chat-template": "chat-format",
    "dataset": "data",
    "dataset-name": "data",
    "train-data": "data",
    "train-file": "data",
    "input": "data",
    "max-samples": "limit",
    "max-train-samples": "limit",
    "num-samples": "limit",
    "system-prompt": "system",
    "prompt-template": "template",
    "test-data": "eval-data",
    "test-file": "eval-data",
    "eval-dataset": "eval-data",
    "eval-file": "eval-data",
    "validation-data": "val-data",
    "validation-file": "val-data",
    "eval-steps": "val-every",
    "early-stopping-patience": "patience",
    "adapter-scale": "scale",
    "lora-scale": "scale",
    "tasks": "task",
    "max-tokens": "max-new-tokens",
    "temp": "temperature",
    "n": "samples",
    "num-return-sequences": "samples",
    "learning-rate": "lr",
    "num-epochs": "epochs",
    "num-train-epochs": "epochs",
    "batch-size": "batch-rows",
    "train-batch-size": "batch-rows",
    "per-device-train-batch-size": "batch-rows",
    "lora-r": "rank",
    "lora-rank": "rank",
    "r": "rank",
    "lora-alpha": "alpha",
    "lora-dropout": "dropout",
    "lora-target": "modules",
    "lora-target-modules": "modules",
    "target-modules": "modules",
    "use-rslora": "rslora",
    "max-seq-len": "max-length",
    "max-seq-length": "max-length",
    "max-model-len": "max-length",
    "cutoff-len": "max-length",
    "lr-scheduler": "schedule",
    "lr-scheduler-type": "schedule",
    "warmup-ratio": "warmup",
    "warmup-steps": "warmup",
    "max-grad-norm": "clip",
    "grad-clip": "clip",
    "gradient-checkpointing": "recompute",
    "max-num-seqs": "rows",
    "max-num-batched-tokens": "prefill-tokens",
    "block-size": "page-size",
    "gpu-memory-utilization": "kv-memory",
    "speculative-config": "draft",
    "enforce-eager": "no-graphs",
    "cuda-graphs": "graphs",
    "num-threads": "threads",
    "torch-dtype": "dtype",
    "precision": "dtype",
    "fsdp": "shard",
    "output": "out",
    "output-dir": "out",
    "output-file": "out",
    "save-steps": "save-every",
    "save-total-limit": "keep",
    "random-seed": "seed",
    "resume-from-checkpoint": "resume",
}
