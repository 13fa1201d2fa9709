"""What is made of a finished clip, such as its thumbnail: a file beside it, with a record as the clip has one.

It is made when somebody asks for the first time, and goes with the clip. Where the directory has the clip, it is there;
else in the archive. Several processes may make it at once: in the directory the first one counts.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from cosmos3_core.errors import MediaError
from deployments.media_folder import passing_folder
from deployments.media_record import DONE, MediaRecord, put_record, read_record
from deployments.media_store import MediaStore

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
        found = read_record(store.directory / record.media_id / variant.record_name)
        return found if found is not None and found.media_id == record.media_id else None
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
        Its record, by which :meth:`deployments.media_store.MediaStore.open` finds its file.

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
    folder = passing_folder(store.directory, "new", record.media_id)
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
