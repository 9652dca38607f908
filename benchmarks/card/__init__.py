"""A session on a machine with a GPU: what `bash scripts/gpu.sh` runs. See benchmarks/README.md."""
