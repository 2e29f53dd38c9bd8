"""The one exception that is meant for the person at the keyboard."""


class UserError(Exception):
    """Something the user gave us is wrong: one line that says what, where, and what would be right.

    Commands print it as ``error: …`` and exit with code 2; nothing has been written by then.
    """
