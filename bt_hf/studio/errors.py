"""Errors of the studio that a page can act on."""


class NotSavedError(OSError):
    """The disk did not take a line: it is full, or may not be written. Nothing of the line is kept."""


class RefusedError(Exception):
    """Request that can't be met.

    Args:
        status: HTTP status.
        text: One line with the way out.
    """

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status
