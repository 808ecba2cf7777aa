"""Commands that score gates without evicting: R², ranking, objectives, layers."""
