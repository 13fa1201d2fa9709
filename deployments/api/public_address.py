"""Addresses of the public internet, the only ones that a request may make the service connect to.

By tables of its own: what ``ipaddress.is_global`` says differs between releases of Python, and is true of multicast.
"""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

IPAddress = IPv4Address | IPv6Address

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
# All that is given out to the public lies in the first; unique local addresses, the metadata of Amazon (fd00:ec2::254)
# and of Google among them, loopback, link-local and multicast lie outside.
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


def is_public(address: IPAddress) -> bool:
    """Return whether an address is public; of an IPv6 address that stands for an IPv4 one, whether that is."""
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
