"""Where a command prints."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from compexport.present import Screen


@contextlib.contextmanager
def opened_screen(as_json: bool) -> Iterator[Screen]:
    """The real stdout for the result; what else prints meanwhile, as the tracer does, and warnings go to stderr."""
    from compexport.present import Screen, warnings_on_stderr

    screen = Screen(sys.stdout, as_json=as_json)
    with contextlib.redirect_stdout(sys.stderr), warnings_on_stderr("compexport", "calib", "engines", "exporter"):
        yield screen
