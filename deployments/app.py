"""The whole graph on one screen.

    ingress ── director ─┬─ tokenizer
                         ├─ transformer   one replica = one gang: a leader and its rank actors in a placement group
                         ├─ (unguided     the same, for requests without guidance, if they have gangs of their own)
                         ├─ vae           given pictures -> latents, latents -> frames; a gang too
                         ├─ (audio        latents -> sound, if the checkpoint makes sound)
                         ├─ (guardrail    prompts and frames -> those that may be used, if an adapter is configured)
                         └─ encoder

``serve run deployments.app:build checkpoint=DIR`` and Serve's YAML call :func:`build`; ``cosmos3 serve`` calls
:func:`build_app`.
"""

from __future__ import annotations

from typing import Any

from ray import serve
from ray.serve.config import AutoscalingConfig, BackpressureConfig
from ray.serve.schema import LoggingConfig

from cluster.engine_loop import LoopSpec
from cluster.gang import GangSpec, make_bundles
from cluster.transformer_rank import TransformerSpec
from cluster.video_vae_rank import VideoVAESpec
from cosmos3_core.checkpoint.layout import CheckpointLayout
from cosmos3_core.parallel.layout import Layout
from deployments.api.ingress import Ingress
from deployments.config import AppConfig, GangStage, Stage, TransformerStage
from deployments.director.director import Director
from deployments.stages.audio_vae import AudioVAEDeployment
from deployments.stages.guardrail import Guardrails
from deployments.stages.handles import StageHandles
from deployments.stages.mp4_encoder import Mp4Encoder
from deployments.stages.prompt_tokenizer import PromptTokenizer
from deployments.stages.transformer import Transformer
from deployments.stages.video_vae import CallLimits, VideoVAEDeployment

_FULL_QUEUE_RETRY_S = 5
_SHUTDOWN_POLL_S = 0.1


def build_app(config: AppConfig) -> serve.Application:
    """Return the application of a configuration."""
    directory, checkpoint = str(config.checkpoint), CheckpointLayout.open(config.checkpoint)
    tokenizer = _deploy("PromptTokenizer", PromptTokenizer, config, config.tokenizer).bind(directory)
    transformer = _deploy_transformer("Transformer", config, config.transformer, checkpoint)
    unguided = None
    if config.unguided is not None:
        unguided = _deploy_transformer("UnguidedTransformer", config, config.unguided, checkpoint)
    vae_gang = make_vae_gang_spec(config, checkpoint)
    vae = _deploy_gangs("VideoVAE", VideoVAEDeployment, config, config.vae, vae_gang).bind(
        vae_gang, CallLimits(config.vae.first_chunk_timeout_s, config.vae.chunk_timeout_s)
    )
    audio = None
    if config.audio.decodes_sound(checkpoint):
        audio = _deploy("AudioVAE", AudioVAEDeployment, config, config.audio).bind(
            directory, config.audio.device, config.audio.dtype, config.audio.num_threads, config.audio.chunk_timeout_s
        )
    encoder = _deploy("Mp4Encoder", Mp4Encoder, config, config.encoder).bind(
        config.media, config.encoder.chunk_timeout_s
    )
    guardrail = None
    if config.guardrails.adapter is not None:
        guardrail = _deploy("Guardrails", Guardrails, config, config.guardrail).bind(config.guardrails)
    # A Director or Ingress finishes its requests before it stops; other stages' work can be repeated.
    longest = {"graceful_shutdown_timeout_s": config.http.request_timeout_s}
    stages = StageHandles(tokenizer, transformer, vae, encoder, unguided, audio, guardrail)
    director = _deploy("Director", Director, config, config.director).options(**longest).bind(config, stages)
    return _deploy("Ingress", Ingress, config, config.ingress).options(**longest).bind(config, director)


def build(args: dict[str, Any]) -> serve.Application:
    """Build the app for Serve's YAML and ``serve run``: ``args`` are the keys of :class:`AppConfig`."""
    return build_app(AppConfig.parse(args))


