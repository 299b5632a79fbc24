"""Small native models of every family, of transformers' real classes, with random weights and a tokenizer trained here."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from samples import TINY_TEXT
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

T: Any = transformers  # whose constructors' types are not to the point here
SIZES = {name: value for name, value in TINY_TEXT.items() if name != "model_type"}
SIZES |= {"vocab_size": 340, "max_position_embeddings": 2048, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
WINDOWS = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
VISION = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
PATCHES = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2, "size": {"shortest_edge": 128, "longest_edge": 1024}}
GEMMA3 = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
GEMMA4 = {"image_token": "<|image|>", "boi_token": "<|image>", "eoi_token": "<image|>"}
GEMMA4 |= {"audio_token": "<|audio|>", "boa_token": "<|audio>", "eoa_token": "<audio|>"}
QWEN_VL = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
QWEN_VL |= {"vision_start_token": "<|vision_start|>", "vision_end_token": "<|vision_end|>"}
QWEN_OMNI = {"image_token": "<|IMAGE|>", "audio_token": "<|AUDIO|>", "video_token": "<|VIDEO|>"}
QWEN_OMNI |= {"vision_bos_token": "<|vision_bos|>", "vision_eos_token": "<|vision_eos|>"}
QWEN_OMNI |= {"audio_bos_token": "<|audio_bos|>", "audio_eos_token": "<|audio_eos|>"}
PICTURES, FILMS, SOUNDS = ("image", "page"), ("video",), ("audio",)


def tokenizer_with(named: dict[str, str], *, begins: bool = False, further: tuple[str, ...] = ()) -> Any:
    """A tokenizer of bytes that knows a family's special tokens by name."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", *further, *named.values()]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(["the cat sat on the mat 0123456789"], trainer)
    if begins:
        template = {"single": "<bos> $A", "pair": "<bos> $A $B", "special_tokens": [("<bos>", backend.token_to_id("<bos>"))]}
        backend.post_processor = processors.TemplateProcessing(**template)
    more = {"bos_token": "<bos>", "unk_token": "<unk>"} if begins else {}
    return T.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", extra_special_tokens=dict(named), **more
    )


