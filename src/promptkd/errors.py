"""The one exception a user can cause: value, reason, remedy in a sentence."""


class UserError(Exception):
    """Something the user can mend; commands print its sentence and exit with status 1."""
