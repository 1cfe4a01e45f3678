"""Configurations of tiny, randomly initialised models: every kind of cache and attention that we serve."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

VOCAB_SIZE = 1024

BASE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "layer_norm_eps": 1e-5,
    "vocab_size": VOCAB_SIZE,
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
    "rope_theta": 10000.0,
    "attention_bias": False,
}

YARN = {"type": "yarn", "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
MAMBA2 = {
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "ssm_state_size": 16,
    "conv_kernel": 4,
    "n_groups": 1,
    "use_conv_bias": True,
    "time_step_limit": (0.0, 100.0),
}
GATED_DELTA = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 2,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1}
LLAMA4_TEXT = {
    "num_hidden_layers": 4,
    "attention_chunk_size": 8,
    "no_rope_layers": [1, 1, 1, 0],
    "intermediate_size_mlp": 128,
    "num_local_experts": 2,
    "num_experts_per_tok": 1,
    "interleave_moe_layer_step": 1,
    "use_qk_norm": True,
    "attn_temperature_tuning": 4,
    "floor_scale": 8192,
    "attn_scale": 0.1,
    "mlp_bias": False,
    "rope_scaling": None,
}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-rope3": {"model_type": "llama", "rope_scaling": LLAMA3_ROPE},
    "qwen2-yarn": {"model_type": "qwen2", "rope_scaling": YARN},
    "qwen3": {},
    "qwen3_moe": {**EXPERTS, "norm_topk_prob": True, "mlp_only_layers": []},
    "phi3": {},
    "olmo2": {},
    "cohere2": {
        "sliding_window": 8,
        "sliding_window_pattern": 2,
        "logit_scale": 1.0,
        "layer_norm_bias": False,
        "use_qk_norm": False,
    },
    "starcoder2": {"norm_epsilon": 1e-5},
    "glm4": {"partial_rotary_factor": 0.5},
    "gpt2": {"n_ctx": 512, "n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 512, "layer_norm_epsilon": 1e-5},
    "gpt_bigcode": {
        "n_embd": 64,
        "n_layer": 2,
        "n_inner": 128,
        "n_head": 4,
        "n_positions": 512,
        "layer_norm_epsilon": 1e-5,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "gemma2": {
        "query_pre_attn_scalar": 16,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "sliding_window": 8,
    },
    "gemma3_text": {
        "sliding_window": 8,
        "sliding_window_pattern": 2,
        "query_pre_attn_scalar": 16,
        "rope_local_base_freq": 10000.0,
        "rope_global_base_freq": 1e6,
        "rope_traditional": False,
    },
    "gemma4_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "sliding_window": 8,
        "global_head_dim": 16,
        "vocab_size_per_layer_input": VOCAB_SIZE,
        "hidden_size_per_layer_input": 16,
        "final_logit_softcapping": 30.0,
    },
    "gemma3n": {
        "text_config": {
            **BASE,
            "model_type": "gemma3n_text",
            "num_hidden_layers": 6,
            "intermediate_size": 128,
            "num_kv_shared_layers": 2,
            "vocab_size_per_layer_input": VOCAB_SIZE,
            "sliding_window": 8,
            "rope_local_base_freq": 10000.0,
            "final_logit_softcapping": 30.0,
            "layer_types": ["sliding_attention", "full_attention"] * 3,
            "activation_sparsity_pattern": [0.0] * 6,
            "hidden_size_per_layer_input": 16,
            "altup_num_inputs": 2,
            "altup_coef_clip": 120.0,
            "altup_correct_scale": True,
            "altup_active_idx": 0,
            "laurel_rank": 8,
        }
    },
    "gpt_oss": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        "tie_word_embeddings": False,
        "rope_scaling": {**YARN, "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0},
    },
    "mistral3": {
        "text_config": {
            **BASE,
            "model_type": "ministral3",
            "rope_parameters": {
                **YARN,
                "rope_theta": 10000.0,
                "beta_fast": 32,
                "beta_slow": 1,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.1,
            },
        }
    },
    "deepseek_v3": {
        "kv_lora_rank": 16,
        "q_lora_rank": 32,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.0,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "moe_layer_freq": 1,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    },
    "llama4_text": LLAMA4_TEXT,
    "llama4": {"text_config": {**BASE, **LLAMA4_TEXT, "model_type": "llama4_text"}},
    "mamba": {
        "state_size": 8,
        "conv_kernel": 4,
        "expand": 2,
        "time_step_rank": 4,
        "use_bias": False,
        "use_conv_bias": True,
    },
    "mamba2": {
        "num_heads": 8,
        "state_size": 16,
        "conv_kernel": 4,
        "n_groups": 1,
        "use_bias": False,
        "use_conv_bias": True,
        "time_step_limit": (0.0, 100.0),
        "layer_norm_epsilon": 1e-5,
        "expand": 2,
        "time_step_rank": 4,
        "chunk_size": 64,
    },
    "rwkv7": {
        "norm_eps": 1e-5,
        "a_low_rank_dim": 8,
        "v_low_rank_dim": 8,
        "gate_low_rank_dim": 8,
        "decay_low_rank_dim": 8,
        "tie_word_embeddings": False,
    },
    "qwen3_next": {
        **GATED_DELTA,
        **EXPERTS,
        "shared_expert_intermediate_size": 32,
        "mlp_only_layers": [],
        "partial_rotary_factor": 0.25,
        "norm_topk_prob": True,
    },
    "qwen3_5": {
        "text_config": {
            **BASE,
            **GATED_DELTA,
            "model_type": "qwen3_5_text",
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.25,
                "mrope_section": [1, 1, 0],
            },
        }
    },
    "lfm2": {
        "conv_dim": 64,
        "conv_dim_out": 64,
        "conv_L_cache": 3,
        "conv_bias": False,
        "block_dim": 64,
        "block_ff_dim": 128,
        "block_multiple_of": 32,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": False,
        "norm_eps": 1e-5,
        "full_attn_idxs": [1],
        "layer_types": ["conv", "full_attention"],
    },
    "falcon_h1": {
        "attention_in_multiplier": 1.0,
        "attention_out_multiplier": 1.0,
        "embedding_multiplier": 1.0,
        "key_multiplier": 1.0,
        "lm_head_multiplier": 1.0,
        "mamba_chunk_size": 64,
        "mamba_conv_bias": True,
        "mamba_d_conv": 4,
        "mamba_d_head": 16,
        "mamba_d_ssm": 128,
        "mamba_d_state": 16,
        "mamba_expand": 2,
        "mamba_n_groups": 1,
        "mamba_n_heads": 8,
        "mamba_norm_before_gate": False,
        "mamba_proj_bias": False,
        "mamba_rms_norm": False,
        "mamba_use_mlp": True,
        "mlp_bias": False,
        "mlp_expansion_factor": 2,
        "mlp_multipliers": [1.0, 1.0],
        "projectors_bias": False,
        "rope_traditional": False,
        "ssm_in_multiplier": 1.0,
        "ssm_multipliers": [1.0] * 5,
        "ssm_out_multiplier": 1.0,
    },
    "nemotron_h": {
        **MAMBA2,
        "hybrid_override_pattern": "M*",
        "mamba_proj_bias": False,
        "layer_norm_epsilon": 1e-5,
        "mlp_bias": False,
        "use_bias": False,
        "mlp_hidden_act": "relu2",
        "tie_word_embeddings": False,
        "norm_eps": 1e-5,
    },
}


def config_of(name: str) -> dict[str, Any]:
    """The config.json of a tiny model."""
    own = ARCHITECTURES[name]
    return {**BASE, "model_type": name, **own}


def write_tiny_model(
    name: str, folder: Path, *, seed: int = 0, scale: float = 0.08, changes: dict[str, Any] | None = None
) -> Path:
    """A model of `ARCHITECTURES` with random weights, as mlx-lm reads it; `changes` are made to its config.json."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    from vllm_mlx.runner.load import untouched_file_limit

    with untouched_file_limit():
        from mlx_lm.utils import _get_classes

    config = config_of(name) | (changes or {})
    model_class, args_class = _get_classes(config)
    mx.random.seed(seed)
    weights = {}
    for key, value in tree_flatten(model_class(args_class.from_dict(config)).parameters()):
        is_matrix = value.ndim > 1 and not key.endswith("A_log")
        weights[key] = mx.random.normal(value.shape) * scale if is_matrix else value
    folder.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder
