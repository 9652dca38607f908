"""The target task, tasks/, retention, lm-eval."""
