"""Texts: named sources, facts to recall, and packing into token windows. Knows no model and no Trainer."""
