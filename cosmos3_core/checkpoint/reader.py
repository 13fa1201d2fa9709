"""Reads weights by slices: each rank reads its part of each stored tensor straight into the parameter that it fills.

Three steps, each with its errors before the next one starts:

1. :meth:`WeightFiles.open` reads headers only and finds files that are missing, truncated or not safetensors.
2. :func:`check_tensors` compares names and shapes with what the model needs.
3. :func:`load_parameters` allocates the parameters one by one on their device and fills each through a staging buffer
   of a few megabytes, so that host memory never holds a second copy of anything large.

Files are read with plain reads, not memory-mapped: page faults are slow on network filesystems, and a mapped file that
shrinks kills the process, while a read returns an error.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from cosmos3_core.checkpoint.tensors import ParameterPlan, Shape
from cosmos3_core.checkpoint.weight_files import (
    FLOAT_DTYPES,
    TensorEntry,
    WeightFiles,
    refuse_quantised,
    shorten,
)
from cosmos3_core.errors import CorruptFileError, TensorMismatchError
from cosmos3_core.parallel.sharding import WHOLE_MODEL, Shard, Split, split_of

_log = logging.getLogger(__name__)


TORCH_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""torch's types for :data:`FLOAT_DTYPES`."""


@dataclass(frozen=True)
class _Part:
    """The rank's part of one stored tensor: some of its rows, or some columns (dim 1) of all rows."""

    entry: TensorEntry
    rows: slice
    columns: slice | None

    @property
    def shape(self) -> Shape:
        num_rows = self.rows.stop - self.rows.start
        if self.columns is None:
            return (num_rows, *self.entry.shape[1:])
        return (num_rows, self.columns.stop - self.columns.start, *self.entry.shape[2:])


@dataclass(frozen=True)
class _Fill:
    """One parameter to allocate, and the parts that fill it from the top."""

    target: str
    shape: Shape
    dtype: torch.dtype
    parts: tuple[_Part, ...]


def load_parameters(
    module: nn.Module,
    files: WeightFiles,
    plans: Iterable[ParameterPlan],
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    shard: Shard = WHOLE_MODEL,
    split: Callable[[str], Split] = split_of,
) -> None:
    """Fill every parameter of a module that was built on the meta device with this rank's shapes.

    Every fault in names, shapes and types is found before the first allocation. Host memory grows by the parameters
    that live there plus one staging buffer. The module's buffers stay unchanged.

    Args:
        module: its parameters are replaced, with ``requires_grad=False``.
        plans: one for each parameter of the module.
        dtype: floating-point type of the parameters that do not stay fp32.
        shard: the rank's share of the tensors that ``split`` splits.
        split: published name -> how the tensor is split.

    Raises:
        TensorMismatchError: a tensor is missing or not floating-point, a part has another shape than its parameter, or
            plans and parameters do not match one to one.
        CapabilityError: a tensor is quantised to fp8 or less.
        CorruptFileError: a file changed or became unreadable since its header was read.
        RequestError: a tensor cannot be cut into ``shard.num_shards`` equal parts.
    """
    started = time.monotonic()
    device = torch.device(device)
    fills = _resolve(module, files, tuple(plans), dtype, shard, split)
    # In the order of the files: sequential reads are the fast ones.
    fills.sort(key=lambda fill: (fill.parts[0].entry.path, fill.parts[0].entry.begin_byte))
    with _StagedReader(device, [part for fill in fills for part in fill.parts]) as reader:
        for fill in fills:
            parameter = torch.empty(fill.shape, dtype=fill.dtype, device=device)
            row = 0
            for part in fill.parts:
                reader.copy(part, parameter[row : row + part.shape[0]])
                row += part.shape[0]
            replace_parameter(module, fill.target, parameter)
    num_bytes = sum(math.prod(fill.shape) * fill.dtype.itemsize for fill in fills)
    _log.info(
        "%s: %d parameters, %.2f GB on %s, share %d of %d, from %d files in %.1f s",
        files.directory,
        len(fills),
        num_bytes / 1e9,
        device,
        shard.rank + 1,
        shard.num_shards,
        files.num_files,
        time.monotonic() - started,
    )


def _resolve(
    module: nn.Module,
    files: WeightFiles,
    plans: tuple[ParameterPlan, ...],
    dtype: torch.dtype,
    shard: Shard,
    split: Callable[[str], Split],
) -> list[_Fill]:
    """Find and cut the parts of each plan, and compare them with the module."""
    parameters = dict(module.named_parameters())
    targets = [plan.target for plan in plans]
    for problem, names in (
        ("module parameters without a plan", parameters.keys() - set(targets)),
        ("plans for parameters that the module lacks", set(targets) - parameters.keys()),
        ("parameters with several plans", {target for target, count in Counter(targets).items() if count > 1}),
    ):
        if names:
            raise TensorMismatchError(files.directory, f"{len(names)} {problem}: {shorten(sorted(names))}")
    missing = [name for plan in plans for name in plan.sources if name not in files.tensors]
    if missing:
        raise TensorMismatchError(
            files.directory, f"{len(missing)} tensors are missing: {shorten(missing)}", "Download the component again."
        )
    fills = []
    for plan in plans:
        entries = tuple(files.tensors[name] for name in plan.sources)
        _check_floating(entries)
        target_dtype = torch.float32 if plan.is_fp32 else dtype
        assert target_dtype.is_floating_point, f"{plan.target}: weights convert between floating-point types only"
        parts = tuple(_cut(entry, shard, split(entry.name)) for entry in entries)
        needed = tuple(parameters[plan.target].shape)
        found = _stack_shapes(parts)
        if found != needed:
            raise TensorMismatchError(
                files.directory,
                f"{plan.target} of rank {shard.rank} of {shard.num_shards} is {list(needed)}, but its part of "
                f"{shorten([str(entry) for entry in entries])} is {'unstackable' if found is None else list(found)}",
                "Check that config.json and the weights are of the same checkpoint.",
            )
        fills.append(_Fill(plan.target, needed, target_dtype, parts))
    return fills


