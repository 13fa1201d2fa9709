"""The TCP sockets on which processes listen, from /proc."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from pathlib import Path


def list_listening(pids: Iterable[int]) -> dict[str, int]:
    """Return address:port -> pid of the sockets on which some processes listen."""
    inodes = {}
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                if match := re.fullmatch(r"socket:\[(\d+)\]", str(link.readlink())):
                    inodes[match[1]] = pid
            except OSError:
                continue  # closed just now
    found = {}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:  # LISTEN
                address, _, port = fields[1].partition(":")
                found[f"{_decode(address)}:{int(port, 16)}"] = inodes[fields[9]]
    return found


def _decode(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """Return the address that the kernel writes in words of the machine's (little-endian) order."""
    words = [bytes.fromhex(address[start : start + 8])[::-1] for start in range(0, len(address), 8)]
    found = ipaddress.ip_address(b"".join(words))
    mapped = getattr(found, "ipv4_mapped", None)
    return mapped or found
