"""``cosmos3 keys add | list | remove``: API keys in an app's database, whether the app runs or not."""

from __future__ import annotations

import argparse
import sys
from contextlib import closing
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from cosmos3_core import checks

if TYPE_CHECKING:
    from deployments.config import AppConfig
    from deployments.jobs.keys import ApiKey, KeyStore

_COLUMNS = ("id", "name", "class", "may ask for", "max queued", "max running", "made", "removed")


def add_keys_flags(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """Add the actions of ``cosmos3 keys`` and their flags; return the actions' parsers."""
    actions = parser.add_subparsers(title="actions", metavar="ACTION", dest="action", required=True)
    add = actions.add_parser("add", help="make a key and print it: it cannot be shown again")
    add.add_argument("key_name", metavar="NAME", help="of its owner, for `list`")
    add.add_argument("--class", dest="service_class", metavar="CLASS", help="of requests that name none")
    add.add_argument("--allow", action="append", default=[], metavar="CLASS", help="another class that they may name")
    add.add_argument("--max-queued", type=int, metavar="N", help="queued jobs; default jobs.max_queued_per_key")
    add.add_argument("--max-running", type=int, metavar="N", help="running jobs; default jobs.max_running_per_key")
    table = actions.add_parser("list", help="list all keys, removed ones too; their texts are not stored")
    remove = actions.add_parser("remove", help="refuse a key from now on; its jobs stay")
    remove.add_argument("key", metavar="ID|NAME", help="as `list` shows them")
    for action in (add, table, remove):
        action.add_argument("--database", metavar="URL", help="of the jobs; the key jobs.database")
    return [add, table, remove]


def run(options: argparse.Namespace, config: AppConfig) -> int:
    """Run an action; return the exit status. Raise RequestError for a wrong value, or an unknown key."""
    from deployments.jobs.database import database_url
    from deployments.jobs.keys import KeyStore

    with closing(KeyStore.open(database_url(config))) as keys:
        if options.action == "add":
            _add(options, config, keys)
        elif options.action == "remove":
            removed = keys.revoke(options.key)
            print(f"{removed.key_id} ({removed.name}) is refused from now on; a running app may take seconds to notice")
        else:
            print_table(_COLUMNS, [_make_row(key) for key in keys.list()])
    return 0


def _add(options: argparse.Namespace, config: AppConfig, keys: KeyStore) -> None:
    from deployments.config import DEFAULT_CLASS
    from deployments.jobs.keys import KeyLimits, NewKey

    known = tuple(config.jobs.classes)
    service_class = checks.choice("class", options.service_class or DEFAULT_CLASS, known)
    new = NewKey(
        name=options.key_name,
        service_class=service_class,
        allowed_classes=tuple(checks.choice("allow", name, known) for name in options.allow),
        limits=KeyLimits(options.max_queued, options.max_running),
    )
    key, text = keys.create(new)
    print(f"{key.key_id} ({key.name}) may ask from now on, with this key, which is not shown again:", file=sys.stderr)
    print(text)


def _make_row(key: ApiKey) -> tuple[str, ...]:
    return (
        key.key_id,
        key.name,
        key.service_class,
        ",".join(key.allowed_classes),
        *("default" if limit is None else str(limit) for limit in (key.limits.max_queued, key.limits.max_running)),
        _format_date(key.created_s),
        "" if key.revoked_s is None else _format_date(key.revoked_s),
    )


def _format_date(at_s: float) -> str:
    return datetime.fromtimestamp(at_s, UTC).strftime("%Y-%m-%d")


def print_table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """Print rows below the names of their columns, aligned."""
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    for row in (columns, *rows):
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
