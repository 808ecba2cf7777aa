"""Frozen language models: loading, architecture, the pre-RoPE key, attention functions. Knows no gate and no cache."""
