"""Evaluation tasks, each with its prompts and scorers; README.md lists them."""
