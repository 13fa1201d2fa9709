"""Checkpoints on the Hugging Face hub: found in its local cache, or downloaded, hashes checked. No torch here.

Endpoint, cache and token are those of ``huggingface_hub``, which reads ``HF_ENDPOINT``, ``HF_HUB_CACHE`` and others.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cosmos3_core.errors import CheckpointError, CorruptFileError, MissingFileError, RequestError

DOWNLOAD_HINT = (
    "`cosmos3 download OWNER/NAME` fetches a whole checkpoint; `cosmos3 tiny-checkpoint DIR` makes a small random one."
)
"""Advice for errors about a checkpoint: the commands that make a whole one."""

_NAME = re.compile(r"(?P<repository>(?:\w[\w.-]*/)?\w[\w.-]*)(?:@(?P<revision>\w[\w./-]*))?")
# The files that CheckpointLayout, WeightFiles and the tokenizer read. No name leaves its folder, and none is a pickle.
_FILE_NAME = r"\w[\w.-]*"
_LAYOUT_FILE = re.compile(
    r"model_index\.json|assets/negative_prompt\.json|scheduler/scheduler_config\.json"
    rf"|(transformer|vae|sound_tokenizer)/(config\.json|{_FILE_NAME}\.safetensors(\.index\.json)?)"
    rf"|text_tokenizer/{_FILE_NAME}\.(json|txt|jinja)"
)
_ANSWER_S = 30.0
# What is not whole when the command is killed is fetched again: gigabytes each. One file fills a line.
_FILES_AT_ONCE = 2
_BLOCK_BYTES = 1 << 20
_INDEX = "model_index.json"


@dataclass(frozen=True)
class HubModel:
    """A repository's name, and a revision: branch, tag or commit."""

    repository: str
    revision: str = "main"

    @classmethod
    def parse(cls, text: str) -> HubModel:
        """Read ``OWNER/NAME`` or ``OWNER/NAME@REVISION``; raise RequestError for anything else."""
        found = _NAME.fullmatch(text)
        if found is None or "/" not in found["repository"]:
            raise RequestError("model", text, "OWNER/NAME or OWNER/NAME@REVISION, such as nvidia/Cosmos3-Nano")
        return cls(found["repository"], found["revision"] or "main")

    def __str__(self) -> str:
        return self.repository if self.revision == "main" else f"{self.repository}@{self.revision}"


def find_cached(text: str) -> Path | None:
    """Find a checkpoint in the local cache by ``OWNER/NAME`` or ``NAME``, each with ``@REVISION`` or without.

    Raises:
        CheckpointError: several owners have a repository of that name.
    """
    from huggingface_hub import constants, try_to_load_from_cache

    found = _NAME.fullmatch(text)
    if found is None:
        return None
    repository, revision = found["repository"], found["revision"]
    if "/" not in repository:
        folders = sorted(Path(constants.HF_HUB_CACHE).glob(f"models--*--{repository}"))
        owned = [folder.name.removeprefix("models--").replace("--", "/", 1) for folder in folders]
        if len(owned) > 1:
            raise CheckpointError(text, f"the local cache has {' and '.join(owned)}", "Name one with its owner.")
        if not owned:
            return None
        repository = owned[0]
    index = try_to_load_from_cache(repository, _INDEX, revision=revision)
    return Path(index).parent if isinstance(index, str) else None


def find_snapshot(folder: Path) -> Path | None:
    """Find the checkpoint in a folder of the cache (``models--OWNER--NAME``): its main revision, else its only one."""
    snapshots = folder / "snapshots"
    if not folder.name.startswith("models--") or not snapshots.is_dir():
        return None
    main = folder / "refs" / "main"
    if main.is_file() and (snapshots / main.read_text().strip()).is_dir():
        return snapshots / main.read_text().strip()
    present = [path for path in snapshots.iterdir() if path.is_dir()]
    return present[0] if len(present) == 1 else None


@dataclass(frozen=True)
class _HubFile:
    """A file of a repository; its hash is that of the bytes, or git's of a blob for small files."""

    name: str
    num_bytes: int
    sha256: str | None
    git_sha1: str | None

    def has_hash_of(self, path: Path) -> bool:
        digest = hashlib.sha256() if self.sha256 else hashlib.sha1(b"blob %d\0" % self.num_bytes)
        with path.open("rb") as file:
            while block := file.read(_BLOCK_BYTES):
                digest.update(block)
        return digest.hexdigest() == (self.sha256 or self.git_sha1)