def make_gang_spec(config: AppConfig, stage: TransformerStage, checkpoint: CheckpointLayout) -> GangSpec:
    """Return the gang of one replica of a transformer stage; raise RequestError for an unfit layout."""
    layout = Layout(stage.tp, stage.cfg, stage.sp)
    layout.check(checkpoint.transformer)  # before anything is placed
    # A fallback: the leader's own deadlines come first.
    collective_timeout_s = 2 * max(stage.start_timeout_s, stage.first_step_timeout_s, stage.quantum_timeout_s)
    rank = TransformerSpec(
        str(config.checkpoint),
        stage.device,
        stage.dtype,
        stage.num_threads,
        layout,
        collective_timeout_s=collective_timeout_s,
    )
    return GangSpec(rank, stage.cpus_per_rank, stage.gpus_per_rank, stage.start_timeout_s)


def make_vae_gang_spec(config: AppConfig, checkpoint: CheckpointLayout) -> GangSpec:
    """Return the gang that one replica of the video VAE owns."""
    stage = config.vae
    rank = VideoVAESpec(
        str(config.checkpoint),
        stage.device,
        stage.dtype,
        stage.num_threads,
        stage.ranks,
        latent_channels=checkpoint.vae.z_dim,
        chunk_latents=stage.chunk_latents,
        uses_card_of_rank=stage.beside_transformer,
        preview_cache_dir=None if stage.preview_cache_dir is None else str(stage.preview_cache_dir),
        collective_timeout_s=2 * max(stage.start_timeout_s, stage.first_chunk_timeout_s, stage.chunk_timeout_s),
    )
    return GangSpec(rank, stage.cpus_per_rank, stage.gpus_per_rank, stage.start_timeout_s)


def _deploy_transformer(name: str, config: AppConfig, stage: TransformerStage, checkpoint: CheckpointLayout) -> Any:
    gang = make_gang_spec(config, stage, checkpoint)
    loop = LoopSpec(
        max_jobs=stage.max_jobs,
        max_held_bytes=stage.max_held_bytes,
        text_cache_bytes=stage.text_cache_bytes,
        save_period_s=stage.save_period_s,
        first_step_timeout_s=stage.first_step_timeout_s,
        quantum_timeout_s=stage.quantum_timeout_s,
    )
    return _deploy_gangs(name, Transformer, config, stage, gang).bind(gang, loop)


def _deploy_gangs(name: str, body: type, config: AppConfig, stage: GangStage, gang: GangSpec) -> Any:
    return _deploy(name, body, config, stage).options(
        placement_group_bundles=make_bundles(gang, stage.num_cpus),
        placement_group_strategy=stage.placement_strategy,
        # One selector holds for every bundle. None, not an empty one: a Serve that packs replicas accepts a selector
        # with STRICT_PACK only.
        placement_group_bundle_label_selector=[stage.node_labels] if stage.node_labels else None,
    )


def _deploy(name: str, body: type, config: AppConfig, stage: Stage) -> Any:
    scaling: dict[str, Any] = {"num_replicas": stage.num_replicas}
    if stage.autoscaling is not None:
        scaling = {"autoscaling_config": AutoscalingConfig(**stage.autoscaling.model_dump())}
    needs: dict[str, Any] = {"num_cpus": stage.num_cpus, "num_gpus": stage.num_gpus}
    if stage.node_labels and not isinstance(stage, GangStage):  # a gang's bundles carry them
        needs["label_selector"] = stage.node_labels
    return serve.deployment(body, name=name).options(
        ray_actor_options=needs,
        max_ongoing_requests=stage.max_ongoing_requests,
        max_queued_requests=stage.max_queued_requests,
        # How often Serve checks whether a stopping replica is idle; with its default every stop takes 2 s.
        graceful_shutdown_wait_loop_s=_SHUTDOWN_POLL_S,
        graceful_shutdown_timeout_s=stage.graceful_shutdown_timeout_s,
        health_check_period_s=stage.health_check_period_s,
        health_check_timeout_s=stage.health_check_timeout_s,
        logging_config=LoggingConfig(encoding=config.logging.encoding, log_level=config.logging.level),
        # Too many calls are no fault of the service: 429, not 503, Serve's default.
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=_FULL_QUEUE_RETRY_S),
        **scaling,
    )
