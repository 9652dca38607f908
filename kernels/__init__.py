"""The arithmetic: an operation is a file or a folder; imports torch, triton and itself only.

Empty on purpose: a well-known distribution has the same import name and transformers probes it.
"""
