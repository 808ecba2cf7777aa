"""The command `generate`: a chat in the terminal, and a page of what the cache kept."""
