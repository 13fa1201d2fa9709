"""The command line, ``cosmos3``: generate, serve, jobs, logs, keys, check, demo, download, tiny-checkpoint, bench.

Each subcommand imports what it needs when it runs. No other module of this package reads the environment.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cosmos3_core.checkpoint.hub import DOWNLOAD_HINT
from cosmos3_core.errors import CheckpointError, Cosmos3Error, RequestError
from cosmos3_core.request_flags import add_engine_flags, add_request_flags, request_of
from deployments.launch.jobs import add_jobs_flags
from deployments.launch.keys import add_keys_flags
from deployments.launch.logs import add_logs_flags
from deployments.launch.logs import run as show_logs

if TYPE_CHECKING:
    from deployments.config import AppConfig
    from deployments.launch.app_calls import SavedMedia
    from deployments.launch.bring_up import RunningApp
    from deployments.launch.ray_session import Placement

_EXAMPLE: dict[str, Any] = {
    "prompt": "A red car drives along the coast.",
    "num_frames": 17,
    "height": 192,
    "width": 320,
    "num_inference_steps": 8,
}
_LAPTOP_START_S = 300.0
_MAX_SECONDS = 1e6
_API_KEY = "COSMOS3_API_KEY"
_MAX_KEY_CHARS = 4096

# Ray reads these variables when it is imported; values that the user has set stay.
_RAY_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_AUTO_CONNECT": "0",  # else Serve's threads start another Ray after ours has shut down
}
# For a Ray that is started for this machine alone. Serve's own periods are for web pages behind a balancer, and without
# the last three an idle app takes a third more of a processor.
_LOCAL_RAY_ENVIRONMENT = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # despite its name, what makes Ray listen on loopback only
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "deployments.api.proxy_guard.make_middlewares",
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "0.5",  # three in a row, 30 s by default, until a dead proxy is replaced
    "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1",  # a hung one may hold a lock; by default it has time to end
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",  # 0.1 by default
    "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "2000",  # 100 by default, in each replica
    "RAY_task_events_report_interval_ms": "0",  # nothing here shows them, and Ray's head would keep them
}
_TOKEN_SOURCES = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
# Flags of `serve` that are keys of the configuration: flag -> key, placeholder, help.
_KEY_FLAGS: dict[str, tuple[str, str | None, str]] = {
    "--checkpoint": ("checkpoint", "MODEL", "the same as MODEL"),
    "--tp": ("transformer.tp", "N", "ranks of a gang that share heads and FFN columns"),
    "--cfg": ("transformer.cfg", "N", "2 = the guidance branches side by side"),
    "--sp": ("transformer.sp", "N", "ranks of a gang that share the generated tokens"),
    "--gangs": ("transformer.num_replicas", "N", "number of gangs, of tp x cfg x sp ranks each"),
    "--host": ("http.host", None, "to listen on"),
    "--port": ("http.port", None, "to listen on, 0 = a free one"),
}
# Flags by the names that other servers give them.
_ALIASES = {"--checkpoint": ("--model",), "--tp": ("--tensor-parallel-size",)}
# Flags of `generate` that only a generation in this process takes, and their defaults.
_LOCAL_FLAGS = {"checkpoint": None, "dtype": None, "device": None, "tp": 1, "cfg": 1, "sp": 1}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status: 0 done, 1 a check failed, 2 an error, 130 interrupted."""
    arguments = [_use_dashes(it) for it in (sys.argv[1:] if arguments is None else arguments)]
    try:
        if not arguments:
            _make_parser().print_help()
            return 0
        if arguments and arguments[0] in _PASSED_ON:
            run, _ = _PASSED_ON[arguments[0]]
            return run(arguments[1:])
        options, unknown = _make_parser().parse_known_args(arguments)
        if unknown:  # argparse itself would show the usage of `cosmos3`
            options.parser.error(f"unknown arguments: {' '.join(unknown)}{_suggest(unknown[0], options.parser)}")
        return int(options.run(options))
    except CheckpointError as error:
        text = " ".join(str(error).split())
        print(f"error: {text.removesuffix(DOWNLOAD_HINT).strip()} {DOWNLOAD_HINT}", file=sys.stderr)
        return 2
    except Cosmos3Error as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _use_dashes(argument: str) -> str:
    """Return ``--num-frames=9`` for ``--num_frames=9``; other arguments as they are."""
    flag, equals, value = argument.partition("=")
    return flag.replace("_", "-") + equals + value if flag.startswith("--") else argument


