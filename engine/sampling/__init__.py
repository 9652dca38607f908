"""The KV-cached batched sampler."""
