"""Verifiers, the published rules, refusals, the sandbox for model-written code."""
