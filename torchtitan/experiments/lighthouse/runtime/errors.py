"""The error that ends a run with a message for the user."""


class TrainingAborted(Exception):
    """Ends the run with exit code 1 and its message in one line on stderr.

    Args:
        message: what is wrong and what to do.
        of_all_ranks: whether every rank raises it in the same step. If so, only rank 0 prints it.
            Otherwise each rank that raises it prints it, and the launcher ends the others.
    """

    def __init__(self, message: str, of_all_ranks: bool = True):
        super().__init__(message)
        self.of_all_ranks = of_all_ranks
