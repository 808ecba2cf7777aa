"""Texts: named sources, facts to recall, packing into token windows. Knows no model and no Trainer."""