def _suggest(unknown: str, parser: argparse.ArgumentParser) -> str:
    flag = unknown.partition("=")[0]
    nearest = difflib.get_close_matches(flag, parser._option_string_actions, n=1) if flag.startswith("--") else []
    return f"; did you mean {nearest[0]}?" if nearest else ""


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="cosmos3", description="Video from prompts with NVIDIA's Cosmos3 models.")
    parser.add_argument("--version", action="version", version=f"cosmos3-serve {metadata.version('cosmos3-serve')}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        added.set_defaults(run=run, parser=added)
        return added

    _add_generate_flags(command("generate", _generate, "make a video or image, in process or with a running app"))
    _add_serve_flags(command("serve", _serve, "start the app and keep it running until Ctrl-C"))
    for action in add_keys_flags(command("keys", _keys, "make, list and remove API keys of an app")):
        _add_config_flags(action)
    for action in add_jobs_flags(command("jobs", _jobs, "list, show, watch and cancel the jobs of a running app")):
        _add_api_key_flag(action)
    add_logs_flags(command("logs", show_logs, "print what all processes of an app here have logged, by time"))
    check = command("check", _check, "push one small request through every stage of an app")
    check.add_argument("--url", help="of a running app; without it one is started here, checked and stopped")
    check.add_argument("--checkpoint", type=Path, help="for an app that is started here; default a tiny one")
    _add_api_key_flag(check)
    _add_open_ray_flag(check)
    _add_timeout_flag(check, 600)
    demo = command("demo", _demo, "start the app with a tiny checkpoint, generate a video over HTTP, stop")
    demo.add_argument(
        "--checkpoint", type=Path, default=Path("outputs/tiny-nano"), help="made if not there: %(default)s"
    )
    demo.add_argument("--out", default="demo", metavar="PREFIX", help="writes PREFIX.mp4; default %(default)s")
    _add_open_ray_flag(demo)
    _add_timeout_flag(demo, 600)
    for name, (_, text) in _PASSED_ON.items():
        commands.add_parser(name, help=f"{text}; `cosmos3 {name} --help` lists its flags")
    return parser


def _download(arguments: list[str]) -> int:
    from cosmos3_core.checkpoint.hub import main as download

    return download(arguments)


def _build_tiny_checkpoint(arguments: list[str]) -> int:
    from cosmos3_core.checkpoint.tiny import main as build

    build(arguments)
    return 0


def _run_bench(arguments: list[str]) -> int:
    from cosmos3_core.bench.__main__ import main as measure

    return measure(arguments, "cosmos3 bench")


# Commands that parse their own flags, and their help.
_PASSED_ON: dict[str, tuple[Callable[[list[str]], int], str]] = {
    "download": (_download, "fetch a checkpoint from the Hugging Face hub"),
    "tiny-checkpoint": (_build_tiny_checkpoint, "write a small random checkpoint"),
    "bench": (_run_bench, "measure every stage; `bench vae` the video VAE, `bench encode` the mp4 writer"),
}


def _add_timeout_flag(parser: argparse.ArgumentParser, default_s: float) -> None:
    help_text = "for the request; default %(default)s"
    parser.add_argument("--timeout", type=_parse_seconds, default=default_s, metavar="SECONDS", help=help_text)


def _add_open_ray_flag(parser: argparse.ArgumentParser) -> None:
    help_text = "start Ray although RAY_AUTH_MODE=disabled lets every user of this machine run code as you"
    parser.add_argument("--allow-open-ray", action="store_true", help=help_text)


def _add_api_key_flag(parser: argparse.ArgumentParser) -> None:
    help_text = f"holds the API key for the app at --url; default ${_API_KEY}"
    parser.add_argument("--api-key-file", type=Path, metavar="FILE", help=help_text)


def _read_api_key(options: argparse.Namespace) -> str | None:
    path = options.api_key_file
    if path is None:
        return os.environ.get(_API_KEY) or None
    if options.url is None:
        raise RequestError("api_key_file", str(path), "only with --url", "Nothing else asks for a key.")
    try:
        with path.open(encoding="ascii") as file:
            return file.read(_MAX_KEY_CHARS).strip()
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError("api_key_file", str(path), "a file with the key and nothing else", str(error)) from None


def _parse_seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= _MAX_SECONDS:
        raise argparse.ArgumentTypeError(f"must be a number above 0, up to {_MAX_SECONDS:g} (got {text!r})")
    return seconds


# generate


def _add_generate_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", help="of a running app, such as http://127.0.0.1:8000; without it, in this process")
    _add_api_key_flag(parser)
    _add_timeout_flag(parser, 3600)
    add_request_flags(parser)
    add_engine_flags(parser, is_checkpoint_required=False)


def _generate(options: argparse.Namespace) -> int:
    api_key = _read_api_key(options)
    if options.url is None:
        if options.checkpoint is None:
            raise RequestError("checkpoint", None, "a checkpoint's directory, or --url of a running app instead")
        from cosmos3_core.generate import run

        run(options)
        return 0
    for name, default in _LOCAL_FLAGS.items():
        if (given := getattr(options, name)) != default:
            raise RequestError(name, given, "only without --url", "The running app decides it.")
    from deployments.launch.app_calls import save_video

    out = Path(options.out)
    saved = save_video(options.url, request_of(options), out, timeout_s=options.timeout, api_key=api_key)
    for note in saved.notes:
        print(f"note: {note}", file=sys.stderr)
    for warning in saved.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    _report(saved, f"seed {saved.seed}, negative prompt: {saved.negative_origin}")
    return 0


def _report(saved: SavedMedia, about: str) -> None:
    if saved.path is not None:
        print(f"{saved.path}: {saved.num_bytes} bytes, {about}")
    if saved.actions_path is not None:
        print(f"{saved.actions_path}: actions, {about}")
    # The total last. Encoding is a part of decode_encode, where both run side by side.
    for name, seconds in sorted(saved.stage_seconds.items(), key=lambda item: item[0] == "total"):
        print(f"  {name:<14}{seconds:9.2f} s")


# The configuration of an app


def _add_config_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--config", metavar="FILE", help="YAML, or the name of one in the package's cluster/configs; default laptop")
    add("--name", help="of the Serve application; the key name")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="any other key, such as vae.num_threads=4")


