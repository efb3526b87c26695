"""GPT-NeoX (Black et al. 2022), the architecture of Pythia: attention and MLP in parallel by default."""

from hagd.models.adapter import Adapter

ADAPTER = Adapter(
    name="gpt_neox",
    classes=("GPTNeoXForCausalLM",),
    backbone="gpt_neox",
    embedding="gpt_neox.embed_in",
    layers="gpt_neox.layers",
    attention="attention",
    attention_norm="input_layernorm",
    query="query_key_value",
    key="query_key_value",
    value="query_key_value",
    fused="heads",
    attention_output="dense",
    mlp="mlp",
    mlp_norm="post_attention_layernorm",
    final_norm="gpt_neox.final_layer_norm",
    unembedding="lm_head",
    rotary="gpt_neox.rotary_emb",
    renamed=(("lm_head", "embed_out"),),
)
