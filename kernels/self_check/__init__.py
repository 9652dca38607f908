"""The check of `--ops auto`: which kernels pass on this machine, found once and remembered."""
