"""diffusers' pipeline on the same weights. The only module that imports it, and only when it is asked to compare."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cosmos3_core.bench.subject import CLOSING_IDS, Subject, Work
from cosmos3_core.device import synchronize

VERSION = "0.42.1"


class _FixedPrompts:
    """Stands in for the tokenizer: two prompts of the lengths asked for, minus the two special tokens added later."""

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
    """diffusers' transformer, VAE and loop with a subject's weights.

    Args:
        subject: the model.
        work: the shape of the request.

    Raises:
        ImportError: diffusers is not installed, or not the version that is compared with.
    """

    def __init__(self, subject: Subject, work: Work) -> None:
        import diffusers

        if diffusers.__version__ != VERSION:
            raise ImportError(f"diffusers {diffusers.__version__} is installed, {VERSION} is compared with")
        self.subject, self.work = subject, work
        diffusers.utils.logging.set_verbosity_error()
        text_ids, negative_ids = work.token_ids(subject.transformer.vocab_size)
        self._pipeline: Any = diffusers.Cosmos3OmniPipeline(
            transformer=self._transformer(diffusers),
            text_tokenizer=_FixedPrompts([text_ids.tolist()[:-2], negative_ids.tolist()[:-2]]),
            vae=self._vae(diffusers),
            scheduler=diffusers.UniPCMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=10.0
            ),
            enable_safety_checker=False,
            use_native_flow_schedule=True,
        )
        self._pipeline.set_progress_bar_config(disable=True)

    def steps(self, num_steps: int, on_step: Callable[[float], None]) -> None:
        """Run a denoising loop and report the seconds between its steps.

        The first interval is left out: it holds the pipeline's preparation, an all-zero clip's VAE encode among it.
        """
        last_s: list[float] = []

        def stepped(pipeline: Any, index: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            synchronize(self.subject.device)
            now_s = time.perf_counter()
            if last_s:
                on_step(now_s - last_s[-1])
            last_s.append(now_s)
            return {}

        self._pipeline(
            "",
            num_frames=self.work.num_frames,
            height=self.work.height,
            width=self.work.width,
            num_inference_steps=num_steps + 1,
            guidance_scale=6.0,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
            callback_on_step_end=stepped,
        )

    @torch.no_grad()
    def decode_all(self, latents: Tensor) -> Tensor:
        """A whole clip, from normalised latents as the pipeline has them."""
        vae = self._pipeline.vae
        statistics = (
            torch.tensor(values, dtype=vae.dtype) for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        mean, std = (values.to(latents.device).view(1, -1, 1, 1, 1) for values in statistics)
        return vae.decode(latents.to(vae.dtype) / (1 / std) + mean).sample

    @torch.no_grad()
    def encode_frame(self, frame: Tensor) -> Tensor:
        """One conditioning frame [1, 3, 1, Y, X] -> its latent."""
        return self._pipeline._encode_video(frame)

    def _transformer(self, diffusers: Any) -> Any:
        config = self.subject.transformer
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
        self._fill(module, "transformer")
        module.time_embedder.float()
        # Buffers are computed, not stored; on the meta device they were not.
        frequencies = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        module.rotary_emb.inv_freq = (1.0 / config.rope_theta**frequencies).to(self.subject.device)
        return module.eval()

    def _vae(self, diffusers: Any) -> Any:
        config = {**vars(self.subject.vae), "attn_scales": [], "dropout": 0.0}
        with torch.device("meta"):
            module = diffusers.AutoencoderKLWan(
                **{key: list(value) if isinstance(value, tuple) else value for key, value in config.items()}
            )
        self._fill(module, "vae")
        return module.eval()

    def _fill(self, module: Any, component: str) -> None:
        state = {name: self.subject.tensors(component, name) for name, _ in module.named_parameters()}
        module.load_state_dict(state, strict=True, assign=True)
        module.requires_grad_(False)
