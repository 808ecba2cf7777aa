"""Values that positions and expiries take besides numbers of tokens."""

HOLE = -1  # position of a slot without a key


FOREVER = 2**31 - 1  # a TTL, and an expiry, that no text outlives