def _read_config(options: argparse.Namespace, flags: Mapping[str, Any]) -> AppConfig:
    """Read the configuration that the flags name; a key of ``flags`` that is None leaves the file's value."""
    from deployments.config import DEFAULT_CONFIG, AppConfig, find_config_file

    overrides = dict(_parse_key_value(text) for text in options.set)
    overrides |= {key: value for key, value in {"name": options.name, **flags}.items() if value is not None}
    return AppConfig.read(find_config_file(options.config) if options.config else DEFAULT_CONFIG, overrides)


def _parse_key_value(text: str) -> tuple[str, Any]:
    import yaml

    key, equals, value = text.partition("=")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError:
        value = ""
    if not key or not equals or not value:  # "null" is a value; an empty text is not
        raise RequestError("set", text, "KEY=VALUE: a dotted key and a YAML value, such as vae.num_threads=4")
    return key, parsed


def _keys(options: argparse.Namespace) -> int:
    from deployments.launch.keys import run

    # Keys need no checkpoint, but a configuration must name one.
    return run(options, _read_config(options, {"jobs.database": options.database, "checkpoint": "none"}))


def _jobs(options: argparse.Namespace) -> int:
    from deployments.launch.jobs import run

    return run(options, _read_api_key(options))


# serve


def _add_serve_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "model",
        nargs="?",
        metavar="MODEL",
        help="a directory, or what `cosmos3 download` was given; the key checkpoint",
    )
    _add_config_flags(parser)
    for flag, (key, placeholder, text) in _KEY_FLAGS.items():
        add(flag, *_ALIASES.get(flag, ()), metavar=placeholder, help=f"{text}; the key {key}")
    help_text = "names of the model for clients, the first its own; the keys model_name and model_aliases"
    add("--served-model-name", nargs="+", metavar="NAME", help=help_text)
    add("--ray-address", help="of a Ray cluster to join; default $RAY_ADDRESS, else Ray is started here")
    add("--num-cpus", type=int, help="of the Ray that is started here; default as many as there are")
    add("--start-timeout", type=_parse_seconds, default=1800, metavar="SECONDS", help="default %(default)s")
    _add_open_ray_flag(parser)


