"""What else can be had of a finished file: a thumbnail, a sheet of its frames, its sound. Made once, then kept."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import MappingProxyType

from starlette.responses import Response

from cosmos3_core.media.sound_track import NoSoundTrack, write_sound_track
from cosmos3_core.media.thumbnail import write_spritesheet, write_thumbnail
from deployments.api.content import finished_answer, found_record, not_ready
from deployments.api.errors import Refusal, error_response
from deployments.media_record import DONE, MediaRecord
from deployments.media_store import MediaStore
from deployments.media_variant import Variant, find_variant, make_variant

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
VARIANTS = tuple(_VARIANTS)
"""What can be asked for, beside the file itself."""

_MAX_AT_ONCE = 2
_MAX_WAITING = 32
_WAIT_S = 60.0
_RETRY_AFTER_S = 5


async def variant_answer(
    media: MediaStore, media_id: str, variant: str, method: str, headers: Mapping[str, str]
) -> Response:
    """A variant of a finished file, given as :func:`deployments.api.content.content_answer` gives finished files.

    Args:
        media: where the file is.
        media_id: of the file.
        variant: one of :data:`VARIANTS`.
        method: GET or HEAD.
        headers: of the request, by lower-case names.

    Raises:
        MediaError: it cannot be made of this file, or not be written or read.
    """
    try:
        record = await asyncio.to_thread(found_record, media, media_id)
        if record.state != DONE:
            raise not_ready()
        return finished_answer(media, await made_variant(media, record, variant), method, headers)
    except Refusal as refusal:
        return error_response(refusal)


async def made_variant(media: MediaStore, record: MediaRecord, name: str) -> MediaRecord:
    """The record of a variant's file, which is made if it is not there.

    Args:
        media: where the file is.
        record: of the file, which is done.
        name: one of :data:`VARIANTS`.

    Raises:
        Refusal: there is no such variant of this file, or not yet.
        MediaError: it cannot be made, or not be written or read.
    """
    if name == _AUDIO and record.media_type == _WAV:
        return record
    variant, media_types = _VARIANTS.get(name, (None, frozenset[str]()))
    if variant is None or record.media_type not in media_types:
        raise Refusal(404, "no_such_variant", f"a file of type {record.media_type} has no such variant")
    if found := await asyncio.to_thread(find_variant, media, record, variant):
        return found
    try:
        return await _MAKER.made(media, record, variant)
    except FileNotFoundError:
        raise Refusal(404, "no_such_media", "this file was removed just now") from None
    except NoSoundTrack:
        raise Refusal(404, "no_such_variant", "this file has no sound") from None


class _Maker:
    """Makes variants in threads of its own: a few at once, each for all who ask for it meanwhile."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(_MAX_AT_ONCE, thread_name_prefix="variants")
        self._lock = threading.Lock()  # it may be asked in several event loops
        self._making: dict[tuple[str, ...], Future[MediaRecord]] = {}

    async def made(self, media: MediaStore, record: MediaRecord, variant: Variant) -> MediaRecord:
        """Of the file. Who leaves meanwhile stops nothing: the next one to ask finds it.

        Raises:
            Refusal: too many are waited for, or it takes long.
            Exception: as :func:`make_variant`.
        """
        key = (str(media.directory), record.media_id, variant.name)
        made = asyncio.wrap_future(self._started(key, lambda: make_variant(media, record, variant)))
        made.add_done_callback(lambda future: future.cancelled() or future.exception())  # nobody may be there any more
        await asyncio.wait((made,), timeout=_WAIT_S)
        if not made.done():
            message = f"the {variant.name} is still being made"
            raise Refusal(409, "media_not_ready", message, {"retry-after": str(_RETRY_AFTER_S)})
        return made.result()

    def _started(self, key: tuple[str, ...], make: Callable[[], MediaRecord]) -> Future[MediaRecord]:
        with self._lock:
            if key in self._making:
                return self._making[key]
            if len(self._making) >= _MAX_WAITING:
                message = f"{_MAX_WAITING} pictures or sounds of files are being made; one more is too many"
                raise Refusal(429, "overloaded", message, {"retry-after": str(_RETRY_AFTER_S)})
            future = self._making[key] = self._threads.submit(make)
        future.add_done_callback(lambda _: self._ended(key))
        return future

    def _ended(self, key: tuple[str, ...]) -> None:
        with self._lock:
            del self._making[key]


_MAKER = _Maker()
