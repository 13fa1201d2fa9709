"""Command-line flags that choose an app's configuration: a file, and keys on top of it."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cosmos3_core.errors import RequestError

if TYPE_CHECKING:
    from deployments.config import AppConfig


def add_config_flags(parser: argparse.ArgumentParser) -> None:
    """Add ``--config``, ``--name`` and ``--set``."""
    add = parser.add_argument
    add("--config", metavar="FILE", help="YAML, or the name of one in the package's cluster/configs; default laptop")
    add("--name", help="of the Serve application; the key name")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="any other key, such as vae.num_threads=4")


def config_of(options: argparse.Namespace, flags: Mapping[str, Any]) -> AppConfig:
    """Read the configuration that the flags name.

    Args:
        options: parsed flags, those of :func:`add_config_flags` among them.
        flags: key -> value of a command's other flags; None leaves a key as it is.

    Raises:
        RequestError: ``--set`` is not KEY=VALUE.
        ConfigError: the configuration cannot be read, or a value is wrong.
    """
    from deployments.config import DEFAULT_CONFIG, AppConfig, config_file

    overrides = dict(_key_and_value(text) for text in options.set)
    overrides |= {key: value for key, value in {"name": options.name, **flags}.items() if value is not None}
    return AppConfig.read(config_file(options.config) if options.config else DEFAULT_CONFIG, overrides)


def _key_and_value(text: str) -> tuple[str, Any]:
    import yaml

    key, equals, value = text.partition("=")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError:
        value = ""
    if not key or not equals or not value:  # "null" is a value; an empty text is not
        raise RequestError("set", text, "KEY=VALUE: a dotted key and a YAML value, such as vae.num_threads=4")
    return key, parsed
