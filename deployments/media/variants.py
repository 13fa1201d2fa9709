"""What is made of a finished clip, such as its thumbnail: a file beside it, with a record as the clip has one.

It is made when somebody asks for the first time, and goes with the clip. Where the directory has the clip, it is there;
else in the archive. Several processes may make it at once: in the directory the first one counts.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO

from cosmos3_core.errors import MediaError
from cosmos3_core.media.sound_track import NoSoundTrack, write_sound_track
from cosmos3_core.media.thumbnail import write_spritesheet, write_thumbnail
from deployments.errors import ApiError
from deployments.media.layout import DONE, FAILED, MediaRecord, put_record, read_record
from deployments.media.store import MediaStore

_READ_BYTES = 1 << 20


@dataclass(frozen=True)
class Variant:
    """Something to make.

    Attributes:
        name: 1 to 16 letters a-z; of its record and its file.
        media_type: MIME type of its file.
        suffix: ending of its file's name.
        write: makes it, at a path in an existing directory, from the clip.
    """

    name: str
    media_type: str
    suffix: str
    write: Callable[[Path, BinaryIO], None]

    @property
    def record_name(self) -> str:
        """Of its record in the clip's folder."""
        return f"{self.name}.json"


_MP4, _WAV = "video/mp4", "audio/wav"
_IMAGES = ("image/png", "image/jpeg", "image/webp")
_AUDIO = "audio"
# Type of a file -> what can be made of it.
_VARIANTS: Mapping[str, tuple[Variant, frozenset[str]]] = MappingProxyType(
    {
        variant.name: (variant, frozenset(media_types))
        for variant, *media_types in (
            (Variant("thumbnail", "image/webp", ".webp", write_thumbnail), _MP4, *_IMAGES),
            (Variant("spritesheet", "image/jpeg", ".jpg", write_spritesheet), _MP4),
            (Variant(_AUDIO, "audio/mp4", ".m4a", write_sound_track), _MP4),
        )
    }
)
MADE_VARIANTS = tuple(_VARIANTS)
"""Names of what is made of a finished file."""

VIDEO, ACTION = "video", "action"
CONTENT_VARIANTS = (VIDEO, *MADE_VARIANTS, ACTION)
"""What a client can ask for of a job: its file, what is made of the file, its actions."""

_MAX_AT_ONCE = 2
_MAX_WAITING = 32
_WAIT_S = 60.0
_RETRY_AFTER_S = 5


def find_variant(store: MediaStore, record: MediaRecord, variant: Variant) -> MediaRecord | None:
    """What was made of a clip already; None where it was not.

    Args:
        store: where the clip is.
        record: of the clip, which is done.
        variant: what it is.

    Raises:
        MediaError: the archive cannot be asked.
    """
    if _has_folder(store, record):
        return read_record(store.directory / record.media_id / variant.record_name)
    if store.archive is None:
        return None
    try:
        return store.archive.find_record(record.media_id, variant.record_name)
    except OSError as error:
        raise MediaError(f"the media archive cannot be asked for {record.media_id}: {error}") from error


def make_variant(store: MediaStore, record: MediaRecord, variant: Variant) -> MediaRecord:
    """Make it of a clip and keep it.

    Args:
        store: where the clip is.
        record: of the clip, which is done.
        variant: what it is.

    Returns:
        Its record, by which :meth:`deployments.media.store.MediaStore.open` finds its file.

    Raises:
        FileNotFoundError: the clip was removed meanwhile.
        MediaError: it cannot be made of this clip, or not be written.
        Exception: whatever else ``variant.write`` raises.
    """
    try:
        return (_beside if _has_folder(store, record) else _archived)(store, record, variant)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise MediaError(f"the {variant.name} of {record.media_id} cannot be written: {error}") from error


def _has_folder(store: MediaStore, record: MediaRecord) -> bool:
    return store.file_path(record).exists()


def _beside(store: MediaStore, record: MediaRecord, variant: Variant) -> MediaRecord:
    folder = store.directory / record.media_id
    made, path = _written(store, record, variant, folder)
    try:
        put_record(folder / variant.record_name, made)
    except FileExistsError:
        path.unlink(missing_ok=True)
        found = find_variant(store, record, variant)
        if found is None:
            raise MediaError(f"the record of the {variant.name} of {record.media_id} is damaged") from None
        return found
    except OSError:
        path.unlink(missing_ok=True)
        raise
    return made


def _archived(store: MediaStore, record: MediaRecord, variant: Variant) -> MediaRecord:
    if store.archive is None:
        raise FileNotFoundError(f"{record.media_id} was removed")
    folder = store.fresh_folder()
    folder.mkdir()
    try:
        made, path = _written(store, record, variant, folder)
        store.archive.add_file(made, path)
        store.archive.add_record(variant.record_name, made)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return made


