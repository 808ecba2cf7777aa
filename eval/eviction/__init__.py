"""Commands that measure what eviction costs on texts: perplexity, compare, auto, gains, recall of facts."""
