"""Architectures that methods fit: how to reach the parts of a Hugging Face encoder without changing it.

One file per family of architectures; :class:`exporter.hosts.host.Host` says what each must name. Nothing here alters
a model.
"""

from __future__ import annotations

from pathlib import Path

from compexport.errors import InputError, describe
from exporter.hosts import albert, bart, bert, gpt2, t5
from exporter.hosts.host import Host

HOSTS: dict[str, Host] = {**bert.HOSTS, **t5.HOSTS, **bart.HOSTS, **albert.HOSTS, **gpt2.HOSTS}


def host_of(model_type: str, folder: Path) -> Host:
    """The host for a ``config.json`` model type; InputError names the supported ones."""
    try:
        return HOSTS[model_type]
    except KeyError:
        raise InputError(
            describe(
                f"{folder}: unsupported architecture",
                got=repr(model_type),
                expected=f"one of {', '.join(sorted(HOSTS))}",
            )
        ) from None


__all__ = ["HOSTS", "Host", "host_of"]
