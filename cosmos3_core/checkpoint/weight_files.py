"""The safetensors files of one component: finds them, reads their headers and compares those with the model's needs.

Nothing here reads a tensor, allocates anything large or unpickles: reading a pickle runs code. No torch here.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import logging
import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cosmos3_core.checkpoint.aliases import find_published_name
from cosmos3_core.checkpoint.configs import read_json_object
from cosmos3_core.checkpoint.tensors import Shape
from cosmos3_core.errors import CapabilityError, CorruptFileError, MissingFileError, TensorMismatchError

_log = logging.getLogger(__name__)

_STEMS = ("diffusion_pytorch_model", "model")  # the second is the name in older sound_tokenizer exports
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
_PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")  # torch's zip; bare protocols 2-5
_MAX_SHOWN = 8
_AGAIN = "Download the file again."

FLOAT_DTYPES = frozenset({"F64", "F32", "F16", "BF16"})
"""safetensors' codes of the floating-point types that weights may have."""
_QUANTISED_BITS = {
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4
}  # fmt: skip
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64, "C64": 64,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, **_QUANTISED_BITS
}  # fmt: skip


@dataclass(frozen=True)
class TensorEntry:
    """The place of one stored tensor.

    Attributes:
        name: published name.
        stored_name: name in the file; differs from ``name`` if the file uses an alias.
        path: the file.
        dtype: safetensors' code for the element type: "BF16", "F32", ...
        shape: shape of the whole tensor.
        begin_byte: offset of the first byte in the file.
        num_bytes: bytes of the whole tensor.
    """

    name: str
    stored_name: str
    path: Path
    dtype: str
    shape: Shape
    begin_byte: int
    num_bytes: int

    def __str__(self) -> str:
        alias = "" if self.name == self.stored_name else f" (stored as {self.stored_name})"
        return f"{self.name}{alias} {list(self.shape)} in {self.path.name}"


@dataclass(frozen=True)
class WeightFiles:
    """The safetensors files of one component, headers read.

    Attributes:
        directory: the component's directory.
        tensors: published name -> place in the files.
    """

    directory: Path
    tensors: Mapping[str, TensorEntry]

    @classmethod
    def open(cls, component_dir: Path) -> WeightFiles:
        """Find a component's weights and read their headers.

        Looks for ``diffusion_pytorch_model.safetensors.index.json`` and its shards, then for the single
        ``diffusion_pytorch_model.safetensors``, then for both under the name ``model``.

        Raises:
            MissingFileError: there are no weights, or a shard of the index is missing.
            CorruptFileError: a file is truncated or not safetensors: a pickle, a git-lfs pointer.
            TensorMismatchError: index and shards list different tensors, or a tensor occurs under two names.
        """
        for stem in _STEMS:
            index_path = component_dir / f"{stem}.safetensors.index.json"
            if index_path.is_file():
                return cls(component_dir, _by_published_name(component_dir, _read_shards(index_path)))
            single_path = component_dir / f"{stem}.safetensors"
            if single_path.is_file():
                return cls(component_dir, _by_published_name(component_dir, _read_header(single_path)))
        raise _no_weights(component_dir)

    @property
    def dtype(self) -> str:
        """safetensors' code of the floating-point type that most of the stored bytes have.

        Raises:
            CapabilityError: the weights are quantised to fp8 or less.
            TensorMismatchError: no tensor has a floating-point type.
        """
        refuse_quantised(self.tensors.values())
        num_bytes: Counter[str] = Counter()
        for entry in self.tensors.values():
            if entry.dtype in FLOAT_DTYPES:
                num_bytes[entry.dtype] += entry.num_bytes
        if not num_bytes:
            raise TensorMismatchError(self.directory, "the weights hold no floating-point tensor", _AGAIN)
        return num_bytes.most_common(1)[0][0]

    @property
    def num_files(self) -> int:
        """Number of files that hold tensors."""
        return len({entry.path for entry in self.tensors.values()})


def _no_weights(directory: Path) -> MissingFileError | CorruptFileError:
    for path in sorted(directory.glob("*")):
        if path.suffix in _PICKLE_SUFFIXES:
            return CorruptFileError(
                path,
                "weights as a pickle, which is never opened because reading it can run code",
                "Download the safetensors files of the component, or convert this one with safetensors' save_file.",
            )
    others = sorted(path.name for path in directory.glob("*.safetensors"))
    return MissingFileError(
        directory / f"{_STEMS[0]}.safetensors",
        "no such file, nor an index of shards beside it",
        f"Download the component's weights, the index included; there are {shorten(others) or 'no safetensors files'}.",
    )


