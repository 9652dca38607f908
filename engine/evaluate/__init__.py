"""Scores of the seed and of adapters: the target task, tasks/, retention, lm-eval (README.md)."""