def download(model: HubModel, local_directory: Path | None = None, report: Callable[[str], None] = print) -> Path:
    """Download a checkpoint into the local cache, or into ``local_directory``; return its directory.

    Says the size and the licence first. Only files that a checkpoint's layout names are fetched. Whole files of an
    earlier call are not fetched again. A file whose hash is wrong is removed.

    Raises:
        CheckpointError: there is no such repository or revision, access to it has to be asked for, it holds another
            kind of model, it cannot be reached, or a file has another hash.
        RequestError: the disk has no room.
    """
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        info = HfApi().model_info(model.repository, revision=model.revision, files_metadata=True, timeout=_ANSWER_S)
    except Exception as error:  # noqa: BLE001 - of several HTTP libraries
        raise _explain(model, error) from None
    files = _choose_files(model, info.siblings or [])
    root = local_directory or Path(constants.HF_HUB_CACHE)
    missing = [file for file in files if _find_file(model, info.sha, local_directory, file) is None]
    licence = getattr(info.card_data, "license_name", None) or getattr(info.card_data, "license", None) or "not stated"
    report(
        f"{model} at {info.sha}: {_sum_gb(files):.2f} GB in {len(files)} files, {_sum_gb(missing):.2f} GB of them to "
        f"fetch into {root}; licence: {licence}"
    )
    _check_room(root, sum(file.num_bytes for file in missing))
    try:
        directory = Path(
            snapshot_download(
                model.repository,
                revision=info.sha,
                local_dir=local_directory,
                allow_patterns=[file.name for file in files],
                max_workers=_FILES_AT_ONCE,
            )
        )
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise _explain(model, error) from None
    report("comparing hashes ...")
    for file in files:
        path = directory / file.name
        if not file.has_hash_of(path):
            path.resolve().unlink()  # the cache's own copy, to which the snapshot links
            path.unlink(missing_ok=True)
            raise CorruptFileError(path, "has another hash than the hub states", "Run the command again.")
    if local_directory is None and model.revision != info.sha:
        _note_revision(directory, model.revision)
    return directory


def _choose_files(model: HubModel, siblings: Sequence[object]) -> list[_HubFile]:
    files = []
    for sibling in siblings:
        name, lfs = getattr(sibling, "rfilename", ""), getattr(sibling, "lfs", None)
        if _LAYOUT_FILE.fullmatch(name):
            num_bytes, sha256 = getattr(sibling, "size", None) or 0, lfs.sha256 if lfs else None
            files.append(_HubFile(name, num_bytes, sha256, getattr(sibling, "blob_id", None)))
    if not any(file.name == _INDEX for file in files):
        hint = "This is not a Cosmos3 checkpoint in the diffusers layout; other layouts may lie on another revision."
        raise MissingFileError(str(model), f"has no {_INDEX}", hint)
    return files


def _find_file(model: HubModel, commit: str | None, local_directory: Path | None, file: _HubFile) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    if local_directory is not None:
        path = local_directory / file.name
        return path if path.is_file() and path.stat().st_size == file.num_bytes else None
    cached = try_to_load_from_cache(model.repository, file.name, revision=commit)
    return Path(cached) if isinstance(cached, str) else None


def _sum_gb(files: Sequence[_HubFile]) -> float:
    return sum(file.num_bytes for file in files) / 1e9


def _check_room(root: Path, num_bytes: int) -> None:
    existing = next(path for path in (root.absolute(), *root.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if num_bytes > free:
        hint = "Free some, or choose another disk with --local-dir or HF_HUB_CACHE."
        raise RequestError(
            "local_dir", str(root), f"on a disk with {num_bytes / 1e9:.2f} GB free", f"{free / 1e9:.2f} GB are. {hint}"
        )


def _note_revision(snapshot: Path, revision: str) -> None:
    """Let the cache know a branch or tag: files were asked for by their commit, so that all are of one."""
    ref = snapshot.parent.parent / "refs" / revision
    ref.parent.mkdir(parents=True, exist_ok=True)
    ref.write_text(snapshot.name)


def _explain(model: HubModel, error: Exception) -> CheckpointError:
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    page = f"{constants.ENDPOINT}/{model.repository}"
    if isinstance(error, GatedRepoError):
        return CheckpointError(
            str(model), "its owner asks for consent", f"Accept the terms at {page}, then log in with `hf auth login`."
        )
    if isinstance(error, RepositoryNotFoundError):
        return MissingFileError(
            str(model), f"no such repository at {constants.ENDPOINT}", "A private one needs `hf auth login`."
        )
    if isinstance(error, RevisionNotFoundError):
        return MissingFileError(str(model), f"{model.repository} has no such revision", f"{page} lists them.")
    reason = " ".join(str(error).split()) or type(error).__name__
    return CheckpointError(
        str(model), f"cannot be downloaded: {reason}", "Run the command again: it goes on where it was."
    )


def main(arguments: Sequence[str] | None = None, program: str = "cosmos3 download") -> int:
    """Download what the command line names; return the exit status."""
    parser = argparse.ArgumentParser(
        prog=program, description="Download a checkpoint from the Hugging Face hub, or go on with an earlier try."
    )
    parser.add_argument("model", metavar="MODEL[@REVISION]", help="such as nvidia/Cosmos3-Nano")
    parser.add_argument("--local-dir", type=Path, metavar="DIR", help="default: the hub's cache, where MODEL finds it")
    options = parser.parse_args(arguments)
    directory = download(HubModel.parse(options.model), options.local_dir)
    print(f"{directory}\n  cosmos3 serve {options.local_dir or options.model}")
    return 0
