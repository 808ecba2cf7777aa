"""Files, folders, the hub, and checks of data from outside. Knows no model, no key and no cache."""
