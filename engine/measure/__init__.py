"""Likelihoods, divergences, confidence intervals, similarity."""
