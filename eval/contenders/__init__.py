"""Contenders: gates, rules, nulls, oracles and quantised caches behind one interface. Draws no picture."""
