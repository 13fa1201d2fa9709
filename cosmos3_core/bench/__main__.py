"""The command line of the benchmarks, see :mod:`cosmos3_core.bench`. Loads torch only to measure with it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from cosmos3_core.bench import flags
from cosmos3_core.bench.report import Report
from cosmos3_core.errors import Cosmos3Error, RequestError
from cosmos3_core.presets import LIMITS

if TYPE_CHECKING:
    from cosmos3_core.bench.subject import Clip, Subject


def main(arguments: list[str], prog: str = "python -m cosmos3_core.bench") -> int:
    """Measure, print the table and write the JSON; return the exit status.

    Args:
        arguments: ``vae`` or ``encode`` and its flags, or the flags for every stage.
    """
    try:
        if arguments and arguments[0] in _COMMANDS:
            return _COMMANDS[arguments[0]](arguments[1:], f"{prog} {arguments[0]}")
        return _stages_command(arguments, prog)
    except Cosmos3Error as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _stages_command(arguments: list[str], prog: str) -> int:
    parser = flags.make_parser(
        prog,
        "Seconds of every stage, and diffusers' on the same weights and shapes in the same run.",
        epilog=f"`{prog} vae --help`: the video VAE alone, with its memory; `{prog} encode --help`: the mp4 writer.",
    )
    flags.add_model_flags(parser)
    flags.add_clip_flags(parser, num_frames=33, height=192, width=320)
    add = parser.add_argument
    add("--text-tokens", type=flags.at_least(3), default=300, help="prompt length; NVIDIA's are some 1,550")
    add("--negative-tokens", type=flags.at_least(3), default=300, help="negative prompt's; NVIDIA's has some 3,300")
    options = parser.parse_args(arguments)
    subject, clip = _subject_and_clip(options)
    from cosmos3_core.bench import stages, theirs
    from cosmos3_core.bench.subject import Work

    work = Work(clip, options.text_tokens, options.negative_tokens)
    missing = _why_alone(options)
    rows = stages.measure_stages(subject, work, runs=options.runs, compare=missing is None)
    head = {
        **_model_head(subject, clip),
        "text_tokens": work.text_tokens,
        "negative_tokens": work.negative_tokens,
        "video_tokens": subject.geometry.num_tokens(clip.num_frames, clip.height, clip.width),
    }
    return _report(Report(head, theirs.REFERENCE, rows, _notes(missing)), options)


def _vae_command(arguments: list[str], prog: str) -> int:
    parser = flags.make_parser(
        prog, "Speed and peak memory of the video VAE, chunk by chunk, and of diffusers' on the same weights."
    )
    flags.add_model_flags(parser)
    flags.add_clip_flags(parser, num_frames=33, height=192, width=320)
    options = parser.parse_args(arguments)
    subject, clip = _subject_and_clip(options)
    from cosmos3_core.bench import theirs, vae

    missing = _why_alone(options)
    rows = vae.measure_vae(subject, flags.model_of(options), clip, runs=options.runs, compare=missing is None)
    notes = (vae.PEAK_NOTE, *_notes(missing))
    return _report(Report(_model_head(subject, clip), theirs.REFERENCE, rows, notes), options)


def _encode_command(arguments: list[str], prog: str) -> int:
    parser = flags.make_parser(
        prog, "Speed, delay, peak memory and file size of the mp4 writer on synthetic frames, and of PyAV's plain x264."
    )
    flags.add_clip_flags(parser, num_frames=96, height=480, width=832)
    add = parser.add_argument
    add("--crf", type=float, default=18, help="x264's quality, 0 (best) to 51; default %(default)s")
    add("--preset", default="medium", help="x264's speed; default %(default)s")
    add("--threads", type=int, help="encoder threads; default: as served, by the size of the frames")
    options = parser.parse_args(arguments)
    flags.check_clip(options, multiple=2)
    num_pixels = options.num_frames * options.height * options.width
    if num_pixels > LIMITS.max_clip_total_pixels:  # all frames are in memory, so that only encoding is timed
        allowed = f"a clip of at most {LIMITS.max_clip_total_pixels} pixels in all"
        raise RequestError(
            "num_frames", options.num_frames, allowed, f"ask for a shorter or smaller one than {num_pixels} pixels"
        )
    flags.check_json(options.json)
    import av

    from cosmos3_core.bench import encode
    from cosmos3_core.media.mp4 import encoder_threads

    footage = encode.Footage(options.num_frames, options.height, options.width)
    threads = options.threads or encoder_threads(footage.height, footage.width)
    rows = []
    for lossless in (False, True):
        settings = encode.Settings(options.crf, options.preset, threads, lossless)
        rows += encode.measure_encode(footage, settings, runs=options.runs)
    head = {**vars(footage), "preset": options.preset, "threads": threads, "av": av.__version__}
    return _report(Report(head, encode.REFERENCE, rows, (encode.DELAY_NOTE, encode.PEAK_NOTE)), options)


_COMMANDS: dict[str, Callable[[list[str], str], int]] = {"vae": _vae_command, "encode": _encode_command}


def _subject_and_clip(options: argparse.Namespace) -> tuple[Subject, Clip]:
    flags.check_json(options.json)
    from cosmos3_core.bench.subject import Clip, open_subject
    from cosmos3_core.device import latents_to_fill, resolve_device
    from cosmos3_core.shapes import chunk_latents

    device = resolve_device(options.device)
    subject = open_subject(flags.model_of(options), device)
    flags.check_clip(options, subject.geometry.spatial)
    _, height, width = subject.geometry.latent_shape(1, options.height, options.width)
    chunk = options.chunk_latents or chunk_latents(height, width, latents_to_fill(device))
    num_frames = subject.geometry.round_up_num_frames(options.num_frames)
    return subject, Clip(num_frames, options.height, options.width, chunk)


def _why_alone(options: argparse.Namespace) -> str | None:
    from cosmos3_core.bench.theirs import why_missing

    return "diffusers was left out" if options.without_diffusers else why_missing()


def _notes(missing: str | None) -> tuple[str, ...]:
    return () if missing is None else (f"Measured alone: {missing}.",)


def _model_head(subject: Subject, clip: Clip) -> dict[str, Any]:
    import torch

    from cosmos3_core.device import describe

    return {
        "model": subject.name,
        "device": describe(subject.device),
        "dtype": str(subject.dtype).removeprefix("torch."),
        "torch": torch.__version__,
        **vars(clip),
    }


def _report(report: Report, options: argparse.Namespace) -> int:
    print(report.text())
    if options.json is not None:
        report.write_json(options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
