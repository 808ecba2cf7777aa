"""Files, folders, the hub, and checks of what comes from outside. Knows no model, no key and no cache."""
