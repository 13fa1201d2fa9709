"""``cosmos3 jobs list | show | watch | cancel``: the jobs of a running app, over HTTP."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import closing
from datetime import datetime
from typing import TYPE_CHECKING

from cosmos3_core.progress import ProgressBar
from deployments.launch.keys import print_table

if TYPE_CHECKING:
    from deployments.client import Cosmos3Client
    from deployments.jobs.video import Video

_COLUMNS = ("id", "status", "stage", "steps", "mode", "size", "frames", "made", "prompt")
_MAX_PROMPT_CHARS = 40
_URL = "http://127.0.0.1:8000"


def add_jobs_flags(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """Add the actions of ``cosmos3 jobs`` and their flags; return the actions' parsers."""
    actions = parser.add_subparsers(title="actions", metavar="ACTION", dest="action", required=True)
    table = actions.add_parser("list", help="list jobs, the newest first")
    table.add_argument("--limit", type=int, default=20, metavar="N", help="jobs; default %(default)s")
    parsers = [table]
    for name, text in (
        ("show", "print one job as JSON"),
        ("watch", "follow a job to its end; the status is 1 if it failed"),
        ("cancel", "stop a job"),
    ):
        action = actions.add_parser(name, help=text)
        action.add_argument("id", metavar="ID", help="as `list` shows it")
        parsers.append(action)
    for action in parsers:
        action.add_argument("--url", default=_URL, help="of the app; default %(default)s")
    return parsers


def run(options: argparse.Namespace, api_key: str | None) -> int:
    """Run an action; return the exit status. Raise Cosmos3Error if the app refuses or cannot be reached."""
    from deployments.client import Cosmos3Client

    with Cosmos3Client.over_http(options.url, api_key) as client:
        if options.action == "list":
            print_table(_COLUMNS, [_make_row(video) for video in client.list(limit=options.limit).data])
        elif options.action == "show":
            print(json.dumps(client.retrieve(options.id).as_json(), indent=1, ensure_ascii=False))
        elif options.action == "watch":
            return _watch(client, options.id)
        else:
            video = client.cancel(options.id)
            print(f"{video.id}: {video.status}" + (", is being stopped" if video.status == "in_progress" else ""))
    return 0


def _watch(client: Cosmos3Client, video_id: str) -> int:
    """Show a job's place in the queue, its steps and its frames as they come; return the exit status."""
    from cluster.events import QueuePosition, StepDone
    from deployments.jobs.events import VideoEnded
    from deployments.messages import ChunkEncoded, StageRetried

    num_steps, num_frames = client.retrieve(video_id).num_steps, 0
    is_denoising = False
    with closing(ProgressBar()) as bar:
        for event in client.events(video_id):
            if isinstance(event, StepDone):
                if not is_denoising:
                    bar.start(num_steps, "step")
                is_denoising = True
                bar.update(event.step)
                continue
            if not isinstance(event, QueuePosition | StageRetried | ChunkEncoded | VideoEnded):
                continue
            bar.close()
            is_denoising = False
            if isinstance(event, QueuePosition):
                print(f"queued behind {event.position}", file=sys.stderr)
            elif isinstance(event, StageRetried):
                print(f"{event.stage} is tried again from step {event.from_step}", file=sys.stderr)
            elif isinstance(event, ChunkEncoded):
                num_frames += event.num_frames
                print(f"{num_frames} frames in the file", file=sys.stderr)
            else:
                return _report_end(event.video)
    raise AssertionError("events end with the last one, or raise")


def _report_end(video: Video) -> int:
    if video.error is not None:
        print(f"{video.id}: {video.status}: {video.error.code}: {video.error.message}")
        return 1
    took = "" if video.inference_time_s is None else f" after {video.inference_time_s:.1f} s"
    print(f"{video.id}: {video.status}{took}" + (f", {video.file_name}" if video.file_name else ""))
    return 0


def _make_row(video: Video) -> tuple[str, ...]:
    prompt = " ".join(video.prompt.split())
    return (
        video.id,
        video.status,
        video.stage if video.waiting_for is None else f"waits for {video.waiting_for}",
        f"{video.step}/{video.num_steps}",
        video.mode,
        video.size,
        str(video.num_frames),
        datetime.fromtimestamp(video.created_at).strftime("%Y-%m-%d %H:%M:%S"),
        prompt if len(prompt) <= _MAX_PROMPT_CHARS else f"{prompt[: _MAX_PROMPT_CHARS - 3]}...",
    )
