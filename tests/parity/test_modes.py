"""Every mode, from what a user gives to frames, sound and actions: equal to diffusers, checkpoint and noise alike."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from cosmos3_core.conditioning.modes import MODES
from cosmos3_core.denoise_request import DenoiseRequest
from cosmos3_core.denoiser import DenoisePlan
from cosmos3_core.engine import Engine
from cosmos3_core.generate import GenerationResult, generate
from cosmos3_core.media.pixels import Frames, to_uint8
from cosmos3_core.model.rope import after_text, text_positions
from cosmos3_core.request import GenerationRequest
from cosmos3_core.resolve import find_offered_modes, resolve

TOLERANCE = 1e-5  # relative L2, fp32
PROMPT = "A red car drives along the coast."


@dataclass(frozen=True)
class Case:
    """One request.

    Attributes:
        name: of the case.
        mode: a row of the table.
        variant: of the tiny checkpoint.
        source: what is given: (rows, columns) of an image, (frames, rows, columns) of a clip.
        as_file: ours gets it as the bytes of a file.
        shape: frames, rows and columns; not for actions.
        chosen: of video to video: what both pipelines call the same.
        chunk, domain, tier, view: of actions.
        num_given: actions given to forward dynamics.
        schedule: None: as shipped.
    """

    name: str
    mode: str
    variant: str = "nano"
    source: tuple[int, ...] = ()
    as_file: bool = False
    shape: tuple[int, int, int] = (9, 48, 64)
    chosen: dict[str, Any] = field(default_factory=dict)
    chunk: int = 8
    domain: str = "bridge_orig_lerobot"
    tier: int = 256
    view: str = "ego_view"
    num_given: int = 0
    fps: float = 24.0
    steps: int = 3
    guidance_scale: float = 6.0
    schedule: str | None = "native"
    prompt: str = PROMPT

    @property
    def has_actions(self) -> bool:
        return MODES[self.mode].has_actions

    @property
    def frames(self) -> Frames:
        """What is given, [F, Y, X, 3]: noise over a slope, so that every resizer has something to do."""
        rows, columns = self.source[-2:]
        num_frames = self.source[0] if len(self.source) == 3 else 1
        noise = np.random.default_rng(5).integers(0, 128, (num_frames, rows, columns, 3))
        slope = np.linspace(0, 127, rows)[:, None, None] * np.linspace(1, 0.2, columns)[None, :, None]
        return (noise + slope).astype(np.uint8)

    @property
    def raw_actions(self) -> Tensor:
        from diffusers.pipelines.cosmos.pipeline_cosmos3_omni import _EMBODIMENT_TO_RAW_ACTION_DIM

        width = _EMBODIMENT_TO_RAW_ACTION_DIM[self.domain]
        return torch.randn(self.num_given, width, generator=torch.Generator().manual_seed(3))


CLIP = "image_to_video"
MORE = "video_to_video"
FORWARD, INVERSE, POLICY = "forward_dynamics", "inverse_dynamics", "policy"
FIRST, LAST = {"condition_video_keep": "first"}, {"condition_video_keep": "last"}


def at(*indexes: int) -> dict[str, Any]:
    """Latent frames of a clip that go on as they are."""
    return {"condition_frame_indexes_vision": indexes}


CASES = [
    Case("image", "text_to_image", shape=(1, 80, 80), steps=5, guidance_scale=4.0),
    Case("image", "text_to_image", variant="edge", shape=(1, 48, 80), steps=4, guidance_scale=7.0),
    Case("clip", "text_to_video", steps=6, schedule=None),
    Case("clip", "text_to_video", variant="edge", steps=6, schedule=None),
    # An image is cut to the clip's proportions: at its sides, at top and bottom, with fractions on the way.
    Case("wide", CLIP, source=(50, 200), schedule=None, steps=6),
    Case("tall", CLIP, source=(211, 67), as_file=True, steps=5),
    Case("exact", CLIP, source=(48, 64)),
    Case("unguided", CLIP, source=(33, 41), guidance_scale=1.0),
    Case("wide", CLIP, variant="edge", source=(50, 200)),
    Case("unguided", CLIP, variant="edge", source=(90, 70), shape=(5, 80, 48), guidance_scale=1.0, schedule=None),
    Case("default", MORE, source=(9, 48, 64), shape=(13, 48, 64)),
    Case("one frame", MORE, source=(9, 48, 64), chosen=at(0)),
    Case("late", MORE, source=(13, 48, 64), shape=(13, 48, 64), chosen=at(1, 2), steps=5),
    Case("apart", MORE, source=(13, 48, 64), shape=(17, 48, 64), chosen=at(0, 3)),
    Case("all", MORE, source=(9, 48, 64), chosen=at(0, 1, 2)),
    Case("first", MORE, source=(14, 60, 50), chosen=FIRST, steps=5, as_file=True),
    Case("last", MORE, source=(14, 60, 50), chosen=LAST, steps=5, as_file=True),
    Case("short", MORE, source=(3, 48, 64)),
    Case("short last", MORE, source=(3, 48, 64), chosen=LAST),
    Case("single frame", MORE, source=(1, 48, 64), schedule=None),
    Case("odd size", MORE, source=(7, 37, 91), guidance_scale=1.0),
    # Edge was not trained for it; diffusers does it all the same.
    Case("default", MORE, variant="edge", source=(9, 37, 91), shape=(13, 48, 64)),
    Case("last", MORE, variant="edge", source=(9, 48, 64), chosen=LAST, schedule=None),
    Case("24 fps", "text_to_video_with_sound", steps=5, schedule=None),
    Case("30 fps", "text_to_video_with_sound", fps=30.0),
    Case("10 fps", "text_to_video_with_sound", fps=10.0, shape=(13, 48, 48)),
    Case("few latents", "text_to_video_with_sound", fps=120.0, shape=(5, 48, 48)),
    Case("broadcast fps", "text_to_video_with_sound", fps=23.976, shape=(5, 48, 48), guidance_scale=1.0),
    Case("24 fps", "image_to_video_with_sound", source=(50, 200), steps=5),
    Case("10 fps", "image_to_video_with_sound", source=(50, 200), fps=10.0, schedule=None),
    Case("30 fps", "video_to_video_with_sound", source=(9, 37, 91), fps=30.0, steps=5),
    Case("unguided", "video_to_video_with_sound", source=(5, 37, 91), fps=10.0, guidance_scale=1.0),
    # Sources smaller than the canvas are padded: mirrored, or by their edge where the mirror image is too small.
    Case("mirrored", POLICY, source=(160, 200), chunk=4, fps=5.0),
    Case("edges", POLICY, source=(48, 80), chunk=16, fps=5.0, steps=5, guidance_scale=1.0, schedule=None),
    Case("larger", POLICY, source=(300, 410), as_file=True, chunk=4, domain="av", view="third_person_view"),
    Case("odd chunk", POLICY, source=(60, 70), chunk=10, domain="agibotworld", view="wrist_view"),
    Case("two actions", POLICY, source=(48, 48), chunk=2, domain="pusht", view="concat_view"),
    Case("one action", POLICY, source=(48, 48), chunk=1, domain="pusht"),
    Case("clip", POLICY, source=(12, 48, 80), domain="pusht", fps=10.0),
    Case("tier 480", POLICY, source=(64, 64), tier=480, chunk=4, domain="hand_pose"),
    Case("image", POLICY, variant="edge", source=(70, 48), domain="av", fps=5.0, steps=5),
    Case("fewer", FORWARD, source=(80, 48), chunk=16, num_given=5, fps=5.0, steps=5),
    Case("more", FORWARD, source=(64, 64), chunk=8, num_given=11, domain="av", guidance_scale=1.0),
    Case("exact", FORWARD, source=(5, 64, 96), chunk=8, num_given=8, domain="agibotworld", fps=10.0, prompt=""),
    Case("odd chunk", FORWARD, source=(40, 64), chunk=6, num_given=6, domain="pusht", schedule=None),
    Case("exact", FORWARD, variant="edge", source=(64, 64), num_given=8, domain="pusht", fps=5.0),
    Case("exact", INVERSE, source=(9, 64, 48), fps=5.0, steps=5, domain="av"),
    Case("longer", INVERSE, source=(7, 200, 300), chunk=4, domain="bridge_orig_lerobot", prompt="", as_file=True),
    Case("shorter", INVERSE, source=(3, 64, 48), chunk=4, domain="agibotworld", guidance_scale=1.0, schedule=None),
    Case("odd chunk", INVERSE, source=(8, 48, 48), chunk=7, domain="pusht", view="wrist_view"),
    Case("exact", INVERSE, variant="edge", source=(5, 64, 48), chunk=4, fps=5.0, schedule=None),
]
LONG = [
    Case("long", "text_to_video_with_sound", shape=(49, 80, 96), steps=35, schedule=None),
    Case("long", CLIP, source=(480, 640), shape=(49, 80, 96), steps=35),
    Case("long", MORE, variant="edge", source=(60, 100, 150), shape=(49, 80, 96), steps=35),
    Case("long", POLICY, source=(96, 128), chunk=32, domain="droid_lerobot", fps=15.0, steps=30),
    Case("long", FORWARD, source=(240, 320), chunk=16, num_given=16, domain="fractal", fps=5.0, steps=30),
    Case("long", INVERSE, variant="edge", source=(17, 240, 320), chunk=16, domain="galbot", fps=5.0, steps=30),
]


def id_of(case: Case) -> str:
    return f"{case.variant}-{case.mode}-{case.name}"


ALL = [
    *(pytest.param(case, id=id_of(case)) for case in CASES),
    *(pytest.param(case, id=id_of(case), marks=pytest.mark.slow) for case in LONG),
]


def test_every_mode_has_a_case(tiny_nano: Path, tiny_edge: Path, engine_for: Callable[[Path], Engine]) -> None:
    assert len({id_of(case) for case in (*CASES, *LONG)}) == len(CASES) + len(LONG)
    for variant, checkpoint in (("nano", tiny_nano), ("edge", tiny_edge)):
        covered = {case.mode for case in CASES if case.variant == variant}
        assert covered >= set(find_offered_modes(engine_for(checkpoint).layout))
    assert {case.mode for case in CASES} == set(MODES)


def our_request(case: Case) -> GenerationRequest:
    fields: dict[str, Any] = {
        "prompt": case.prompt,
        "mode": case.mode,
        "fps": case.fps,
        "num_inference_steps": case.steps,
        "guidance_scale": case.guidance_scale,
        "schedule": case.schedule,
        "flow_shift": None if case.schedule is None else 10.0,
        "seed": 7,
        "compat": "diffusers",
        **case.chosen,
    }
    if case.source:
        fields["image" if len(case.source) == 2 else "video"] = media_of(case)
    if case.has_actions:
        fields |= {
            "action_chunk_size": case.chunk,
            "domain_name": case.domain,
            "resolution_tier": case.tier,
            "view_point": case.view,
            "actions": case.raw_actions.numpy() if case.num_given else None,
        }
    else:
        fields |= dict(zip(("num_frames", "height", "width"), case.shape, strict=True))
    return GenerationRequest(**fields)


def media_of(case: Case) -> Any:
    """Return media as an array, or as a PNG, of several pictures for a clip: both keep every value."""
    frames = case.frames
    if not case.as_file:
        return frames[0] if len(case.source) == 2 else frames
    first, *others = (Image.fromarray(frame) for frame in frames)
    file = io.BytesIO()
    first.save(file, "PNG", **({"save_all": True, "append_images": others, "duration": 40} if others else {}))
    return file.getvalue()


def their_arguments(case: Case) -> dict[str, Any]:
    from diffusers.pipelines.cosmos.pipeline_cosmos3_omni import CosmosActionCondition

    media: dict[str, Any] = {}
    if case.source:
        pictures = [Image.fromarray(frame) for frame in case.frames]
        media = {"image": pictures[0]} if len(case.source) == 2 else {"video": pictures}
    arguments: dict[str, Any] = {
        "fps": case.fps,
        "num_inference_steps": case.steps,
        "guidance_scale": case.guidance_scale,
        "generator": torch.Generator().manual_seed(7),
    }
    if case.has_actions:
        action = CosmosActionCondition(
            mode=case.mode,  # type: ignore[arg-type]
            chunk_size=case.chunk,
            domain_name=case.domain,
            resolution_tier=case.tier,
            raw_actions=case.raw_actions if case.num_given else None,
            view_point=case.view,
            **media,
        )
        return {**arguments, "action": action}
    shape = dict(zip(("num_frames", "height", "width"), case.shape, strict=True))
    return {**arguments, **media, **shape, **case.chosen, "enable_sound": MODES[case.mode].has_sound}


@dataclass(frozen=True)
class Run:
    """What our run of a case gave: latents of every modality at the start and after each step, and the result."""

    plan: DenoisePlan
    steps: list[dict[str, Tensor]]
    result: GenerationResult


@pytest.fixture(scope="module")
def run_of(tiny_nano: Path, tiny_edge: Path, engine_for: Callable[[Path], Engine]) -> Callable[[Case], Run]:
    """Case -> our run of it, made once."""

    def run(case: Case) -> Run:
        engine = engine_for({"nano": tiny_nano, "edge": tiny_edge}[case.variant])
        plans: list[DenoisePlan] = []
        steps: list[dict[str, Tensor]] = []
        prepare = engine.denoiser.prepare
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine.denoiser, "prepare", lambda *args: (plans.append(prepare(*args)), plans[-1])[1])
            result = generate(
                engine,
                our_request(case),
                output="latent",
                on_step=lambda event: steps.append(dict(event.state.latents)),
            )
        (plan,) = plans
        return Run(plan, steps, result)

    runs: dict[str, Run] = {}

    def get(case: Case) -> Run:
        if id_of(case) not in runs:
            runs[id_of(case)] = run(case)
        return runs[id_of(case)]

    return get


@pytest.mark.parametrize("case", ALL)
def test_every_mode_equals_diffusers(
    case: Case,
    request: pytest.FixtureRequest,
    engine_for: Callable[[Path], Engine],
    run_of: Callable[[Case], Run],
    diffusers_pipeline: Callable[[Path], Any],
    relative_difference: Callable[[Tensor, Tensor], float],
) -> None:
    checkpoint = request.getfixturevalue(f"tiny_{case.variant}")
    reference = diffusers_pipeline(checkpoint).run(
        case.prompt,
        schedule=case.schedule,
        flow_shift=None if case.schedule is None else 10.0,
        **their_arguments(case),
    )
    engine, run = engine_for(checkpoint), run_of(case)
    plan, steps, result = run.plan, run.steps, run.result

    # Token ids, and where all tokens sit.
    conditional, unconditional = engine.tokenize(result.request)
    assert list(conditional.ids) == reference.text_ids
    assert list(unconditional.ids) == reference.negative_text_ids
    assert len(reference.position_ids) == plan.num_branches * case.steps
    assert plan.num_branches == (1 if case.guidance_scale == 1.0 else 2)
    places = torch.cat([state.positions for state in plan.initial.values()], dim=1)
    for prompt, theirs in zip((conditional, unconditional), reference.position_ids[: plan.num_branches], strict=False):
        placed = after_text(places, len(prompt.ids), engine.layout.transformer)
        assert torch.equal(torch.cat((text_positions(len(prompt.ids)), placed), dim=1), theirs.float())

    # Where denoising starts: what is drawn is drawn alike, what is given is encoded alike.
    modality_names = list(plan.initial)
    assert modality_names == list(reference.initial)
    for name, state in plan.initial.items():
        theirs = reference.initial[name]
        assert state.latent.shape == theirs.shape
        moves = state.free_mask.expand_as(theirs) > 0
        assert torch.equal(state.latent[moves], theirs[moves])
        assert relative_difference(state.latent, theirs) <= TOLERANCE

    # Every step of every modality.
    assert len(steps) == len(reference.steps) == case.steps
    for name in modality_names:
        differences = [
            relative_difference(ours[name], theirs[name]) for ours, theirs in zip(steps, reference.steps, strict=True)
        ]
        request.node.user_properties.append((f"{name} latents", max(differences)))
        assert max(differences) <= TOLERANCE, f"{name}: largest at step {int(np.argmax(differences)) + 1}"

    # What is given stays as it is, to the bit.
    for name, state in plan.initial.items():
        fixed = state.free_mask.expand_as(state.latent) == 0
        assert all(torch.equal(step[name][fixed], state.latent[fixed]) for step in steps)

    # What comes out.
    assert result.latents is not None
    frames = torch.cat([to_uint8(chunk) for chunk in engine.decode(result.latents["video"])]).numpy()
    expected = reference.frames
    assert expected is not None
    assert frames.shape == expected.shape
    assert frames.shape[1:3] == (result.request.height, result.request.width)
    assert frames.shape[0] == result.request.num_frames
    off_by = np.abs(frames.astype(int) - expected.astype(int))
    request.node.user_properties.append(("levels off", int(off_by.max())))
    request.node.user_properties.append(("values off", float((off_by > 0).mean())))
    assert off_by.max() <= 1
    assert (off_by > 0).mean() <= 1e-3

    assert ("sound" in modality_names) == MODES[case.mode].has_sound == (reference.sound is not None)
    if reference.sound is not None:
        waveform = torch.cat(list(engine.decode_sound(result.latents["sound"])), dim=1)
        assert waveform.shape == reference.sound.shape
        request.node.user_properties.append(("waveform", relative_difference(waveform, reference.sound)))
        assert relative_difference(waveform, reference.sound) <= TOLERANCE
    assert ("action" in modality_names) == case.has_actions
    assert (result.actions is not None) == (reference.action is not None) == (case.mode in (INVERSE, POLICY))
    if result.actions is not None:
        actions = torch.from_numpy(result.actions.values)
        assert actions.shape == reference.action.shape
        assert result.actions.is_normalised
        request.node.user_properties.append(("actions", relative_difference(actions, reference.action)))
        assert relative_difference(actions, reference.action) <= TOLERANCE


BEGUN = [case for case in CASES if MODES[case.mode].media and case.guidance_scale != 1.0 and case.steps >= 5]


def test_every_mode_with_media_is_begun() -> None:
    assert {case.mode for case in BEGUN} == {name for name, mode in MODES.items() if mode.media}


@pytest.mark.parametrize("case", BEGUN, ids=id_of)
def test_given_frames_and_actions_come_back_to_the_bit(
    case: Case, request: pytest.FixtureRequest, engine_for: Callable[[Path], Engine], run_of: Callable[[Case], Run]
) -> None:
    engine = engine_for(request.getfixturevalue(f"tiny_{case.variant}"))
    result = run_of(case).result
    picture, latents = result.request.picture, result.latents
    assert picture is not None
    assert latents is not None
    clean = list(picture.clean_frames)
    made = [frame for frame in range(latents["video"].shape[2]) if frame not in clean]
    encoded = engine.clean_latents(picture)
    assert torch.equal(latents["video"][:, :, clean], encoded)
    assert encoded.std() > 0.1, "latents that vary so little would prove little"
    assert bool(made) == (case.mode != INVERSE)
    assert all(not torch.equal(latents["video"][:, :, [frame]], encoded[:, :, [0]]) for frame in made)
    if case.has_actions:
        track = result.request.action
        assert track is not None
        assert bool((latents["action"][:, track.width :] == 0).all())
        assert bool((latents["action"][:, : track.width] != 0).all())
    if case.num_given:
        raw = case.raw_actions
        expected = torch.cat([raw, raw[-1:].expand(max(0, case.chunk - len(raw)), -1)])[: case.chunk]
        assert torch.equal(latents["action"][:, : expected.shape[1]], expected)


@pytest.mark.parametrize("source", [(50, 200), (211, 67), (48, 64)], ids=str)
def test_the_first_frame_is_the_image_through_the_vae(
    source: tuple[int, int], tiny_nano: Path, engine_for: Callable[[Path], Engine], diffusers_pipeline: Any
) -> None:
    from diffusers.pipelines.cosmos.pipeline_cosmos3_omni import _preprocess_conditioning_image

    engine, pipeline = engine_for(tiny_nano), diffusers_pipeline(tiny_nano).pipeline
    case = Case("", CLIP, source=source, steps=4)
    result = generate(engine, our_request(case), output="latent")
    assert result.latents is not None
    first = to_uint8(next(engine.decode(result.latents["video"])))[0].numpy().astype(int)

    image = _preprocess_conditioning_image(Image.fromarray(case.frames[0]), height=48, width=64)
    with torch.no_grad():
        latents = pipeline._encode_video(image.unsqueeze(2))
        inv_std, mean = (x.view(1, -1, 1, 1, 1) for x in (pipeline._vae_latents_inv_std, pipeline._vae_latents_mean))
        alone = to_uint8(pipeline.vae.decode(latents / inv_std + mean).sample)[0].numpy().astype(int)
    assert first.shape == alone.shape == (48, 64, 3)
    assert np.abs(first - alone).max() <= 1
    assert alone.std() > 5, "a picture this flat would prove little"


def test_sound_and_actions_at_once_equal_diffusers(
    tiny_nano: Path,
    engine_for: Callable[[Path], Engine],
    diffusers_pipeline: Callable[[Path], Any],
    relative_difference: Callable[[Tensor, Tensor], float],
) -> None:
    """No mode asks for both, but the transformer can: video, then sound, then actions."""
    engine = engine_for(tiny_nano)
    case = Case("", POLICY, source=(48, 64), fps=10.0, steps=4)
    reference = diffusers_pipeline(tiny_nano).run(
        case.prompt, schedule=case.schedule, flow_shift=10.0, enable_sound=True, **their_arguments(case)
    )
    resolved = resolve(our_request(case).packed(), engine.layout)
    assert resolved.picture is not None
    conditional, unconditional = engine.tokenize(resolved)
    job = DenoiseRequest.of(resolved, conditional.ids, unconditional.ids, engine.layout.geometry)
    job = replace(job, num_sound_latents=reference.initial["sound"].shape[1])
    assert job.num_sound_latents == 23  # 9 frames at 10 fps
    latents = engine.denoise(replace(job, clean_latents=engine.clean_latents(resolved.picture)))
    assert list(latents) == list(reference.steps[-1]) == ["video", "sound", "action"]
    for name, theirs in reference.steps[-1].items():
        assert relative_difference(latents[name], theirs) <= TOLERANCE