def _written(store: MediaStore, record: MediaRecord, variant: Variant, folder: Path) -> tuple[MediaRecord, Path]:
    """The file in a folder, under a name of its own, and its record."""
    path = folder / f"{variant.name}-{secrets.token_hex(8)}{variant.suffix}"
    digest, num_bytes = hashlib.sha256(), 0
    try:
        with contextlib.closing(store.open(record)) as source:
            variant.write(path, source)
        with path.open("rb") as file:
            os.fsync(file.fileno())  # or a crash of the machine leaves a record without it
            while part := file.read(_READ_BYTES):
                digest.update(part)
                num_bytes += len(part)
    except Exception:
        path.unlink(missing_ok=True)
        if not folder.is_dir():  # under the writer's hands
            raise FileNotFoundError(f"{record.media_id} was removed") from None
        raise
    now_s = time.time()
    made = MediaRecord(
        media_id=record.media_id,
        state=DONE,
        reason="",
        media_type=variant.media_type,
        file_name=path.name,
        live_name="",
        num_bytes=num_bytes,
        sha256=digest.hexdigest(),
        created_s=now_s,
        updated_s=now_s,
    )
    return made, path


async def find_content(media: MediaStore, media_id: str, name: str) -> MediaRecord:
    """Return the record of a file, which may still grow, or of a variant of a finished one, made if it is not there.

    Args:
        media: where the file is.
        media_id: of the file.
        name: :data:`VIDEO` for the file itself, or one of :data:`MADE_VARIANTS`.

    Raises:
        ApiError: 404, this file has no such variant; 409, the file or the variant is not ready; 410, there is no file.
        MediaError: the file cannot be looked up, or the variant cannot be made.
    """
    record = await asyncio.to_thread(media.find, media_id)
    if record is None:
        raise _expired()
    if record.state == FAILED:
        # The reason went to the caller who asked for the file.
        raise ApiError(410, "media_failed", "this file was never finished: its request failed or was given up")
    if name == VIDEO:
        return record
    if record.state != DONE:
        message = f"the {name} cannot be made before the file is finished"
        raise ApiError(409, "media_not_ready", message, {"retry-after": "1"})
    return await _variant_of(media, record, name)


async def _variant_of(media: MediaStore, record: MediaRecord, name: str) -> MediaRecord:
    if name == _AUDIO and record.media_type == _WAV:
        return record
    variant, media_types = _VARIANTS.get(name, (None, frozenset[str]()))
    if variant is None or record.media_type not in media_types:
        raise ApiError(404, "no_such_variant", f"a file of type {record.media_type} has no such variant")
    if found := await asyncio.to_thread(find_variant, media, record, variant):
        return found
    try:
        return await _MAKER.made(media, record, variant)
    except FileNotFoundError:
        raise _expired() from None
    except NoSoundTrack:
        raise ApiError(404, "no_such_variant", "this file has no sound") from None


def _expired() -> ApiError:
    return ApiError(410, "media_expired", "this file has expired, or was removed")


def _find_or_make(store: MediaStore, record: MediaRecord, variant: Variant) -> MediaRecord:
    """Look again before making it: another caller may have finished since this one looked."""
    return find_variant(store, record, variant) or make_variant(store, record, variant)


class _Maker:
    """Makes variants in threads of its own: a few at once, each for all who ask for it meanwhile."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(_MAX_AT_ONCE, thread_name_prefix="variants")
        self._lock = threading.Lock()  # it may be asked in several event loops
        self._making: dict[tuple[str, ...], Future[MediaRecord]] = {}

    async def made(self, media: MediaStore, record: MediaRecord, variant: Variant) -> MediaRecord:
        """Of the file. Who leaves meanwhile stops nothing: the next one to ask finds it.

        Raises:
            ApiError: too many are waited for, or it takes long.
            Exception: as :func:`make_variant`.
        """
        key = (str(media.directory), record.media_id, variant.name)
        made = asyncio.wrap_future(self._started(key, lambda: _find_or_make(media, record, variant)))
        made.add_done_callback(lambda future: future.cancelled() or future.exception())  # nobody may be there any more
        await asyncio.wait((made,), timeout=_WAIT_S)
        if not made.done():
            message = f"the {variant.name} is still being made"
            raise ApiError(409, "media_not_ready", message, {"retry-after": str(_RETRY_AFTER_S)})
        return made.result()

    def _started(self, key: tuple[str, ...], make: Callable[[], MediaRecord]) -> Future[MediaRecord]:
        with self._lock:
            if key in self._making:
                return self._making[key]
            if len(self._making) >= _MAX_WAITING:
                message = f"{_MAX_WAITING} pictures or sounds of files are being made; one more is too many"
                raise ApiError(429, "overloaded", message, {"retry-after": str(_RETRY_AFTER_S)})
            future = self._making[key] = self._threads.submit(make)
        future.add_done_callback(lambda _: self._ended(key))
        return future

    def _ended(self, key: tuple[str, ...]) -> None:
        with self._lock:
            del self._making[key]


_MAKER = _Maker()
