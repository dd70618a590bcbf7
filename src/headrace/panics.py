"""Whatever a foreign library raises, as an error of headrace: also Rust's panics, whose exception is no `Exception`.

Knows no library.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from headrace.errors import HeadraceError, UserError

__all__ = ["told_as"]


@contextmanager
def told_as(error: type[UserError], what: str) -> Iterator[None]:
    """Whatever is raised inside becomes `error`: "`what` (the library's words)".

    Raises:
        UserError: of the class `error`.
    """
    try:
        yield
    except HeadraceError:
        raise
    except Exception as cause:
        raise error(f"{what} ({cause})") from None
    except BaseException as panic:
        if type(panic).__name__ != "PanicException":  # pyo3's, which has no importable name
            raise
        raise error(f"{what} ({panic})") from None