def _serve(options: argparse.Namespace) -> int:
    keys = {key: getattr(options, flag.removeprefix("--")) for flag, (key, *_) in _KEY_FLAGS.items()}
    if options.model is not None:
        if options.checkpoint is not None:
            raise RequestError(
                "checkpoint", options.checkpoint, f"left out beside {options.model}", "Give one of them."
            )
        keys["checkpoint"] = options.model
    if options.served_model_name:
        keys["model_name"], *keys["model_aliases"] = options.served_model_name
    config = _read_config(options, keys)
    address = options.ray_address or os.environ.get("RAY_ADDRESS") or "local"
    _prepare_ray(is_alone=address == "local", allows_open=options.allow_open_ray)
    from deployments.api.auth import requires_key
    from deployments.launch.ended_jobs import EndedJobs
    from deployments.launch.ray_session import Placement

    placement = Placement(None if address == "local" else address, options.num_cpus, options.start_timeout)
    with _run_app(config, placement) as app, contextlib.ExitStack() as stack:
        report_ended: Callable[[], None] = _say_nothing
        if placement.is_alone:  # on a cluster the database may be a file of another machine
            report_ended = stack.enter_context(contextlib.closing(EndedJobs(config, _say))).report_new
        try:
            _say(f"ready after {app.start_seconds:.1f} s: {app.url} (Ctrl-C stops it)")
            _say(f"  curl {app.url}/v1/videos/sync -H 'content-type: application/json' -o first.mp4 \\")
            if requires_key(config.auth.enabled, config.http.host):
                _say(f'    -H "Authorization: Bearer ${_API_KEY}" \\')
            _say(f"    -d '{json.dumps(_EXAMPLE)}'")
            _say(f"  from Python: {_show_environment(app)} python -c 'from deployments.client import connect; ...'")
            if app.logs is not None:
                _say(f"  logs: {app.logs}")
            app.watch(report_ended)
        except KeyboardInterrupt:
            _say("stopping ...")
            with contextlib.suppress(KeyboardInterrupt):
                app.drain(config.http.drain_timeout_s, _say)
                report_ended()
    return 0


@contextmanager
def _run_app(config: AppConfig, placement: Placement) -> Iterator[RunningApp]:
    from deployments.launch.bring_up import run_app
    from deployments.launch.ray_session import kill_leftovers

    _say(f"starting {config.name} with {config.checkpoint} ...")
    with kill_leftovers(os.environ), run_app(config, placement, _say) as app:
        yield app
    _say("stopped")


def _show_environment(app: RunningApp) -> str:
    """Return the environment variables with which another process reaches the app's Ray cluster."""
    mode = os.environ.get("RAY_AUTH_MODE")  # Ray sets it when it starts a cluster
    return f"RAY_ADDRESS={app.ray_address}" + (f" RAY_AUTH_MODE={mode}" if mode else "")


