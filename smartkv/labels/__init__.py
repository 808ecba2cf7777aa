"""Labels of keys: hits, lifespans and future attention, measured on a frozen model's attention. Knows no gate."""
