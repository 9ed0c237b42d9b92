"""A run that cannot go on, for a reason that its user is to know."""


class Stop(Exception):
    """Ends the run with its message, one line, on stderr, and exit code 1.

    Every rank raises it in the same step, or the others would wait for it.
    """
