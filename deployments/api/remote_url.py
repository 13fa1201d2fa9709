"""URLs of files on other servers: taken apart in one strict way, and compared with what the operator has listed."""

from __future__ import annotations

import re
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from urllib.parse import SplitResult, quote, urlsplit

import idna

from deployments.api.public_address import IPAddress
from deployments.config import ConfigError

_DEFAULT_PORTS = {"http": 80, "https": 443}
_MAX_CHARS = 4096
_MAX_HOST_CHARS = 253
_LABEL = "[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?"
_NAME = re.compile(rf"{_LABEL}(\.{_LABEL})*")
# A last part like this makes resolvers read the whole as an address: 2130706433, 0x7f.1, 127.1.
_NUMBER = re.compile("[0-9]+|0x[0-9a-f]*")
# What a URL may hold as it is; all else is percent-encoded.
_UNQUOTED = "%/?:@!$&'()*+,;=-._~[]"


class UnfitUrl(Exception):
    """A URL that is not fetched.

    Args:
        reason: a full sentence, which says nothing about the inside of any network.
    """


@dataclass(frozen=True)
class RemoteUrl:
    """A URL in parts.

    Attributes:
        scheme: "http" or "https".
        host: a name, in lower case and ASCII, without a dot at its end; or an address as it is usually written.
        port: given, or the scheme's own.
        target: path and query.
        address: that ``host`` is, where it is one.
    """

    scheme: str
    host: str
    port: int
    target: str
    address: IPAddress | None

    @classmethod
    def parse(cls, text: str) -> RemoteUrl:
        """Parse a URL.

        Raises:
            UnfitUrl: it is none, or one that different readers read differently, or has a user name in it.
        """
        if len(text) > _MAX_CHARS:
            raise UnfitUrl(f"It is longer than {_MAX_CHARS} characters.")
        # Before anything reads it: urlsplit drops some of these without a word.
        if "\\" in text or any(char.isspace() or not char.isprintable() for char in text):
            raise UnfitUrl("It has spaces, line ends, control characters or backslashes in it.")
        try:
            split = urlsplit(text)
            port = split.port
        except ValueError:
            raise UnfitUrl("It is no URL.") from None
        if split.scheme not in _DEFAULT_PORTS or not split.netloc:
            raise UnfitUrl("It is no URL of http or https.")
        if "@" in split.netloc:
            raise UnfitUrl("A URL with a user name or password is not fetched.")
        host, address = _host(split.hostname or "")
        return cls(split.scheme, host, _DEFAULT_PORTS[split.scheme] if port is None else port, _target(split), address)

    @property
    def has_default_port(self) -> bool:
        return self.port == _DEFAULT_PORTS[self.scheme]

    @property
    def host_header(self) -> str:
        """The value of the Host header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.has_default_port else f"{host}:{self.port}"


@dataclass(frozen=True)
class HostRule:
    """One entry of the operator's list.

    Attributes:
        host: as :class:`RemoteUrl` has it.
        port: the only one; None: the default ports.
        is_wildcard: whether it stands for all names below ``host``, and not for ``host`` itself.
    """

    host: str
    port: int | None
    is_wildcard: bool

    @classmethod
    def parse(cls, entry: str) -> HostRule:
        """Parse an entry: ``files.example.com``, ``*.example.com``, either with ``:8443``, or an address.

        Raises:
            ConfigError: it is none of these.
        """
        text = entry.removeprefix("*.")
        is_wildcard = text != entry
        try:
            split = urlsplit(f"//[{text}]" if text.count(":") > 1 and not text.startswith("[") else f"//{text}")
            if split.netloc != split.geturl().removeprefix("//") or "@" in split.netloc:
                raise UnfitUrl("It is more than a host.")
            host, address = _host(split.hostname or "")
            if is_wildcard and address is not None:
                raise UnfitUrl("There is nothing below an address.")
            return cls(host, split.port, is_wildcard)
        except (UnfitUrl, ValueError):
            raise ConfigError(
                f"remote_media.hosts: {entry!r} is no files.example.com, *.example.com, address, or one with a :PORT"
            ) from None

    def covers(self, url: RemoteUrl) -> bool:
        """Return whether a URL's host and port are those of the rule."""
        if not (url.has_default_port if self.port is None else url.port == self.port):
            return False
        if self.is_wildcard:
            return url.address is None and url.host.endswith(f".{self.host}")
        return url.host == self.host


def shown_url(text: str) -> str:
    """Return a URL without what may be secret: user name and password, query, fragment."""
    head = re.split("[?#]", text, maxsplit=1)[0]
    scheme, slashes, rest = head.partition("//")
    netloc, slash, path = rest.partition("/")
    return scheme + slashes + netloc.rpartition("@")[2] + slash + path


def _host(text: str) -> tuple[str, IPAddress | None]:
    """Return a host in its usual form, and the address that it is, if it is one.

    Raises:
        UnfitUrl: it is none, or an address in an unusual form.
    """
    if ":" in text:
        try:
            if "%" in text:
                raise ValueError("of one interface only")
            address = IPv6Address(text)
        except ValueError:
            raise UnfitUrl("Its host is no address.") from None
        return str(address), address
    try:
        name = text if text.isascii() else idna.encode(text, uts46=True).decode("ascii")
    except UnicodeError:
        raise UnfitUrl("Its host is no name.") from None
    name = name.lower().removesuffix(".")
    if len(name) > _MAX_HOST_CHARS or not _NAME.fullmatch(name):
        raise UnfitUrl("Its host is no name.")
    if not _NUMBER.fullmatch(name.rpartition(".")[2]):
        return name, None
    try:
        return name, IPv4Address(name)
    except ValueError:
        raise UnfitUrl("Its host is a number.") from None


def _target(split: SplitResult) -> str:
    target = split.path or "/"
    return quote(f"{target}?{split.query}" if split.query else target, safe=_UNQUOTED)
