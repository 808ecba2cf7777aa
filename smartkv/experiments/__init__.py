"""Old names of commands, each of which runs the command of today; nothing is measured here."""