def _check_floating(entries: Iterable[TensorEntry]) -> None:
    refuse_quantised(entries)
    for entry in entries:
        if entry.dtype not in FLOAT_DTYPES:
            raise TensorMismatchError(
                entry.path,
                f"{entry.stored_name} is {entry.dtype}, a floating-point type is needed",
                "Download the file again.",
            )
        if not entry.shape:
            raise TensorMismatchError(
                entry.path, f"{entry.stored_name} is a scalar, no parameter is", "Download the file again."
            )


def _cut(entry: TensorEntry, shard: Shard, split: Split) -> _Part:
    if split is Split.COLUMN:
        return _Part(entry, shard.slice(entry.shape[0], entry.name), None)
    if split is Split.ROW and len(entry.shape) > 1:
        return _Part(entry, slice(0, entry.shape[0]), shard.slice(entry.shape[1], entry.name))
    # Replicated, as is a row-split layer's bias: its one axis has no inputs to cut.
    return _Part(entry, slice(0, entry.shape[0]), None)


def _stack_shapes(parts: tuple[_Part, ...]) -> Shape | None:
    """Return the shape of the stacked parts; None if their rows differ in shape."""
    row_shapes = {part.shape[1:] for part in parts}
    if len(row_shapes) != 1:
        return None
    return (sum(part.shape[0] for part in parts), *row_shapes.pop())


def replace_parameter(module: nn.Module, name: str, value: Tensor) -> None:
    """Replace a parameter of a module, by its dotted name."""
    owner_name, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner_name), leaf, nn.Parameter(value, requires_grad=False))


class _StagedReader:
    """Copies parts of stored tensors into tensors on a device through one staging buffer in host memory.

    Reads whole rows, even if only some of their columns are needed: those runs are a few kilobytes, and skipping
    between them saves no disk page. Cutting and conversion happen on the device.
    """

    STAGING_BYTES = 32 * 2**20

    def __init__(self, device: torch.device, parts: Collection[_Part]) -> None:
        """Allocate a buffer for ``parts``: at least one row of each, and no more than all of them need."""
        largest_row = max((_row_bytes(part) for part in parts), default=0)
        largest_part = max((_row_bytes(part) * part.shape[0] for part in parts), default=0)
        num_bytes = max(largest_row, min(largest_part, self.STAGING_BYTES))
        # Pinned if a GPU copies from it: several times as fast.
        self._staging = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self._staging_memory = self._staging.numpy().data
        self._files: dict[Path, io.FileIO] = {}
        self._closing = contextlib.ExitStack()

    def __enter__(self) -> _StagedReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    def copy(self, part: _Part, target: Tensor) -> None:
        """Fill ``target``, of the part's shape, and convert to its dtype."""
        row_bytes = _row_bytes(part)
        if row_bytes == 0:
            return
        entry, num_rows = part.entry, part.shape[0]
        rows_at_once = len(self._staging_memory) // row_bytes
        for row in range(0, num_rows, rows_at_once):
            end = min(row + rows_at_once, num_rows)
            self._read(entry, entry.begin_byte + (part.rows.start + row) * row_bytes, (end - row) * row_bytes)
            staged = self._staging[: (end - row) * row_bytes].view(TORCH_DTYPES[entry.dtype])
            rows = staged.view(end - row, *entry.shape[1:]).to(target.device)
            target[row:end].copy_(rows if part.columns is None else rows[:, part.columns])

    def _read(self, entry: TensorEntry, begin: int, num_bytes: int) -> None:
        """Fill the start of the staging buffer from the file."""
        try:
            file = self._files.get(entry.path)
            if file is None:
                file = self._files[entry.path] = self._closing.enter_context(entry.path.open("rb", buffering=0))
            file.seek(begin)
            done = 0
            while done < num_bytes:
                num_read = file.readinto(self._staging_memory[done:num_bytes])
                if not num_read:
                    raise CorruptFileError(
                        entry.path,
                        f"shrank to {file.seek(0, 2)} bytes since it was opened and lacks part of {entry.stored_name}",
                        "Download the file again.",
                    )
                done += num_read
        except OSError as error:
            raise CorruptFileError(
                entry.path, f"{entry.stored_name} cannot be read ({error.strerror})", "Check the disk or the mount."
            ) from None


def _row_bytes(part: _Part) -> int:
    """Return the bytes of one whole stored row."""
    return part.entry.num_bytes // part.entry.shape[0] if part.entry.shape[0] else 0
