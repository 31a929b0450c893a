"""The models of ``coverage.py``: small, random weights, inputs that fit them.

Nothing is downloaded: configurations only. timm and torchvision are imported without torchvision's
compiled operators, which the CPU build of torch has no package for.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

#: Name, what builds the model, what builds one batch.
Entry = tuple[str, Callable[[], nn.Module], Callable[[], Any]]

os.environ.setdefault("HF_HUB_OFFLINE", "1")
_declared: list[torch.library.Library] = []


def declare_torchvision_operators() -> None:
    """Let torchvision import: it looks two compiled operators up when it is imported."""
    if not _declared:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declared.append(library)


def timm_models() -> Iterator[Entry]:
    """The smallest model of every timm module (``timm_models.json``: name and input size)."""
    declare_torchvision_operators()
    import timm

    chosen = json.loads((Path(__file__).parent / "timm_models.json").read_text())
    for name, size in chosen.items():
        yield (
            f"timm/{name}",
            lambda name=name: timm.create_model(name, pretrained=False),
            lambda size=size: torch.randn(2, *size),
        )


def torchvision_models() -> Iterator[Entry]:
    """One classifier per torchvision family."""
    declare_torchvision_operators()
    from torchvision import models

    names = (
        "alexnet convnext_tiny densenet121 efficientnet_b0 efficientnet_v2_s googlenet "
        "inception_v3 maxvit_t mnasnet0_5 mobilenet_v2 mobilenet_v3_small regnet_x_400mf "
        "regnet_y_400mf resnet18 resnext50_32x4d shufflenet_v2_x0_5 squeezenet1_1 swin_t "
        "swin_v2_t vgg11_bn vit_b_32 wide_resnet50_2"
    )
    for name in names.split():
        size = 299 if name == "inception_v3" else 224 if name in ("vit_b_32", "maxvit_t") else 96
        extra = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        yield (
            f"torchvision/{name}",
            lambda name=name, extra=extra: getattr(models, name)(weights=None, **extra),
            lambda size=size: torch.randn(2, 3, size, size),
        )


def _tokens(length: int = 9) -> torch.Tensor:
    return torch.randint(3, 99, (2, length))


def _text() -> dict[str, Any]:
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, 7:] = 0
    return {"input_ids": _tokens(), "attention_mask": mask}


def _causal() -> dict[str, Any]:
    return {"input_ids": _tokens()}


def _both() -> dict[str, Any]:
    return {**_text(), "decoder_input_ids": _tokens(5)}


def _image(size: int = 32) -> Callable[[], dict[str, Any]]:
    return lambda: {"pixel_values": torch.randn(2, 3, size, size)}


_WIDTH = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_TEXT = {**_WIDTH, "intermediate_size": 64, "vocab_size": 99, "max_position_embeddings": 64}
_ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_VISION = {**_WIDTH, "intermediate_size": 64, "image_size": 32, "patch_size": 8}
_SEQ = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "vocab_size": 99,
    "max_position_embeddings": 64,
    "decoder_start_token_id": 1,
    **_ENDS,
}
_SPEECH = {
    **_WIDTH,
    "intermediate_size": 64,
    "conv_dim": (16, 16),
    "conv_stride": (5, 2),
    "conv_kernel": (10, 3),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "vocab_size": 99,
}
_GROUPED = {**_TEXT, "num_key_value_heads": 2, "head_dim": 8, **_ENDS}

#: Model class, configuration class, configuration, batch.
_TRANSFORMERS: tuple[tuple[str, str, dict[str, Any], Callable[[], Any]], ...] = (
    # encoders
    ("BertModel", "BertConfig", _TEXT, _text),
    ("RobertaModel", "RobertaConfig", _TEXT, _text),
    ("ElectraModel", "ElectraConfig", {**_TEXT, "embedding_size": 32}, _text),
    ("AlbertModel", "AlbertConfig", {**_TEXT, "embedding_size": 16}, _text),
    (
        "DistilBertModel",
        "DistilBertConfig",
        {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "vocab_size": 99},
        _text,
    ),
    ("DebertaV2Model", "DebertaV2Config", {**_TEXT, "relative_attention": True}, _text),
    ("MPNetModel", "MPNetConfig", _TEXT, _text),
    (
        "ModernBertModel",
        "ModernBertConfig",
        {**_TEXT, **_ENDS, "cls_token_id": 1, "sep_token_id": 2},
        _text,
    ),
    (
        "XLNetModel",
        "XLNetConfig",
        {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64, "vocab_size": 99},
        _text,
    ),
    # decoders
    (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 99, "n_positions": 64, **_ENDS},
        _causal,
    ),
    ("GPTNeoXForCausalLM", "GPTNeoXConfig", {**_TEXT, **_ENDS}, _causal),
    (
        "OPTForCausalLM",
        "OPTConfig",
        {
            **_WIDTH,
            "ffn_dim": 64,
            "vocab_size": 99,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": 32,
            **_ENDS,
        },
        _text,
    ),
    (
        "BloomForCausalLM",
        "BloomConfig",
        {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 99, **_ENDS},
        _text,
    ),
    ("FalconForCausalLM", "FalconConfig", {**_TEXT, **_ENDS}, _causal),
    ("LlamaForCausalLM", "LlamaConfig", _GROUPED, _causal),
    ("MistralForCausalLM", "MistralConfig", _GROUPED, _causal),
    ("Qwen2ForCausalLM", "Qwen2Config", _GROUPED, _text),
    ("Qwen3ForCausalLM", "Qwen3Config", _GROUPED, _causal),
    ("GemmaForCausalLM", "GemmaConfig", _GROUPED, _causal),
    ("Gemma2ForCausalLM", "Gemma2Config", _GROUPED, _causal),
    ("PhiForCausalLM", "PhiConfig", {**_TEXT, **_ENDS}, _causal),
    (
        "MambaForCausalLM",
        "MambaConfig",
        {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "vocab_size": 99, **_ENDS},
        _causal,
    ),
    # mixtures of experts
    ("MixtralForCausalLM", "MixtralConfig", {**_GROUPED, "num_local_experts": 4}, _causal),
    (
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        {
            **_GROUPED,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
        },
        _causal,
    ),
    (
        "OlmoeForCausalLM",
        "OlmoeConfig",
        {**_GROUPED, "num_experts": 4, "num_experts_per_tok": 2},
        _causal,
    ),
    # encoder-decoders
    (
        "T5Model",
        "T5Config",
        {
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 64,
            "num_layers": 2,
            "num_heads": 4,
            "vocab_size": 99,
            "decoder_start_token_id": 0,
        },
        _both,
    ),
    ("BartModel", "BartConfig", _SEQ, _both),
    ("MBartModel", "MBartConfig", _SEQ, _both),
    ("PegasusModel", "PegasusConfig", _SEQ, _both),
    ("MarianModel", "MarianConfig", _SEQ, _both),
    # vision
    ("ViTModel", "ViTConfig", _VISION, _image()),
    ("DeiTModel", "DeiTConfig", _VISION, _image()),
    ("BeitModel", "BeitConfig", _VISION, _image()),
    ("Dinov2Model", "Dinov2Config", _VISION, _image()),
    (
        "SwinModel",
        "SwinConfig",
        {
            "image_size": 32,
            "patch_size": 2,
            "embed_dim": 16,
            "depths": [1, 1],
            "num_heads": [2, 2],
            "window_size": 4,
        },
        _image(),
    ),
    (
        "ConvNextModel",
        "ConvNextConfig",
        {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2},
        _image(),
    ),
    (
        "ResNetModel",
        "ResNetConfig",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
        _image(),
    ),
    (
        "SegformerModel",
        "SegformerConfig",
        {
            "num_encoder_blocks": 2,
            "depths": [1, 1],
            "sr_ratios": [2, 1],
            "hidden_sizes": [8, 16],
            "patch_sizes": [7, 3],
            "strides": [4, 2],
            "num_attention_heads": [1, 2],
            "mlp_ratios": [2, 2],
        },
        _image(),
    ),
    (
        "MobileViTModel",
        "MobileViTConfig",
        {
            "hidden_sizes": [16, 24, 32],
            "neck_hidden_sizes": [8, 8, 16, 16, 24, 32, 32],
            "image_size": 64,
        },
        _image(64),
    ),
    # audio
    (
        "WhisperModel",
        "WhisperConfig",
        {
            **{k: v for k, v in _SEQ.items() if k != "max_position_embeddings"},
            "max_source_positions": 50,
            "max_target_positions": 30,
            "num_mel_bins": 16,
        },
        lambda: {"input_features": torch.randn(2, 16, 100), "decoder_input_ids": _tokens(5)},
    ),
    ("Wav2Vec2Model", "Wav2Vec2Config", _SPEECH, lambda: {"input_values": torch.randn(2, 400)}),
    ("HubertModel", "HubertConfig", _SPEECH, lambda: {"input_values": torch.randn(2, 400)}),
    (
        "ASTModel",
        "ASTConfig",
        {
            **_WIDTH,
            "intermediate_size": 64,
            "max_length": 40,
            "num_mel_bins": 16,
            "patch_size": 8,
            "frequency_stride": 8,
            "time_stride": 8,
        },
        lambda: {"input_values": torch.randn(2, 40, 16)},
    ),
    # text and image
    (
        "CLIPModel",
        "CLIPConfig",
        {"text_config": {**_TEXT, **_ENDS}, "vision_config": _VISION, "projection_dim": 16},
        lambda: {**_text(), "pixel_values": torch.randn(2, 3, 32, 32)},
    ),
)


def transformers_models() -> Iterator[Entry]:
    """Tiny configurations of transformers' architectures."""
    declare_torchvision_operators()  # transformers imports torchvision where it is installed
    import transformers

    transformers.utils.logging.set_verbosity_error()
    for model, config, options, batch in _TRANSFORMERS:
        yield (
            f"transformers/{model}",
            lambda model=model, config=config, options=options: getattr(transformers, model)(
                getattr(transformers, config)(**options)
            ),
            batch,
        )


FAMILIES: dict[str, Callable[[], Iterator[Entry]]] = {
    "timm": timm_models,
    "torchvision": torchvision_models,
    "transformers": transformers_models,
}
