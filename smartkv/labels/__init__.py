"""Labels of keys: hits, lifespans and future attention, read off a frozen model's attention. Knows no gate."""