def gemma4(family: str) -> tuple[Any, Any]:
    name = {"embedding_gemma2": "EmbeddingGemma2", "gemma4": "Gemma4", "gemma4_unified": "Gemma4Unified"}[family]
    unified = family == "gemma4_unified"
    tokenizer = tokenizer_with(GEMMA4, begins=True, further=("<|video|>",))
    patches = {"patch_size": 2, "max_soft_tokens": 70, "pooling_kernel_size": 3}
    pictures = (T.Gemma4UnifiedImageProcessor if unified else T.Gemma4ImageProcessor)(**patches)
    sound = T.Gemma4UnifiedAudioFeatureExtractor() if unified else T.Gemma4AudioFeatureExtractor(feature_size=16)
    processor = getattr(T, f"{name}Processor")(
        feature_extractor=sound,
        image_processor=pictures,
        tokenizer=tokenizer,
        video_processor=getattr(T, f"{name}VideoProcessor")(**patches),
        image_seq_length=70,
    )
    text = {**SIZES, **WINDOWS, "global_head_dim": 16}
    if family == "embedding_gemma2":
        text |= {"hidden_size_per_layer_input": 8, "embedding_dim": 16, "num_global_key_value_heads": 1}
    if family == "gemma4":
        text |= {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": SIZES["vocab_size"]}
    if unified:
        vision = T.Gemma4UnifiedVisionConfig(
            patch_size=2, pooling_kernel_size=3, mm_embed_dim=24, mm_posemb_size=64, output_proj_dims=24
        )
        audio = T.Gemma4UnifiedAudioConfig()
    else:
        own = {
            "num_key_value_heads": 2,
            "head_dim": 12,
            "patch_size": 2,
            "pooling_kernel_size": 3,
            "position_embedding_size": 128,
        }
        vision = T.Gemma4VisionConfig(**VISION, **own)
        audio = T.Gemma4AudioConfig(
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            subsampling_conv_channels=[16, 4],
            output_proj_dims=24,
            conv_kernel_size=3,
        )
    token = tokenizer.convert_tokens_to_ids
    ids = {f"{medium}_token_id": token(f"<|{medium}|>") for medium in ("image", "audio", "video")}
    ids |= {"boi_token_id": token("<|image>"), "eoi_token_id": token("<image|>")}
    ids |= {"boa_token_id": token("<|audio>"), "eoa_token_index": token("<audio|>")}
    text_config = getattr(T, f"{name}TextConfig")(**text)
    return getattr(T, f"{name}Config")(text_config=text_config, vision_config=vision, audio_config=audio, **ids), processor


def gemma3() -> tuple[Any, Any]:
    tokenizer = tokenizer_with(GEMMA3, begins=True)
    pictures = T.Gemma3ImageProcessor(size={"height": 16, "width": 16})
    processor = T.Gemma3Processor(image_processor=pictures, tokenizer=tokenizer, image_seq_length=4)
    token = tokenizer.convert_tokens_to_ids
    config = T.Gemma3Config(
        text_config=T.Gemma3TextConfig(**SIZES, **WINDOWS),
        vision_config=T.SiglipVisionConfig(**VISION, image_size=16, patch_size=4, vision_use_head=False),
        mm_tokens_per_image=4,
        boi_token_index=token("<start_of_image>"),
        eoi_token_index=token("<end_of_image>"),
        image_token_index=token("<image_soft_token>"),
    )
    return config, processor


def qwen_parts(third: bool) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Fields of text and vision, and the processors of pictures and films."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "patch_size": 4, "out_hidden_size": 32}
    if third:
        text = {**SIZES, "rope_parameters": {**rope, "mrope_interleaved": True}}
        vision |= {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    else:
        text = {name: value for name, value in SIZES.items() if name != "head_dim"} | {"rope_parameters": rope}
        vision |= {"window_size": 16, "fullatt_block_indexes": [1]}
    films = T.Qwen3VLVideoProcessor if third else T.Qwen2VLVideoProcessor
    processors_: dict[str, Any] = {"image_processor": T.Qwen2VLImageProcessor(**PATCHES)}
    processors_["video_processor"] = films(**PATCHES, min_frames=2, max_frames=4, cap_pixels_per_frame=False)
    return text, vision, processors_


def qwen_vl(family: str) -> tuple[Any, Any]:
    third = family == "qwen3_vl"
    name = "Qwen3VL" if third else "Qwen2_5_VL"
    tokenizer = tokenizer_with(QWEN_VL)
    text, vision, parts = qwen_parts(third)
    token = tokenizer.convert_tokens_to_ids
    ids = {"image_token_id": token("<|image_pad|>"), "video_token_id": token("<|video_pad|>")}
    ids |= {"vision_start_token_id": token("<|vision_start|>"), "vision_end_token_id": token("<|vision_end|>")}
    config = getattr(T, f"{name}Config")(text_config=text, vision_config=vision, **ids)
    return config, getattr(T, f"{name}Processor")(tokenizer=tokenizer, **parts)


def qwen_omni(family: str) -> tuple[Any, Any]:
    third = family == "qwen3_omni_moe"
    name = "Qwen3OmniMoe" if third else "Qwen2_5Omni"
    tokenizer = tokenizer_with(QWEN_OMNI)
    tokenizer.padding_side = "left"
    text, vision, parts = qwen_parts(third)
    if third:
        text |= {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
        parts["video_processor"] = T.Qwen2VLVideoProcessor(**PATCHES, min_frames=2, max_frames=4, cap_pixels_per_frame=False)
    audio = {"num_mel_bins": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32, "d_model": 32}
    audio |= {"max_source_positions": 200, "output_dim": 32}
    audio |= {"n_window": 50, "n_window_infer": 100, "downsample_hidden_size": 8} if third else {"n_window": 20}
    token = tokenizer.convert_tokens_to_ids
    suffix = "id" if third else "index"
    ids = {f"{medium}_token_{suffix}": token(f"<|{medium.upper()}|>") for medium in ("image", "video", "audio")}
    config = getattr(T, f"{name}ThinkerConfig")(
        text_config=text, vision_config=vision, audio_config=audio, audio_start_token_id=token("<|audio_bos|>"), **ids
    )
    config.vision_start_token_id = token("<|vision_bos|>")
    sound = T.WhisperFeatureExtractor(feature_size=16, chunk_length=4)
    return config, getattr(T, f"{name}Processor")(tokenizer=tokenizer, feature_extractor=sound, **parts)


def siglip(family: str) -> tuple[Any, Any]:
    tokenizer = tokenizer_with({})
    tokenizer.model_max_length = 64
    text = {**VISION, "vocab_size": 340, "max_position_embeddings": 64, "projection_size": 24}
    text |= {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    if family == "siglip2":
        config = T.Siglip2Config(text_config=text, vision_config={**VISION, "patch_size": 4, "num_patches": 16})
        pictures = T.Siglip2ImageProcessor(patch_size=4, max_num_patches=16)
        return config, T.Siglip2Processor(image_processor=pictures, tokenizer=tokenizer)
    config = T.SiglipConfig(text_config=text, vision_config={**VISION, "image_size": 16, "patch_size": 4})
    pictures = T.SiglipImageProcessor(size={"height": 16, "width": 16})
    return config, T.SiglipProcessor(image_processor=pictures, tokenizer=tokenizer)


@dataclass(frozen=True)
class Family:
    """How to build one, and the kinds of media that it takes."""

    build: Any
    kinds: tuple[str, ...]


FAMILIES = {
    "embedding_gemma2": Family(lambda: gemma4("embedding_gemma2"), PICTURES + FILMS + SOUNDS),
    "gemma3": Family(gemma3, PICTURES),
    "gemma4": Family(lambda: gemma4("gemma4"), PICTURES + FILMS + SOUNDS),
    "gemma4_unified": Family(lambda: gemma4("gemma4_unified"), PICTURES + FILMS + SOUNDS),
    "qwen2_5_vl": Family(lambda: qwen_vl("qwen2_5_vl"), PICTURES + FILMS),
    "qwen3_vl": Family(lambda: qwen_vl("qwen3_vl"), PICTURES + FILMS),
    "qwen2_5_omni": Family(lambda: qwen_omni("qwen2_5_omni"), PICTURES + FILMS + SOUNDS),
    "qwen3_omni_moe": Family(lambda: qwen_omni("qwen3_omni_moe"), PICTURES + FILMS + SOUNDS),
    "siglip": Family(lambda: siglip("siglip"), PICTURES + FILMS),
    "siglip2": Family(lambda: siglip("siglip2"), PICTURES + FILMS),
}


def write_model(folder: Path, family: str) -> Path:
    """A model's folder as its publisher would write it: configuration, safetensors, processor."""
    config, processor = FAMILIES[family].build()
    torch.manual_seed(0)
    model = T.AutoModel.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
