"""Tensors as bytes, dtype and shape."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from cluster.envelope import TensorEnvelope


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.int64], ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 4), (1,), (), (0, 3)], ids=str)
def test_a_tensor_survives_a_round_trip(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = (torch.rand(shape) * 100).to(dtype)
    envelope = pickle.loads(pickle.dumps(TensorEnvelope.of_tensor(tensor), protocol=5))
    assert envelope.shape == shape
    assert envelope.num_bytes == tensor.numel() * tensor.element_size()
    back = envelope.tensor()
    assert back.dtype == dtype
    assert torch.equal(back, tensor)


def test_a_strided_tensor_is_made_contiguous() -> None:
    tensor = torch.arange(12.0).view(3, 4).T
    assert torch.equal(TensorEnvelope.of_tensor(tensor).tensor(), tensor)


def test_wrapping_does_not_copy_and_unwrapping_does() -> None:
    tensor = torch.zeros(4)
    envelope = TensorEnvelope.of_tensor(tensor)
    tensor[0] = 5
    assert envelope.tensor()[0] == 5
    back = envelope.tensor()
    back[1] = 7
    assert tensor[1] == 0


def test_a_read_only_array_of_the_object_store_is_unwrapped() -> None:
    data = np.frombuffer(np.arange(4, dtype=np.float32).tobytes(), np.uint8)
    assert not data.flags.writeable
    envelope = TensorEnvelope(data, "float32", (2, 2))
    assert envelope.array().tolist() == [[0, 1], [2, 3]]
    envelope.tensor().add_(1)
    assert envelope.array()[0, 0] == 0
    borrowed = envelope.tensor_view()
    assert borrowed.tolist() == [[0, 1], [2, 3]]
    assert borrowed.data_ptr() == data.ctypes.data


def test_arrays_survive_a_round_trip() -> None:
    frames = np.arange(24, dtype=np.uint8).reshape(2, 2, 2, 3)
    envelope = TensorEnvelope.of_array(frames[:, ::-1])
    assert np.array_equal(envelope.array(), frames[:, ::-1])
