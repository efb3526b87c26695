"""Llama (Touvron et al. 2023) and the models that share its layout: RMSNorm, rotary, gated MLP."""

from hagd.models.adapter import Adapter

ADAPTER = Adapter(
    name="llama",
    classes=("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "GemmaForCausalLM"),
    backbone="model",
    embedding="model.embed_tokens",
    layers="model.layers",
    attention="self_attn",
    attention_norm="input_layernorm",
    query="q_proj",
    key="k_proj",
    value="v_proj",
    fused=None,
    attention_output="o_proj",
    mlp="mlp",
    mlp_norm="post_attention_layernorm",
    final_norm="model.norm",
    unembedding="lm_head",
    rotary="model.rotary_emb",
)
