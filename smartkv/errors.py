"""The one error a user of SmartKV meets: what was expected, what came, what to do."""


class SmartKVError(Exception):
    """A mistake in what was given (a file, a config key, a model), told in one line.

    The commands print it without a traceback and exit with status 2. It is no ValueError, because jsonargparse takes
    a ValueError from a constructor for a value of the wrong type and hides what it says.
    """
