"""Evaluation tasks, each with its prompts and scorers.

base.py              what a task is                 run.py         answering, scoring, the table
arithmetic.py        GSM8K, MultiArith              functions.py   OpenFunctions
humaneval.py         programs, run in sandbox.py    safety.py      AdvBench, plain and suffixed
instructions.py      forty prompts of ours          constraints.py what they ask, checked
alpaca_eval.py       answers for that tool's judge
"""

from engine.evaluate.tasks.base import Item, Task
from engine.evaluate.tasks.run import TASKS, TaskConfig, run_tasks, tables, tasks_job

__all__ = ["TASKS", "Item", "Task", "TaskConfig", "run_tasks", "tables", "tasks_job"]
