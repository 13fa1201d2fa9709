"""URLs of files on other servers, parsed in one strict way; the operator's list of hosts; public addresses.

The tables of addresses are our own: ``ipaddress.is_global`` differs between releases of Python, and includes multicast.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from urllib.parse import quote, urlsplit

import idna

from deployments.config import ConfigError

IPAddress = IPv4Address | IPv6Address

DEFAULT_PORTS = {"http": 80, "https": 443}
"""Scheme -> port."""

_MAX_CHARS = 4096
_MAX_HOST_CHARS = 253
_LABEL = "[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?"
_NAME = re.compile(rf"{_LABEL}(\.{_LABEL})*")
# A last part like this makes resolvers read the whole as an address: 2130706433, 0x7f.1, 127.1.
_NUMBER = re.compile("[0-9]+|0x[0-9a-f]*")
# What a URL may hold unchanged; all else is percent-encoded.
_UNQUOTED = "%/?:@!$&'()*+,;=-._~[]"
_NOT_PUBLIC_V4 = tuple(
    IPv4Network(network)
    for network in (
        "0.0.0.0/8",  # this network
        "10.0.0.0/8",  # private
        "100.64.0.0/10",  # carriers' NAT; Alibaba's metadata, Tailscale
        "127.0.0.0/8",  # loopback
        "168.63.129.16/32",  # Azure's metadata, though of a public range
        "169.254.0.0/16",  # link-local; the metadata of most clouds
        "172.16.0.0/12",  # private
        "192.0.0.0/24",  # protocol assignments; Oracle's metadata
        "192.0.2.0/24",  # documentation
        "192.88.99.0/24",  # relays to 6to4
        "192.168.0.0/16",  # private
        "198.18.0.0/15",  # benchmarks
        "198.51.100.0/24",  # documentation
        "203.0.113.0/24",  # documentation
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, broadcast
    )
)
# All public addresses lie in it; unique local ones, with the metadata of Amazon (fd00:ec2::254) and Google, loopback,
# link-local and multicast lie outside.
_PUBLIC_V6 = IPv6Network("2000::/3")
_NOT_PUBLIC_V6 = tuple(
    IPv6Network(network)
    for network in (
        "2001::/23",  # protocol assignments, Teredo among them
        "2001:db8::/32",  # documentation
        "3fff::/20",  # documentation
    )
)
_6TO4 = IPv6Network("2002::/16")
_NAT64 = IPv6Network("64:ff9b::/96")
_V4_MASK = 0xFFFFFFFF


class UrlRefused(Exception):
    """A URL that is not fetched. ``reason`` reveals nothing of any network; ``allowed`` "" means the listed hosts."""

    def __init__(self, reason: str, allowed: str = "") -> None:
        super().__init__(reason)
        self.allowed = allowed


@dataclass(frozen=True)
class RemoteUrl:
    """A URL of http or https in parts.

    Attributes:
        host: a name, in lower case and ASCII, without a final dot; or an address in canonical form.
        target: path and query.
        address: ``host`` as an address; None for a name.
    """

    scheme: str
    host: str
    port: int
    target: str
    address: IPAddress | None

    @classmethod
    def parse(cls, text: str) -> RemoteUrl:
        """Parse a URL; raise UrlRefused if it is none, has a user name, or is read differently by different readers."""
        if len(text) > _MAX_CHARS:
            raise UrlRefused(f"It is longer than {_MAX_CHARS} characters.")
        # Before any parsing: urlsplit silently drops some of these.
        if "\\" in text or any(char.isspace() or not char.isprintable() for char in text):
            raise UrlRefused("It has spaces, line ends, control characters or backslashes in it.")
        try:
            split = urlsplit(text)
            port = split.port
        except ValueError:
            raise UrlRefused("It is no URL.") from None
        if split.scheme not in DEFAULT_PORTS or not split.netloc:
            raise UrlRefused("It is no URL of http or https.")
        if "@" in split.netloc:
            raise UrlRefused("A URL with a user name or password is not fetched.")
        host, address = _parse_host(split.hostname or "")
        target = quote(f"{split.path or '/'}{'?' if split.query else ''}{split.query}", safe=_UNQUOTED)
        return cls(split.scheme, host, DEFAULT_PORTS[split.scheme] if port is None else port, target, address)

    @property
    def has_default_port(self) -> bool:
        return self.port == DEFAULT_PORTS[self.scheme]

    @property
    def host_header(self) -> str:
        """The value of the Host header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.has_default_port else f"{host}:{self.port}"


@dataclass(frozen=True)
class HostRule:
    """One entry of the operator's list.

    Attributes:
        port: the only one; None: the default ports.
        is_wildcard: whether it stands for all names below ``host``, and not for ``host`` itself.
    """

    host: str
    port: int | None
    is_wildcard: bool

    @classmethod
    def parse(cls, entry: str) -> HostRule:
        """Parse ``files.example.com``, ``*.example.com``, either with ``:8443``, or an address; raise ConfigError."""
        text = entry.removeprefix("*.")
        is_wildcard = text != entry
        try:
            split = urlsplit(f"//[{text}]" if text.count(":") > 1 and not text.startswith("[") else f"//{text}")
            if split.netloc != split.geturl().removeprefix("//") or "@" in split.netloc:
                raise UrlRefused("It is more than a host.")
            host, address = _parse_host(split.hostname or "")
            if is_wildcard and address is not None:
                raise UrlRefused("There is nothing below an address.")
            return cls(host, split.port, is_wildcard)
        except (UrlRefused, ValueError):
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


def redact_url(text: str) -> str:
    """Return a URL without what may be secret: user name, password, query and fragment."""
    head = re.split("[?#]", text, maxsplit=1)[0]
    scheme, slashes, rest = head.partition("//")
    netloc, slash, path = rest.partition("/")
    return scheme + slashes + netloc.rpartition("@")[2] + slash + path


def _parse_host(text: str) -> tuple[str, IPAddress | None]:
    """Return a host in canonical form, and as an address if it is one."""
    if ":" in text:
        try:
            if "%" in text:
                raise ValueError("of one interface only")
            address = IPv6Address(text)
        except ValueError:
            raise UrlRefused("Its host is no address.") from None
        return str(address), address
    try:
        name = text if text.isascii() else idna.encode(text, uts46=True).decode("ascii")
    except UnicodeError:
        raise UrlRefused("Its host is no name.") from None
    name = name.lower().removesuffix(".")
    if len(name) > _MAX_HOST_CHARS or not _NAME.fullmatch(name):
        raise UrlRefused("Its host is no name.")
    if not _NUMBER.fullmatch(name.rpartition(".")[2]):
        return name, None
    try:
        return name, IPv4Address(name)
    except ValueError:
        raise UrlRefused("Its host is a number.") from None


def is_public(address: IPAddress) -> bool:
    """Return whether an address is public; an IPv6 address that stands for an IPv4 one is judged by that."""
    if isinstance(address, IPv4Address):
        return not any(address in network for network in _NOT_PUBLIC_V4)
    if meant := list(_v4_behind(address)):
        return all(is_public(inner) for inner in meant)
    return address in _PUBLIC_V6 and not any(address in network for network in _NOT_PUBLIC_V6)


def _v4_behind(address: IPv6Address) -> Iterator[IPv4Address]:
    if address.ipv4_mapped is not None:
        yield address.ipv4_mapped
    if address in _6TO4:
        yield IPv4Address(int(address) >> 80 & _V4_MASK)
    if address in _NAT64:
        yield IPv4Address(int(address) & _V4_MASK)
