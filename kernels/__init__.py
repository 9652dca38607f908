"""The arithmetic: one file per operation; imports torch, triton and itself only.

Empty on purpose: a well-known distribution has the same import name and transformers probes it.
"""
