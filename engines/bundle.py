"""The bundle: one folder that holds a family of engines. ``docs/bundle.md`` is its specification.

    with BundleWriter("bundle/") as writer:
        (writer.dir / "graphs").mkdir()
        ...
        bundle = writer.commit(manifest)

    bundle = Bundle.open("bundle/")
    weights = bundle.file("graphs/weights.bin")

Reading lives in ``bundle_reader``, writing in ``bundle_writer``; this module is the one to import.
"""

from __future__ import annotations

from engines.bundle_reader import Bundle, Problem
from engines.bundle_writer import BundleWriter

__all__ = ["Bundle", "BundleWriter", "Problem"]
