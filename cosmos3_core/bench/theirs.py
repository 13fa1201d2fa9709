"""diffusers' side of a benchmark, on the same weights. Only this module imports it, and only to compare."""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cosmos3_core.bench.subject import CLOSING_IDS, Subject, Work
from cosmos3_core.device import synchronize

VERSION = "0.42.1"
REFERENCE = f"diffusers {VERSION}"


def why_missing() -> str | None:
    """Return why diffusers cannot be compared with here; None if it can."""
    try:
        installed = importlib.metadata.version("diffusers")
    except importlib.metadata.PackageNotFoundError:
        return f"diffusers {VERSION} is not installed"
    return None if installed == VERSION else f"diffusers {installed} is installed, {VERSION} is compared with"


def _diffusers() -> Any:
    if (reason := why_missing()) is not None:
        raise ImportError(reason)
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    return diffusers


def _fill(module: Any, subject: Subject, component: str) -> None:
    state = {name: subject.tensors(component, name) for name, _ in module.named_parameters()}
    module.load_state_dict(state, strict=True, assign=True)
    module.requires_grad_(False)


class TheirVAE:
    """diffusers' VAE with a subject's weights, between pixels and the normalised latents of its pipeline.

    Attributes:
        module: diffusers' module.

    Raises:
        ImportError: diffusers is not installed, or in another version.
    """

    def __init__(self, subject: Subject) -> None:
        config = {**vars(subject.vae), "attn_scales": [], "dropout": 0.0}
        diffusers = _diffusers()
        with torch.device("meta"):
            self.module: Any = diffusers.AutoencoderKLWan(
                **{key: list(value) if isinstance(value, tuple) else value for key, value in config.items()}
            )
        _fill(self.module, subject, "vae")
        self.module.eval()

    @torch.no_grad()
    def decode(self, latents_BCTHW: Tensor) -> Tensor:
        """Decode a whole clip, [1, C, T, H, W] -> [1, 3, F, Y, X]."""
        mean_1C111, inverse_std_1C111 = self._statistics(latents_BCTHW.device)
        return self.module.decode(latents_BCTHW.to(self.module.dtype) / inverse_std_1C111 + mean_1C111).sample

    @torch.no_grad()
    def encode(self, pixels_BCFYX: Tensor) -> Tensor:
        """Encode a clip, [1, 3, F, Y, X] -> [1, C, T, H, W]; the posterior's mean."""
        mean_1C111, inverse_std_1C111 = self._statistics(pixels_BCFYX.device)
        z_BCTHW = self.module.encode(pixels_BCFYX.to(self.module.dtype)).latent_dist.mode()
        return (z_BCTHW - mean_1C111) * inverse_std_1C111

    def _statistics(self, device: torch.device) -> tuple[Tensor, Tensor]:
        config, dtype = self.module.config, self.module.dtype
        mean_C, std_C = (torch.tensor(values, dtype=dtype) for values in (config.latents_mean, config.latents_std))
        return mean_C.view(1, -1, 1, 1, 1).to(device), (1 / std_C).view(1, -1, 1, 1, 1).to(device)


class _FixedPrompts:
    """Stands in for the tokenizer: returns two prompts, without the two special tokens that are added later."""

    eos_token_id = CLOSING_IDS[0]

    def __init__(self, prompts: list[list[int]]) -> None:
        self._prompts = prompts
        self._calls = 0

    def convert_tokens_to_ids(self, token: str) -> int:
        return CLOSING_IDS[1]

    def apply_chat_template(self, *args: Any, **kwargs: Any) -> Any:
        prompt = self._prompts[self._calls % 2]
        self._calls += 1
        return type("Encoding", (), {"input_ids": prompt})


class Theirs:
    """diffusers' transformer and loop with a subject's weights.

    Attributes:
        vae: its VAE.

    Raises:
        ImportError: diffusers is not installed, or in another version.
    """

    def __init__(self, subject: Subject, work: Work) -> None:
        diffusers = _diffusers()
        self.subject, self.work = subject, work
        self.vae = TheirVAE(subject)
        text_ids, negative_ids = work.token_ids(subject.transformer.vocab_size)
        self._pipeline: Any = diffusers.Cosmos3OmniPipeline(
            transformer=self._transformer(diffusers),
            text_tokenizer=_FixedPrompts([text_ids.tolist()[:-2], negative_ids.tolist()[:-2]]),
            vae=self.vae.module,
            scheduler=diffusers.UniPCMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=10.0
            ),
            enable_safety_checker=False,
            use_native_flow_schedule=True,
        )
        self._pipeline.set_progress_bar_config(disable=True)

    def steps(self, num_steps: int, on_step: Callable[[float], None]) -> None:
        """Run a denoising loop and report the seconds between its steps.

        The first interval is left out: it includes the pipeline's preparation, such as encoding an all-zero clip.
        """
        last_s: list[float] = []

        def record_step(pipeline: Any, index: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            synchronize(self.subject.device)
            now_s = time.perf_counter()
            if last_s:
                on_step(now_s - last_s[-1])
            last_s.append(now_s)
            return {}

        self._pipeline(
            "",
            num_frames=self.work.clip.num_frames,
            height=self.work.clip.height,
            width=self.work.clip.width,
            num_inference_steps=num_steps + 1,
            guidance_scale=6.0,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
            callback_on_step_end=record_step,
        )

    def _transformer(self, diffusers: Any) -> Any:
        subject, config = self.subject, self.subject.transformer
        with torch.device("meta"):
            module = diffusers.Cosmos3OmniTransformer(
                attention_bias=config.attention_bias,
                head_dim=config.head_dim,
                hidden_size=config.hidden_size,
                intermediate_size=config.intermediate_size,
                num_attention_heads=config.num_attention_heads,
                num_hidden_layers=config.num_hidden_layers,
                num_key_value_heads=config.num_key_value_heads,
                rms_norm_eps=config.rms_norm_eps,
                rope_theta=config.rope_theta,
                rope_axes_dim=list(config.rope_axes_dim),
                vocab_size=config.vocab_size,
                hidden_act=config.hidden_act,
                qk_norm_for_text=config.qk_norm_for_text,
                use_und_k_norm_for_gen=config.use_und_k_norm_for_gen,
            )
        _fill(module, subject, "transformer")
        module.time_embedder.float()
        # Buffers are computed, not stored; the meta device did not compute them.
        frequencies = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        module.rotary_emb.inv_freq = (1.0 / config.rope_theta**frequencies).to(subject.device)
        return module.eval()
