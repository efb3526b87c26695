"""GPT-2 (Radford et al. 2019)."""

from hagd.models.adapter import Adapter

ADAPTER = Adapter(
    name="gpt2",
    classes=("GPT2LMHeadModel",),
    backbone="transformer",
    embedding="transformer.wte",
    layers="transformer.h",
    attention="attn",
    attention_norm="ln_1",
    query="c_attn",
    key="c_attn",
    value="c_attn",
    fused="thirds",
    attention_output="c_proj",
    mlp="mlp",
    mlp_norm="ln_2",
    final_norm="transformer.ln_f",
    unembedding="lm_head",
    positions="transformer.wpe",
)
