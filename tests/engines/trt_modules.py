"""Stand-ins for a library that a build cannot survive; each is written to a folder as a module of its own."""

from __future__ import annotations

from pathlib import Path

ABORTING = """
import os, sys
print("Internal Error: check failed", file=sys.stderr, flush=True)
os.abort()
"""
# Goes on without ever asking whether it is to stop.
DEAF = """
import time
class Builder:
    def __init__(self, log):
        time.sleep(600)
class ILogger:
    pass
"""
MISSING_LIBRARY = """
raise ImportError("libnvinfer.so.11: cannot open shared object file")
"""


def write(folder: Path, name: str, source: str) -> None:
    (folder / f"{name}.py").write_text(source)
