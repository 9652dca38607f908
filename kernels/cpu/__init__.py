"""Only for CPUs: C kernels, packed weights, batch-invariant torch calls, attention over pages."""
