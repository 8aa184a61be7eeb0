"""The errors that the driver knows: os-win's own classes where it is installed, look-alikes where it is not.

compute-hyperv turns only the ``OSWinException`` family into Nova's exceptions, so :class:`VHDUtils` raises nothing
else. What went wrong, in imagekit's terms, is the exception's ``__cause__``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from imagekit.errors import ImagekitError, SourceError, TargetError

# System error codes of Windows (winerror.h) that callers look at.
ERROR_FILE_NOT_FOUND = 2
ERROR_FILE_EXISTS = 80
ERROR_VHD_INVALID_TYPE = 0xC03A001B

if TYPE_CHECKING:

    class OSWinException(Exception):
        def __init__(self, message: str | None = None, **kwargs: object) -> None: ...

    class VHDException(OSWinException): ...

    class VHDWin32APIException(OSWinException):
        error_code: int | None

else:
    try:
        from os_win.exceptions import OSWinException, VHDException, VHDWin32APIException
    except ImportError:

        class OSWinException(Exception):
            """Base of os-win's errors."""

            def __init__(self, message=None, **kwargs):
                self.error_code = kwargs.get("error_code")
                self.message = message or "An exception was encountered in os-win."
                super().__init__(self.message)

        class VHDException(OSWinException):
            """A disk image cannot be used as asked."""

        class VHDWin32APIException(VHDException):
            """What a call of Windows' virtual disk service would have failed with; see ``error_code``."""


@contextmanager
def as_os_win() -> Iterator[None]:
    """Errors of imagekit as those of os-win."""
    try:
        yield
    except ImagekitError as error:
        raise translated(error) from error


def translated(error: ImagekitError) -> OSWinException:
    """The os-win exception that says the same."""
    text = str(error) if error.hint is None else f"{error} ({error.hint})"
    code = None
    if isinstance(error, TargetError) and "exists" in error.message:
        code = ERROR_FILE_EXISTS
    elif isinstance(error, SourceError) and error.path is not None and not os.path.lexists(error.path):
        code = ERROR_FILE_NOT_FOUND
    return VHDException(text) if code is None else api_failure(text, code)


def api_failure(text: str, code: int) -> OSWinException:
    """A failed call of Windows' service, in os-win's form."""
    made = VHDWin32APIException(message=text, error_code=code)
    made.error_code = code
    return made
