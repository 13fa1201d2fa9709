"""Variants of a finished clip, such as its thumbnail: a file beside it, with a record like the clip's.

A variant is made when it is first requested, where the clip is: in the directory, or else in the archive. It goes with
the clip. If several processes make it at once, the first one counts.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from cosmos3_core.errors import MediaError
from cosmos3_core.media.sound_track import NoSoundTrack, write_sound_track
from cosmos3_core.media.thumbnail import write_spritesheet, write_thumbnail
from deployments.errors import ApiError
from deployments.media.fsspec_objects import Objects
from deployments.media.layout import DONE, FAILED, MediaRecord, create_record, read_record
from deployments.media.store import MediaStore, hash_file


@dataclass(frozen=True)
class Variant:
    """A kind of file that ``write`` can make of a finished one, if that has one of the MIME types ``sources``.

    Its ``name``, 1 to 16 letters a-z, is that of its record and its file.
    """

    name: str
    media_type: str
    suffix: str
    write: Callable[[Path, BinaryIO], None]
    sources: tuple[str, ...]

    @property
    def record_name(self) -> str:
        """The name of its record in the clip's folder."""
        return f"{self.name}.json"


_MP4, _WAV = "video/mp4", "audio/wav"
_AUDIO = "audio"
_VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("thumbnail", "image/webp", ".webp", write_thumbnail, (_MP4, "image/png", "image/jpeg", "image/webp")),
        Variant("spritesheet", "image/jpeg", ".jpg", write_spritesheet, (_MP4,)),
        Variant(_AUDIO, "audio/mp4", ".m4a", write_sound_track, (_MP4,)),
    )
}
MADE_VARIANTS = tuple(_VARIANTS)
"""Names of the variants that are made of a finished file."""

VIDEO, ACTION = "video", "action"
CONTENT_VARIANTS = (VIDEO, *MADE_VARIANTS, ACTION)
"""Variants of a job that a client can request: its file, those made of the file, its actions."""

_MAX_AT_ONCE = 2
_MAX_WAITING = 32
_WAIT_S = 60.0


def find_variant(store: MediaStore, record: MediaRecord, variant: Variant) -> MediaRecord | None:
    """Return the record of a clip's variant, None if not made; raise MediaError if the store cannot be read."""
    objects = _find_objects(store, record)
    if objects is None:
        return None
    try:
        return read_record(objects, record.media_id, variant.record_name)
    except OSError as error:
        raise MediaError(f"the {variant.name} of {record.media_id} cannot be looked up: {error}") from error


def make_variant(store: MediaStore, record: MediaRecord, variant: Variant) -> MediaRecord:
    """Make a variant of a clip that is done, keep it, and return its record.

    Raise FileNotFoundError if the clip was removed meanwhile, MediaError if the variant cannot be made or written.
    """
    folder = store.objects.temporary_path()
    try:
        folder.mkdir()
        path = folder / f"{variant.name}-{secrets.token_hex(8)}{variant.suffix}"
        with contextlib.closing(store.open(record)) as source:
            variant.write(path, source)
        objects = _find_objects(store, record)
        if objects is None:
            raise FileNotFoundError(f"{record.media_id} was removed")
        return _keep(objects, record, variant, path)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise MediaError(f"the {variant.name} of {record.media_id} cannot be written: {error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _keep(objects: Objects, record: MediaRecord, variant: Variant, path: Path) -> MediaRecord:
    """Put a variant's file and record beside the clip; return the record of the first process that did."""
    num_bytes, sha256 = hash_file(path)
    now_s = time.time()
    made = replace(
        record,
        media_type=variant.media_type,
        file_name=path.name,
        live_name="",
        num_bytes=num_bytes,
        sha256=sha256,
        created_s=now_s,
        updated_s=now_s,
    )
    objects.put_file(record.media_id, path.name, path)
    kept = None
    try:
        kept = create_record(objects, made, variant.record_name)
    finally:
        if kept != made:
            objects.remove(record.media_id, path.name)
    return kept


def _find_objects(store: MediaStore, record: MediaRecord) -> Objects | None:
    """Return where the clip is; None if it was removed."""
    return store.objects if store.file_path(record).exists() else store.archive


async def find_or_make(media: MediaStore, media_id: str, name: str) -> MediaRecord:
    """Return the record of a file, which may still grow, or of a variant of a finished one, made if missing.

    Raises:
        ApiError: 404, this file has no such variant; 409, the file or the variant is not ready; 410, there is no file.
        MediaError: the file cannot be looked up, or the variant cannot be made.
    """
    record = await asyncio.to_thread(media.find, media_id)
    if record is None:
        raise _explain_expiry()
    if record.state == FAILED:
        # The reason went to the request's caller.
        raise ApiError(410, "media_failed", "this file was never finished: its request failed or was given up")
    if name == VIDEO:
        return record
    if record.state != DONE:
        raise ApiError.not_ready(f"the {name} cannot be made before the file is finished")
    if name == _AUDIO and record.media_type == _WAV:
        return record
    variant = _VARIANTS.get(name)
    if variant is None or record.media_type not in variant.sources:
        raise ApiError(404, "no_such_variant", f"a file of type {record.media_type} has no such variant")
    if found := await asyncio.to_thread(find_variant, media, record, variant):
        return found
    try:
        return await _MAKER.make(media, record, variant)
    except FileNotFoundError:
        raise _explain_expiry() from None
    except NoSoundTrack:
        raise ApiError(404, "no_such_variant", "this file has no sound") from None


def _explain_expiry() -> ApiError:
    return ApiError(410, "media_expired", "this file has expired, or was removed")


class _Maker:
    """Makes variants in its own threads, a few at once, and each once for all callers who request it meanwhile."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(_MAX_AT_ONCE, thread_name_prefix="variants")
        self._lock = threading.Lock()  # several event loops may use it
        self._making: dict[tuple[str, ...], Future[MediaRecord]] = {}

    async def make(self, media: MediaStore, record: MediaRecord, variant: Variant) -> MediaRecord:
        """Make a variant, even if the caller leaves: the next caller finds it.

        Raise ApiError if too many are being made or it takes long, and as :func:`make_variant`.
        """

        def make() -> MediaRecord:
            # Look again: another caller may have finished since this one looked.
            return find_variant(media, record, variant) or make_variant(media, record, variant)

        made = asyncio.wrap_future(self._start((str(media.directory), record.media_id, variant.name), make))
        made.add_done_callback(lambda future: future.cancelled() or future.exception())  # all callers may have left
        await asyncio.wait((made,), timeout=_WAIT_S)
        if not made.done():
            raise ApiError.not_ready(f"the {variant.name} is still being made")
        return made.result()

    def _start(self, key: tuple[str, ...], make: Callable[[], MediaRecord]) -> Future[MediaRecord]:
        with self._lock:
            if key in self._making:
                return self._making[key]
            if len(self._making) >= _MAX_WAITING:
                message = f"{_MAX_WAITING} pictures or sounds of files are being made; one more is too many"
                raise ApiError(429, "overloaded", message, {"retry-after": "5"})
            future = self._making[key] = self._threads.submit(make)
        future.add_done_callback(lambda _: self._forget(key))
        return future

    def _forget(self, key: tuple[str, ...]) -> None:
        with self._lock:
            del self._making[key]


_MAKER = _Maker()
