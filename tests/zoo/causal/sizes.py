"""How a configuration becomes small: rules by the name of a field, and what they do not get right.

Hidden width 32 with 4 heads of 8, 2 key heads, 2 layers, or one of each kind where there are more
kinds of layers, 99 tokens, 4 experts of which 2 are used.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

HIDDEN, HEADS, KEY_HEADS, WIDTH, INNER, LAYERS, VOCABULARY = 32, 4, 2, 8, 48, 2, 99
LONGEST = 64

RULES: tuple[tuple[str, Any], ...] = (
    (r"(.*_)?type_vocab_size", 2),
    (r"vocab_size_per_layer_input|.*vocab_size", VOCABULARY),
    (r"hidden_size_per_layer_input|laurel_rank", 8),
    (
        r"hidden_size|d_model|n_embd|emb_dim|embedding_dim|embedding_size|word_embed_proj_dim",
        HIDDEN,
    ),
    (r"(input|output)_embedding_size|hidden_size_global|lru_width|out_hidden_size", HIDDEN),
    (r"(moe_|shared_|dense_|expert_ffn_)?(intermediate|hidden)_size(_mlp)?", INNER),
    (r"(.*_)?(intermediate_size|ffn_hidden_size|ffn_dim|feed_forward_size|mlp_dim)", INNER),
    (r"d_ff|dff|dim_ff|d_inner|n_inner", INNER),
    (r"num_hidden_layers|n_layers?|num_layers|(.*_)?(encoder|decoder)_layers|num_blocks", LAYERS),
    (r"depth", LAYERS),
    (r"num_key_value_heads|num_kv_heads|kv_n_heads|swa_num_key_value_heads", KEY_HEADS),
    (r"linear_num_key_heads", 2),
    (r"(.*_)?(num_attention_heads|attention_heads|n_heads?|num_heads)", HEADS),
    (r"linear_num_value_heads", HEADS),
    (r"qk_head_dim", 2 * WIDTH),
    (r"(.*_)?head_dim|attention_head_size|d_head|dim_head|kv_channels|d_kv", WIDTH),
    (r"linear_(key|value)_head_dim", WIDTH),
    (r"qk_(nope|rope)_head_dim|v_head_dim|index_head_dim", WIDTH),
    (r"q_lora_rank|kv_lora_rank|o_lora_rank|hc_lowrank|gated_norm_rank|adapter_rank", 12),
    (r"index_topk", 16),
    (r"rotary_dim", WIDTH // 2),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|context_length", LONGEST),
    (r"max_(source|target)_positions|model_max_length", LONGEST),
    (r"num_(local_|routed_)?experts|n_routed_experts|moe_num_experts", 4),
    (r"num_experts_per_tok(en)?|moe_topk|moe_k|moe_top_k", 2),
    (r"n_group|num_expert_group|topk_group", 1),
    (r"(moe_num|n|num)_shared_experts?", 1),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index|moe_layer_end_index", 1),
    (r"sliding_window(_size)?|attention_window_size|window_size|local_attention|rel_extent", 8),
    (r"attention_chunk_size", 16),
    (r"(.*_)?(d_state|state_size)", 8),
    (r"(mamba_|linear_|short_)?(d_conv|conv_kernel|conv_kernel_size|conv_kernel_dim)", 4),
    (r"mamba_chunk_size|chunk_size", 8),
    (r"image_size|crop_size", 32),
    (r"router_hidden_size|prompt_length|d_rel", 8),
    (r"pad_token_id", 0),
    (r"bos_token_id|decoder_start_token_id", 1),
    (r"eos_token_id|eos_token", 2),
    (r"forced_eos_token_id|begin_suppress_tokens", None),
    (r"num_nextn_predict_layers", 0),
)
"""The first that matches the whole name of a field decides, where the field has a number."""

PER_LAYER = ("layer_types", "mlp_layer_types", "indexer_types", "layers_block_type", "block_types")
"""Lists with one entry for each layer."""

_TWO_KINDS = ["linear_attention", "hybrid"]
_HEAD = {"head_dim": WIDTH}
_LATENT = {"num_key_value_heads": HEADS}
_INDEXED = {**_LATENT, "per_layer_config": {}, "head_dim": 2 * WIDTH}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_WIDER = {"per_layer_config": {1: {"head_dim": 2 * WIDTH}}}
_INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": WIDTH,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
    "ngram_vocab_size_base": 97,
    "make_ngram_vocab_size_divisible_by": 1,
    "split_ngram_parts": 1,
    "ple_embed_dim": 16,
    "heads_per_ngram": 2,
}
_JAMBA = {"attn_layer_period": 2, "attn_layer_offset": 1}
OTHERS: Mapping[str, Mapping[str, Any]] = {
    "bailing_hybrid": {"num_key_value_heads": HEADS},
    "blt": {
        "num_hidden_layers": 2,
        "encoder_hash_byte_group_vocab": 50,
        "local_attention_window_len": 8,
    },
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 8},
    "cohere_compass_text": {
        "rope_parameters": {
            "sliding_attention": {**_ROPE, "mrope_section": [2, 1, 1]},
            "full_attention": None,
        }
    },
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
    },
    "dots3_note": _INDEXED,
    "dots3_note_text": _INDEXED,
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8},
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.95, 0.0, 0.95, 0.0],
        "intermediate_size": [INNER] * 4,
    },
    "gemma4": {"text_config": _WIDER},
    "gemma4_text": _WIDER,
    "gemma4_unified": {"text_config": _WIDER},
    "gemma4_unified_text": _WIDER,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "granitemoehybrid": {
        "layer_types": ["linear_attention", "full_attention"],
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
    },
    "hunyuan_v1_dense": _HEAD,
    "hunyuan_v1_moe": _HEAD,
    "jamba": {**_JAMBA, "expert_layer_period": 2, "expert_layer_offset": 1, "mamba_dt_rank": 4},
    "kimi_linear": _LATENT,
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "longcat_flash": {"zero_expert_num": 2},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 2},
    "ministral": _HEAD,
    "musicgen": {"num_codebooks": 1},
    "musicgen_melody": {"num_codebooks": 1},
    "nemotron": {**_HEAD, "num_key_value_heads": KEY_HEADS},
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 2},
    "qwen4_exp": _INDEXER,
    "qwen4_exp_text": _INDEXER,
    "reformer": {"is_decoder": True, "axial_pos_shape": [8, 8], "axial_pos_embds_dim": [16, 16]},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128, "chunk_size": 16},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": _TWO_KINDS + _TWO_KINDS, "num_hidden_layers": 4},
    "zamba2": {"layers_block_type": _TWO_KINDS + _TWO_KINDS, "num_hidden_layers": 4},
    "zaya": {"num_experts_per_tok": 1},
}
"""By family: what the rules get wrong."""

_ASSISTANT = "reads the keys, values and hidden states of a larger model that it drafts for"
IMPOSSIBLE: Mapping[str, str] = {
    "gemma4_assistant": _ASSISTANT,
    "gemma4_unified_assistant": _ASSISTANT,
}
"""Families which are no causal language models by themselves, and why."""


def small(name: str) -> tuple[bool, Any]:
    """Whether a rule knows the field, and the value."""
    for pattern, value in RULES:
        if re.fullmatch(pattern, name):
            return True, value
    return False, None
