"""Metrics: R², rankings, nulls, perplexity and their intervals. Trains and evicts nothing."""