def _read_shards(index_path: Path) -> list[TensorEntry]:
    """Read the entries of the shards that an index lists."""
    weight_map = read_json_object(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CorruptFileError(index_path, "has no weight_map from tensor names to files", _AGAIN)
    listed: dict[str, set[str]] = {}
    for name, filename in weight_map.items():
        # Only a plain file name: an index must not lead out of its directory.
        if not isinstance(filename, str) or Path(filename).name != filename:
            raise CorruptFileError(index_path, f"weight_map sends {name} to {filename!r}, not a file beside it", _AGAIN)
        listed.setdefault(filename, set()).add(name)

    paths = {filename: index_path.parent / filename for filename in sorted(listed)}
    missing = [filename for filename, path in paths.items() if not path.is_file()]
    if missing:
        raise MissingFileError(
            paths[missing[0]],
            f"no such file, though {index_path.name} lists it ({len(missing)} of {len(paths)} shards missing: "
            f"{shorten(missing)})",
            "Download the missing shards.",
        )
    entries: list[TensorEntry] = []
    for filename, path in paths.items():
        shard = _read_header(path)
        stored = {entry.stored_name for entry in shard}
        for problem, names in (
            (f"lacks tensors that {index_path.name} says it holds", listed[filename] - stored),
            (f"holds tensors that {index_path.name} does not list for it", stored - listed[filename]),
        ):
            if names:
                raise TensorMismatchError(
                    path,
                    f"{problem}: {shorten(sorted(names))}",
                    "Index and shard are from different versions; download both again.",
                )
        entries += shard
    return entries


def _by_published_name(directory: Path, entries: Iterable[TensorEntry]) -> dict[str, TensorEntry]:
    tensors: dict[str, TensorEntry] = {}
    ignored: list[str] = []
    for entry in entries:
        name = find_published_name(entry.stored_name)
        if name is None:
            ignored.append(entry.stored_name)
        elif name in tensors:
            other = tensors[name]
            raise TensorMismatchError(
                directory,
                f"{name} occurs twice: as {other.stored_name} in {other.path.name} and as {entry.stored_name} in "
                f"{entry.path.name}",
                "Remove one of the two; the files do not say which one is current.",
            )
        else:
            tensors[name] = dataclasses.replace(entry, name=name)
    if ignored:
        _log.info("%s: left unread, no model uses them: %s", directory, shorten(ignored))
    return tensors


# --- one header: 8 bytes of length, little endian; so many bytes of JSON; then the tensors' bytes ---------------------

_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit


def _read_header(path: Path) -> list[TensorEntry]:
    """Read the header of one file, which must hold every byte that its header states."""
    try:
        with path.open("rb") as file:
            num_file_bytes = file.seek(0, 2)
            file.seek(0)
            start = file.read(_LENGTH_BYTES + 1)
            header_bytes = int.from_bytes(start[:_LENGTH_BYTES], "little")
            if len(start) <= _LENGTH_BYTES or start[-1:] != b"{" or header_bytes > _MAX_HEADER_BYTES:
                raise _not_safetensors(path, start, num_file_bytes)
            data_begin = _LENGTH_BYTES + header_bytes
            if data_begin > num_file_bytes:
                raise CorruptFileError(
                    path, f"truncated: the header alone needs {data_begin} bytes, the file has {num_file_bytes}", _AGAIN
                )
            file.seek(_LENGTH_BYTES)
            text = file.read(header_bytes)
    except OSError as error:
        raise CorruptFileError(path, f"cannot be read ({error.strerror})") from None
    try:
        header = json.loads(text, object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(path, f"the safetensors header is not valid JSON: {error}", _AGAIN) from None
    header.pop("__metadata__", None)
    entries = [_entry(path, name, fields, data_begin) for name, fields in header.items()]
    _check_extents(path, entries, data_begin, num_file_bytes)
    return entries


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        raise ValueError("a name appears twice")
    return unique


def _not_safetensors(path: Path, start: bytes, num_file_bytes: int) -> CorruptFileError:
    if start.startswith(_PICKLE_STARTS):
        return CorruptFileError(
            path,
            "a PyTorch pickle under a safetensors name, which is never opened because reading it can run code",
            "Download the safetensors file.",
        )
    if start.startswith(b"version "):
        return CorruptFileError(path, "a git-lfs pointer, not the weights", "Run `git lfs pull` in the checkpoint.")
    if num_file_bytes <= _LENGTH_BYTES:
        return CorruptFileError(path, f"truncated: the file has {num_file_bytes} bytes", _AGAIN)
    return CorruptFileError(path, "not a safetensors file", _AGAIN)


def _entry(path: Path, stored_name: str, fields: Any, data_begin: int) -> TensorEntry:
    """Return one entry of the header, under its stored name."""
    try:
        dtype, shape, (begin, end) = fields["dtype"], tuple(fields["shape"]), fields["data_offsets"]
        is_sound = all(isinstance(number, int) and number >= 0 for number in (*shape, begin, end))
        is_sound = is_sound and isinstance(dtype, str) and begin <= end
    except (KeyError, TypeError, ValueError):
        is_sound = False
    if not is_sound:
        raise CorruptFileError(path, f"the header's line for {stored_name} is damaged", _AGAIN)
    if dtype not in _BITS:
        raise CorruptFileError(path, f"{stored_name} has the unknown element type {dtype!r}")
    if math.prod(shape) * _BITS[dtype] != (end - begin) * 8:
        raise CorruptFileError(
            path, f"{stored_name} is {dtype} {list(shape)}, which does not fit its {end - begin} bytes", _AGAIN
        )
    return TensorEntry(stored_name, stored_name, path, dtype, shape, data_begin + begin, end - begin)


def _check_extents(path: Path, entries: Iterable[TensorEntry], data_begin: int, num_file_bytes: int) -> None:
    """Refuse tensors with gaps or overlaps between the header's end and the file's."""
    end = data_begin
    for entry in sorted(entries, key=lambda entry: (entry.begin_byte, entry.num_bytes)):
        if entry.begin_byte != end:
            raise CorruptFileError(path, f"{entry.stored_name} does not begin where the tensor before it ends", _AGAIN)
        end = entry.begin_byte + entry.num_bytes
        if end > num_file_bytes:
            raise CorruptFileError(
                path,
                f"truncated: {entry.stored_name} ends at byte {end}, the file has {num_file_bytes}",
                _AGAIN,
            )
    if end != num_file_bytes:
        raise CorruptFileError(path, f"has {num_file_bytes - end} bytes that its header does not name", _AGAIN)


# --- names and shapes -------------------------------------------------------------------------------------------------


def check_tensors(files: WeightFiles, expected: Mapping[str, Shape], *, optional: Collection[str] = ()) -> None:
    """Compare the stored tensors with those that a model needs.

    Args:
        expected: published name -> shape of the whole tensor.
        optional: names or shell patterns, such as ``encoder.*``, that may be missing or unexpected. The shape of a
            tensor that is both expected and stored is checked all the same.

    Raises:
        TensorMismatchError: tensors are missing, unknown or have another shape; lists the first few of each.
        CapabilityError: the weights are quantised to fp8 or less.
    """
    refuse_quantised(files.tensors.values())
    stored = files.tensors
    missing = [
        f"{name} {list(shape)}"
        for name, shape in expected.items()
        if name not in stored and not _matches(name, optional)
    ]
    unexpected = [str(entry) for name, entry in stored.items() if name not in expected and not _matches(name, optional)]
    misshapen = [
        f"{stored[name]}, not {list(shape)}"
        for name, shape in expected.items()
        if name in stored and stored[name].shape != tuple(shape)
    ]
    problems = [
        f"{len(found)} {what}: {shorten(found)}"
        for what, found in (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen))
        if found
    ]
    if problems:
        raise TensorMismatchError(
            files.directory,
            f"the weights are not those of this config. {'. '.join(problems)}",
            "Check that config.json and the weights are of the same checkpoint, then download the component again.",
        )


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def refuse_quantised(entries: Iterable[TensorEntry]) -> None:
    """Refuse tensors of fp8 or smaller.

    Raises:
        CapabilityError: one is.
    """
    quantised = [entry for entry in entries if entry.dtype in _QUANTISED_BITS]
    if quantised:
        raise CapabilityError(
            "checkpoint",
            f"{quantised[0]} is {quantised[0].dtype}",
            "weights in bf16, fp16, fp32 or fp64",
            f"quantised checkpoints are not supported yet ({quantised[0].path}, {len(quantised)} such tensors); "
            "download the unquantised revision",
        )


def shorten(items: Sequence[str]) -> str:
    """Return the first few of the items, and how many more there are."""
    more = len(items) - _MAX_SHOWN
    return "; ".join(items[:_MAX_SHOWN]) + (f" and {more} more" if more > 0 else "")
