"""Search for the block sizes of the Triton kernels."""
