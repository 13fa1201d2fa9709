"""The tensors of a published checkpoint, by name and shape, derived from its configs.

One function per component: :func:`transformer_tensors`, :func:`video_vae_tensors`, :func:`audio_vae_tensors`. Names are
the files' own. The loader checks files against these tables; random weights are made from them. No torch here.

Source: the modules of diffusers 0.42.1 that the files were saved from (``Cosmos3OmniTransformer``,
``AutoencoderKLWan``, ``Cosmos3AVAEAudioTokenizer``); ``tests/checkpoint/test_tensors.py`` compares all three.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from cosmos3_core.checkpoint.configs import AudioVAEConfig, TransformerConfig, VideoVAEConfig

Shape = tuple[int, ...]
TensorTable = dict[str, Shape]

NUM_TIMESTEP_FEATURES = 256
"""Width of the sinusoid that the time embedder reads; not a config key, fixed by the published weights."""


@dataclass(frozen=True)
class ParameterPlan:
    """The stored tensors that fill one module parameter.

    Attributes:
        target: the parameter's name in the module.
        sources: published names; a fused parameter stacks their parts along dim 0, in this order.
        is_fp32: whether the parameter is fp32 in a module of any dtype, as the time embedder's are.
    """

    target: str
    sources: tuple[str, ...]
    is_fp32: bool = False


# --- transformer -----------------------------------------------------------------------------------------------------


def transformer_tensors(config: TransformerConfig) -> TensorTable:
    """Return every tensor of ``transformer/``: both towers of every layer, embeddings and the heads of all modalities.

    Linear weights are [out, in]. The exception are the per-embodiment action projections, whose rows hold one flattened
    [in, out] matrix each.
    """
    hidden = config.hidden_size
    tensors: TensorTable = {
        "embed_tokens.weight": (config.vocab_size, hidden),
        "lm_head.weight": (config.vocab_size, hidden),
        "norm.weight": (hidden,),
        "norm_moe_gen.weight": (hidden,),
        **_linear("proj_in", config.patch_latent_dim, hidden),
        **_linear("proj_out", hidden, config.patch_latent_dim),
        **_linear("time_embedder.linear_1", NUM_TIMESTEP_FEATURES, hidden),
        **_linear("time_embedder.linear_2", hidden, hidden),
    }
    for index in range(config.num_hidden_layers):
        tensors |= _transformer_layer(f"layers.{index}", config)
    if config.action_gen:
        tensors |= {
            "action_proj_in.fc.weight": (config.num_embodiment_domains, config.action_dim * hidden),
            "action_proj_in.bias.weight": (config.num_embodiment_domains, hidden),
            "action_proj_out.fc.weight": (config.num_embodiment_domains, hidden * config.action_dim),
            "action_proj_out.bias.weight": (config.num_embodiment_domains, config.action_dim),
            "action_modality_embed": (hidden,),
        }
    if config.sound_gen:
        tensors |= {
            **_linear("audio_proj_in", config.sound_dim, hidden),
            **_linear("audio_proj_out", hidden, config.sound_dim),
            "audio_modality_embed": (hidden,),
        }
    return tensors


def _transformer_layer(name: str, config: TransformerConfig) -> TensorTable:
    """Return one layer: the understanding tower's tensors, then the generation tower's (``*_moe_gen``, ``*add*``)."""
    tensors: TensorTable = {}
    for tower in ("", "_moe_gen"):
        tensors |= {
            f"{name}.input_layernorm{tower}.weight": (config.hidden_size,),
            f"{name}.post_attention_layernorm{tower}.weight": (config.hidden_size,),
            **_mlp(f"{name}.mlp{tower}", config),
        }
    attention = f"{name}.self_attn"
    tensors |= _attention_projections(attention, ("to_q", "to_k", "to_v", "to_out"), config)
    tensors |= _attention_projections(attention, ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"), config)
    head_norms = ["norm_added_q", "norm_added_k"]
    if config.qk_norm_for_text:
        head_norms += ["norm_q", "norm_k"]
    elif config.use_und_k_norm_for_gen:
        # Text keys are normed once: by norm_k if the layer has it, otherwise only for the generation tower.
        head_norms += ["k_norm_und_for_gen"]
    return tensors | {f"{attention}.{norm}.weight": (config.head_dim,) for norm in head_norms}


def _attention_projections(name: str, projections: tuple[str, str, str, str], config: TransformerConfig) -> TensorTable:
    """Return the query, key, value and output projections; heads x head_dim may differ from the hidden size."""
    query, key, value, output = (f"{name}.{projection}" for projection in projections)
    hidden = config.hidden_size
    query_width = config.num_attention_heads * config.head_dim
    kv_width = config.num_key_value_heads * config.head_dim
    return {
        **_linear(query, hidden, query_width, bias=config.attention_bias),
        **_linear(key, hidden, kv_width, bias=config.attention_bias),
        **_linear(value, hidden, kv_width, bias=config.attention_bias),
        **_linear(output, query_width, hidden, bias=config.attention_bias),
    }


def _mlp(name: str, config: TransformerConfig) -> TensorTable:
    """Return the gated MLP of ``silu``; ``relu2`` has no gate."""
    hidden, intermediate = config.hidden_size, config.intermediate_size
    gate = _linear(f"{name}.gate_proj", hidden, intermediate, bias=False) if config.hidden_act == "silu" else {}
    return {
        **gate,
        **_linear(f"{name}.up_proj", hidden, intermediate, bias=False),
        **_linear(f"{name}.down_proj", intermediate, hidden, bias=False),
    }


def _linear(name: str, num_in: int, num_out: int, *, bias: bool = True) -> TensorTable:
    weight: TensorTable = {f"{name}.weight": (num_out, num_in)}
    return weight | {f"{name}.bias": (num_out,)} if bias else weight


# --- video VAE -------------------------------------------------------------------------------------------------------


def video_vae_tensors(config: VideoVAEConfig) -> TensorTable:
    """Return every tensor of ``vae/``: encoder, decoder and the two 1x1x1 convolutions around the latent.

    Convolution weights are [out, in, time, rows, columns], those of single frames [out, in, rows, columns]. The
    parameter-free residual shortcuts (averages and repeats) do not appear.
    """
    num_moments = 2 * config.z_dim  # mean and log variance
    return {
        **_vae_encoder(config, num_moments),
        **_conv("quant_conv", num_moments, num_moments, (1, 1, 1)),
        **_conv("post_quant_conv", config.z_dim, config.z_dim, (1, 1, 1)),
        **_vae_decoder(config),
    }


def _vae_encoder(config: VideoVAEConfig, num_moments: int) -> TensorTable:
    widths = [config.base_dim * multiple for multiple in (1, *config.dim_mult)]
    tensors = _conv("encoder.conv_in", config.in_channels, widths[0], (3, 3, 3))
    for level, (num_in, num_out) in enumerate(itertools.pairwise(widths)):
        block = f"encoder.down_blocks.{level}"
        tensors |= _residual_blocks(f"{block}.resnets", config.num_res_blocks, num_in, num_out)
        if level < len(config.temperal_downsample):  # every level but the last one halves the picture
            tensors |= _conv(f"{block}.downsampler.resample.1", num_out, num_out, (3, 3))
            if config.temperal_downsample[level]:
                tensors |= _conv(f"{block}.downsampler.time_conv", num_out, num_out, (3, 1, 1))
    return {
        **tensors,
        **_mid_block("encoder.mid_block", widths[-1]),
        "encoder.norm_out.gamma": (widths[-1], 1, 1, 1),
        **_conv("encoder.conv_out", widths[-1], num_moments, (3, 3, 3)),
    }


def _vae_decoder(config: VideoVAEConfig) -> TensorTable:
    multiples = config.dim_mult[::-1]
    widths = [config.decoder_base_dim * multiple for multiple in (multiples[0], *multiples)]
    doubles_time = config.temperal_downsample[::-1]
    tensors = _conv("decoder.conv_in", config.z_dim, widths[0], (3, 3, 3)) | _mid_block("decoder.mid_block", widths[0])
    for level, (num_in, num_out) in enumerate(itertools.pairwise(widths)):
        block = f"decoder.up_blocks.{level}"
        tensors |= _residual_blocks(f"{block}.resnets", config.num_res_blocks + 1, num_in, num_out)
        if level < len(doubles_time):  # every level but the last one doubles the picture
            tensors |= _conv(f"{block}.upsampler.resample.1", num_out, num_out, (3, 3))
            if doubles_time[level]:
                # Twice the channels out: one half becomes the even new frames, the other the odd ones.
                tensors |= _conv(f"{block}.upsampler.time_conv", num_out, 2 * num_out, (3, 1, 1))
    return {
        **tensors,
        "decoder.norm_out.gamma": (widths[-1], 1, 1, 1),
        **_conv("decoder.conv_out", widths[-1], config.out_channels, (3, 3, 3)),
    }


def _residual_blocks(name: str, num_blocks: int, num_in: int, num_out: int) -> TensorTable:
    """Return ``num_blocks`` residual blocks; the first one changes the width."""
    tensors: TensorTable = {}
    for index in range(num_blocks):
        tensors |= _residual_block(f"{name}.{index}", num_in if index == 0 else num_out, num_out)
    return tensors


def _residual_block(name: str, num_in: int, num_out: int) -> TensorTable:
    shortcut = _conv(f"{name}.conv_shortcut", num_in, num_out, (1, 1, 1)) if num_in != num_out else {}
    return {
        f"{name}.norm1.gamma": (num_in, 1, 1, 1),
        **_conv(f"{name}.conv1", num_in, num_out, (3, 3, 3)),
        f"{name}.norm2.gamma": (num_out, 1, 1, 1),
        **_conv(f"{name}.conv2", num_out, num_out, (3, 3, 3)),
        **shortcut,
    }


def _mid_block(name: str, width: int) -> TensorTable:
    """Return a residual block, attention over one frame, and a residual block."""
    return {
        **_residual_block(f"{name}.resnets.0", width, width),
        f"{name}.attentions.0.norm.gamma": (width, 1, 1),
        **_conv(f"{name}.attentions.0.to_qkv", width, 3 * width, (1, 1)),
        **_conv(f"{name}.attentions.0.proj", width, width, (1, 1)),
        **_residual_block(f"{name}.resnets.1", width, width),
    }


def _conv(name: str, num_in: int, num_out: int, kernel: Shape) -> TensorTable:
    return {f"{name}.weight": (num_out, num_in, *kernel), f"{name}.bias": (num_out,)}


# --- audio VAE -------------------------------------------------------------------------------------------------------


def audio_vae_tensors(config: AudioVAEConfig, with_encoder: bool = True) -> TensorTable:
    """Return every tensor of ``sound_tokenizer/``; some files hold the decoder alone (``with_encoder=False``).

    Weight-normed convolutions are stored as direction ``weight_v`` and magnitude ``weight_g``, one magnitude per index
    of the first axis. That is the output channel, but the input channel of a transposed convolution (``conv_t1``).
    """
    decoder = _audio_decoder(config)
    return {**_audio_encoder(config), **decoder} if with_encoder else decoder


def _audio_decoder(config: AudioVAEConfig) -> TensorTable:
    widths = [config.dec_dim * multiple for multiple in (1, *config.dec_c_mults)][::-1]
    tensors = _norm_conv("decoder.conv1", config.vocoder_input_dim, widths[0], 7)
    for level, stride in enumerate(reversed(config.dec_strides)):
        block = f"decoder.block.{level}"
        num_in, num_out = widths[level], widths[level + 1]
        tensors |= {
            **_snake(f"{block}.snake1", num_in),
            f"{block}.conv_t1.weight_g": (num_in, 1, 1),
            f"{block}.conv_t1.weight_v": (num_in, num_out, 2 * stride),
            f"{block}.conv_t1.bias": (num_out,),
        }
        for unit in ("res_unit1", "res_unit2", "res_unit3"):
            tensors |= {
                **_snake(f"{block}.{unit}.snake1", num_out),
                **_norm_conv(f"{block}.{unit}.conv1", num_out, num_out, 7),
                **_snake(f"{block}.{unit}.snake2", num_out),
                **_norm_conv(f"{block}.{unit}.conv2", num_out, num_out, 1),
            }
    return {
        **tensors,
        **_snake("decoder.snake1", widths[-1]),
        **_norm_conv("decoder.conv2", widths[-1], config.dec_out_channels, 7, bias=False),
    }


def _audio_encoder(config: AudioVAEConfig) -> TensorTable:
    """Return numbered layers: a convolution of the spectrogram, each level, a convolution to the latent's moments.

    A level is ConvNeXt blocks and a strided convolution.
    """
    num_spectrogram_channels = (config.enc_n_fft + 2) * config.input_channels * (2 if config.stereo else 1)
    widths = [config.enc_dim * multiple for multiple in config.enc_c_mults]
    layers = [_norm_conv("", num_spectrogram_channels, widths[0], 1, bias=False)]
    for num_in, num_out, stride in zip(widths, [*widths[1:], widths[-1]], config.enc_strides, strict=True):
        layers += [_convnext_block(num_in)] * config.enc_num_blocks
        layers += [_norm_conv("", num_in, num_out, 2 * stride)]
    layers += [_norm_conv("", widths[-1], config.enc_latent_dim, 1, bias=False)]
    return {
        f"encoder.layers.{index}{name}": shape for index, layer in enumerate(layers) for name, shape in layer.items()
    }


def _convnext_block(width: int) -> TensorTable:
    inner = 4 * width
    return {
        ".dwconv.1.weight": (width, 1, 7),
        ".dwconv.1.bias": (width,),
        ".norm.weight": (width,),
        ".pwconv1.weight": (inner, width, 1),
        ".pwconv1.bias": (inner,),
        **_snake(".act", inner),
        ".pwconv2.weight": (width, inner, 1),
        ".pwconv2.bias": (width,),
    }


def _snake(name: str, width: int) -> TensorTable:
    """Return a snake activation: the logarithms of its frequency and inverse amplitude, per channel."""
    return {f"{name}.alpha": (1, width, 1), f"{name}.beta": (1, width, 1)}


def _norm_conv(name: str, num_in: int, num_out: int, kernel: int, *, bias: bool = True) -> TensorTable:
    tensors: TensorTable = {f"{name}.weight_g": (num_out, 1, 1), f"{name}.weight_v": (num_out, num_in, kernel)}
    return tensors | {f"{name}.bias": (num_out,)} if bias else tensors
