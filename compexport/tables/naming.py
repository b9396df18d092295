"""What several tables call things."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def shown_name(row: Mapping[str, Any]) -> str:
    """A variant's name, and that its plugins are random where they are."""
    return f"{row['variant']} (untrained)" if row.get("untrained") else str(row["variant"])


def percent(share: float) -> str:
    return f"{100 * share:.2f} %"
