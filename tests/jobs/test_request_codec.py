"""Requests survive being stored as JSON and files."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest

from cosmos3_core.errors import RequestError
from cosmos3_core.request import GenerationRequest
from deployments.jobs.job import compute_fingerprint, decode_request, encode_request

IMAGE = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
EVERY_FIELD: dict[str, Any] = {
    "prompt": "a car",
    "mode": "forward_dynamics",
    "image": b"\x89PNG",
    "video": np.stack([IMAGE, IMAGE]),
    "generate_sound": True,
    "actions": [[1.0, 2.5], [3.0, 0.1]],
    "action_chunk_size": 2,
    "domain_name": "av",
    "domain_id": 1,
    "raw_action_dim": 2,
    "resolution_tier": 256,
    "view_point": "ego_view",
    "condition_frame_indexes_vision": (0, 1),
    "condition_video_keep": "last",
    "negative_prompt": "",
    "num_frames": 9,
    "height": 32,
    "width": 64,
    "fps": 12.5,
    "num_inference_steps": 4,
    "guidance_scale": 1.0,
    "guidance_interval": (400.0, 1000.0),
    "flow_shift": 3.0,
    "schedule": "linear",
    "seed": 2**63 - 1,
    "use_system_prompt": False,
    "append_metadata": False,
    "negative_metadata": "none",
    "output": "mp4",
    "output_quality": 50,
    "crf": 20.0,
    "lossless": True,
    "compat": "diffusers",
}


def test_every_field_survives_a_round_trip() -> None:
    assert set(EVERY_FIELD) == {field.name for field in dataclasses.fields(GenerationRequest)} - {"noise"}
    request = GenerationRequest(**EVERY_FIELD)
    values, media = encode_request(request)
    back = decode_request(json.loads(json.dumps(values)), media)
    for name, given in EVERY_FIELD.items():
        found = getattr(back, name)
        if name == "actions":
            np.testing.assert_array_equal(np.float32(found), np.float32(given))
        elif isinstance(given, np.ndarray):
            np.testing.assert_array_equal(found, given)
        elif isinstance(given, tuple):
            assert tuple(found) == given
        else:
            assert found == given, name


def test_omitted_fields_stay_omitted() -> None:
    values, media = encode_request(GenerationRequest(prompt="a"))
    assert (values, media) == ({"prompt": "a"}, {})
    assert decode_request(values, media) == GenerationRequest(prompt="a")


def test_noise_is_not_stored() -> None:
    with pytest.raises(RequestError, match="noise must be .*Generate in process"):
        encode_request(GenerationRequest(prompt="a", noise={}))


def test_fingerprints_tell_requests_apart() -> None:
    def of(**fields: Any) -> str:
        return compute_fingerprint(*encode_request(GenerationRequest(**fields)))

    assert of(prompt="a", seed=1) == of(seed=1, prompt="a")
    different = {
        of(prompt="a"),
        of(prompt="b"),
        of(prompt="a", image=b"1"),
        of(prompt="a", video=b"1"),
        of(prompt="a", image=b"2"),
        of(prompt="a", image=IMAGE),
        of(prompt="a", image=IMAGE.reshape(2, 8, 3)),
        of(prompt="a", image=IMAGE.tobytes()),
    }
    assert len(different) == 8
    values, media = encode_request(GenerationRequest(prompt="a"))
    asked = [{}, {"service_class": "batch"}, {"service_class": "standard"}, {"previews": 1}, {"skip_guardrails": True}]
    assert len({compute_fingerprint(values, media, **how) for how in asked}) == 5
