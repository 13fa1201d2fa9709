"""Tensors between processes: bytes, dtype and shape, so that the object store moves them without a copy.

A plain torch tensor would be pickled, 20 times slower at 100 MB, and bfloat16 has no numpy dtype. No torch here: a
process that only forwards an envelope needs none.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class TensorEnvelope:
    """One tensor on its way.

    Attributes:
        data: its bytes, uint8 [n], C order; read-only in the object store.
        dtype: torch's or numpy's name of the element type: "float32", "bfloat16", "uint8".
    """

    data: npt.NDArray[np.uint8]
    dtype: str
    shape: tuple[int, ...]

    @classmethod
    def of_tensor(cls, tensor: torch.Tensor) -> TensorEnvelope:
        """Wrap a torch tensor of any dtype and device; CPU memory is shared, not copied."""
        import torch

        flat = tensor.detach().cpu().contiguous().reshape(-1)
        return cls(flat.view(torch.uint8).numpy(), str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))

    @classmethod
    def of_array(cls, array: npt.NDArray[Any]) -> TensorEnvelope:
        """Wrap a numpy array; memory is shared where it is contiguous."""
        flat = np.ascontiguousarray(array).reshape(-1)
        return cls(flat.view(np.uint8), array.dtype.name, array.shape)

    def tensor(self) -> torch.Tensor:
        """Return the torch tensor, on the CPU, in memory of its own: the store's is read-only."""
        return self.tensor_view().clone()

    def tensor_view(self) -> torch.Tensor:
        """Return the torch tensor, on the CPU, in the bytes' own memory: read-only by contract."""
        import torch

        dtype = getattr(torch, self.dtype)
        if not self.data.size:
            return torch.empty(self.shape, dtype=dtype)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            return torch.from_numpy(self.data).view(dtype).reshape(self.shape)

    def array(self) -> npt.NDArray[Any]:
        """Return the numpy array, a view of :attr:`data`; read-only where that is. Not for bfloat16."""
        return self.data.view(np.dtype(self.dtype)).reshape(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.data.nbytes
