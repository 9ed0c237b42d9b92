"""A run that cannot go on, for a reason that its user is to know."""


class TrainingAborted(Exception):
    """Ends the run with its message, one line, on stderr, and exit code 1.

    Args:
        message: what is wrong and what to do.
        of_all_ranks: whether every rank raises it, in the same step, and the first tells it.
            Otherwise each that raises it tells it, and the launcher ends the others.
    """

    def __init__(self, message: str, of_all_ranks: bool = True):
        super().__init__(message)
        self.of_all_ranks = of_all_ranks
