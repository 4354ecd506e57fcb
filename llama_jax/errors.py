"""The one exception that means "the user gave something that cannot work".

Every other exception is a defect of this program and keeps its traceback.
"""


class UserError(ValueError):
    """A mistake that the user can mend.

    The message is one line: what was given, what was expected, what to do.
    Commands print it to standard error and exit with status 2.
    """
