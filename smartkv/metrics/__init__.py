"""Metrics: R², rankings, nulls, perplexity and their confidence intervals; nothing is trained here."""