def _prepare_ray(*, is_alone: bool, allows_open: bool) -> None:
    """Set what Ray reads when it is imported; raise Cosmos3Error for a Ray of our own that would be open to others."""
    for name, value in (_RAY_ENVIRONMENT | (_LOCAL_RAY_ENVIRONMENT if is_alone else {})).items():
        os.environ.setdefault(name, value)
    if not is_alone:
        return
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        if not allows_open:
            raise Cosmos3Error(
                f"RAY_AUTH_MODE={os.environ['RAY_AUTH_MODE']} lets every user of this machine run code as you. Unset "
                "it, or add --allow-open-ray"
            )
    elif not any(map(os.environ.get, _TOKEN_SOURCES)):
        from deployments.launch.ray_token import protect_token

        protect_token(Path.home())


def _say_nothing() -> None:
    pass


def _say(line: str) -> None:
    print(line, flush=True)


# check and demo: an app of the laptop's configuration on a free port, in a Ray of its own


@contextmanager
def _run_laptop_app(checkpoint: Path, *, allows_open_ray: bool) -> Iterator[RunningApp]:
    _prepare_ray(is_alone=True, allows_open=allows_open_ray)
    from deployments.config import DEFAULT_CONFIG, AppConfig
    from deployments.launch.ray_session import Placement

    config = AppConfig.read(DEFAULT_CONFIG, {"checkpoint": str(checkpoint), "http.port": 0})
    with _run_app(config, Placement(start_timeout_s=_LAPTOP_START_S)) as app:
        _say(f"ready after {app.start_seconds:.1f} s: {app.url}")
        yield app


def _ensure_tiny_checkpoint(directory: Path) -> Path:
    """Build a tiny checkpoint, whole or not at all, unless the directory exists; return the directory."""
    if not directory.exists():
        _say(f"making a tiny checkpoint in {directory} ...")
        try:
            directory.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".tiny-") as scratch:
                path = Path(scratch) / "checkpoint"
                # In a process of its own, as torch would stay loaded in this one.
                command = [sys.executable, "-m", "cosmos3_core.checkpoint.tiny", str(path)]
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=_LAPTOP_START_S)
                path.rename(directory)
        except (OSError, subprocess.SubprocessError) as error:
            allowed = "a checkpoint's directory, or a place for a new one"
            raise RequestError("checkpoint", str(directory), allowed, str(error)) from None
    return directory


def _check(options: argparse.Namespace) -> int:
    from deployments.launch.app_calls import check_app

    api_key = _read_api_key(options)
    if options.url is not None:
        is_healthy = check_app(options.url, timeout_s=options.timeout, report=_say, api_key=api_key)
    else:
        with tempfile.TemporaryDirectory(prefix="cosmos3-check-") as directory:
            checkpoint = options.checkpoint or _ensure_tiny_checkpoint(Path(directory) / "tiny-nano")
            with _run_laptop_app(checkpoint, allows_open_ray=options.allow_open_ray) as app:
                is_healthy = check_app(app.url, timeout_s=options.timeout, report=_say)
    return 0 if is_healthy else 1


def _demo(options: argparse.Namespace) -> int:
    from cosmos3_core.media.output import OutputFile
    from cosmos3_core.media.probe import probe_video
    from cosmos3_core.request import GenerationRequest
    from deployments.launch.app_calls import save_video

    OutputFile(Path(f"{options.out}.mp4"))  # refuses a place that cannot be written before the work
    checkpoint = _ensure_tiny_checkpoint(options.checkpoint)
    with _run_laptop_app(checkpoint, allows_open_ray=options.allow_open_ray) as app:
        _say(f"POST {app.url}/v1/videos/sync {json.dumps(_EXAMPLE)}")
        saved = save_video(app.url, GenerationRequest(**_EXAMPLE), Path(options.out), timeout_s=options.timeout)
    assert saved.path is not None, "a video was asked for"
    info = probe_video(saved.path)
    _report(saved, f"{info.num_frames} frames, {info.width}x{info.height}, {float(info.fps):g} fps")
    return 0
