"""What comes in parts, written to a file."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable
from pathlib import Path

from cosmos3_core.errors import MediaError
from cosmos3_core.media.output import OutputFile


async def write_parts(parts: AsyncIterable[bytes], path: Path) -> int:
    """Write a file, which appears when it is whole. Returns its size in bytes.

    Raises:
        RequestError: no place for a file.
        MediaError: it cannot be written.
    """
    file = OutputFile(path)
    num_bytes = 0
    try:
        with file.path.open("wb") as stream:
            async for part in parts:
                num_bytes += await asyncio.to_thread(stream.write, part)
        file.commit()
    except OSError as error:
        raise MediaError(f"{path}: cannot be written: {error}") from error
    finally:
        file.discard()
    return num_bytes
