"""One mode by handle and over HTTP against one process, for the app on Ray and for the one in process."""

from __future__ import annotations

import base64
import json
from typing import Any

import httpx2
import numpy as np

from cosmos3_core.conditioning.modes import MODES
from cosmos3_core.request import GenerationRequest
from deployments.clients.http_transport import make_body
from tests.core_reference import Reference
from tests.mode_inputs import MINIMAL, mp4


def check_mode(mode: str, app: Any, reference: Reference) -> None:
    """Assert that file, frames and actions are those of one process."""
    fields: dict[str, Any] = {**MINIMAL[mode], "num_inference_steps": 2}
    if "video" in fields:
        fields["video"] = mp4()
    if MODES[mode].has_actions:
        fields["action_chunk_size"] = 4
    else:
        fields |= {"height": 32, "width": 48, "num_frames": 1 if MODES[mode].is_image else 13}
    request = GenerationRequest(**fields)
    alone = reference(request)
    expected = b"" if alone.path is None else alone.path.read_bytes()

    generated = app.client.generate(request)
    assert generated.info.mode == mode
    assert generated.media == expected
    assert generated.info.frames_sha256 == alone.frames_sha256
    answer = httpx2.post(f"{app.url}/v1/videos/sync", json=make_body(request), timeout=100)
    assert answer.headers["x-mode"] == mode
    if alone.actions is None:
        assert generated.info.actions is None
        assert answer.content == expected
        return
    assert generated.info.actions is not None
    assert np.array_equal(generated.info.actions.values, alone.actions.values)
    said = json.loads(answer.content)
    assert said["actions"] == alone.actions.as_json()
    assert (said["video"] and base64.b64decode(said["video"]["b64_json"])) == (expected or None)
