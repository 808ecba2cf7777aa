"""Special values of positions and expiries."""

HOLE = -1  # position of a slot without a key

FOREVER = 2**31 - 1  # a TTL or an expiry, in tokens, that no text outlives
