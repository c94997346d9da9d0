"""The exceptions a user can cause: value, reason, remedy in a sentence."""


class UserError(Exception):
    """Something the user can mend; commands print its sentence and exit with status 1."""


class Stopped(Exception):
    """Somebody asked for an end; commands print its sentence and exit with ``status``.

    Attributes:
        status: 128 + the signal's number, as shells count.
    """

    def __init__(self, sentence: str, signal_number: int):
        super().__init__(sentence)
        self.status = 128 + signal_number
