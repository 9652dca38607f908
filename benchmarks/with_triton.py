"""Imported before `kernels`: triton is imported then, on a machine without a GPU too."""

import contextlib

with contextlib.suppress(ImportError):  # wheels are for Linux only
    import triton  # noqa: F401
