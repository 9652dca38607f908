"""Whole jobs, one a script."""
