"""The one error that users can mend; every part of this repository raises it, so it imports nothing."""


class UserError(ValueError):
    """A fault in what was given: an argument, a file, a machine.  Its text says what was expected and what to do.

    The command line prints it in one line and exits with 2; any other error is a fault of ours and keeps its traceback.
    """
