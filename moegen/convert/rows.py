"""Rows that many families share, ours: theirs."""

from moegen.convert.family import Rows
from moegen.convert.layout import Concat, Stack

EMBEDDING: Rows = {"embedding": "model.embed_tokens.weight", "norm": "model.norm.weight"}
HEAD: Rows = {"head": "lm_head.weight"}

NORMS: Rows = {
    "attention_norm": "input_layernorm.weight",
    "ffn_norm": "post_attention_layernorm.weight",
}
ATTENTION: Rows = {
    "attention.query": "self_attn.q_proj.weight",
    "attention.key": "self_attn.k_proj.weight",
    "attention.value": "self_attn.v_proj.weight",
    "attention.output": "self_attn.o_proj.weight",
}
QKV_BIAS: Rows = {
    "attention.query_bias": "self_attn.q_proj.bias",
    "attention.key_bias": "self_attn.k_proj.bias",
    "attention.value_bias": "self_attn.v_proj.bias",
}
QK_NORM: Rows = {
    "attention.query_norm": "self_attn.q_norm.weight",
    "attention.key_norm": "self_attn.k_norm.weight",
}
LATENT_ATTENTION: Rows = {
    "attention.latent_down": "self_attn.kv_a_proj_with_mqa.weight",
    "attention.latent_norm": "self_attn.kv_a_layernorm.weight",
    "attention.latent_up": "self_attn.kv_b_proj.weight",
    "attention.output": "self_attn.o_proj.weight",
}
FULL_QUERY: Rows = {"attention.query": "self_attn.q_proj.weight"}
LOW_RANK_QUERY: Rows = {
    "attention.query_down": "self_attn.q_a_proj.weight",
    "attention.query_norm": "self_attn.q_a_layernorm.weight",
    "attention.query_up": "self_attn.q_b_proj.weight",
}

DENSE: Rows = {
    "ffn.gate": "mlp.gate_proj.weight",
    "ffn.up": "mlp.up_proj.weight",
    "ffn.down": "mlp.down_proj.weight",
}
ROUTER: Rows = {"moe.router": "mlp.gate.weight"}
BALANCE_BIAS: Rows = {"moe.balance_bias": "mlp.gate.e_score_correction_bias"}
EXPERTS: Rows = {
    "moe.gate_up": Stack(
        Concat("mlp.experts.{expert}.gate_proj.weight", "mlp.experts.{expert}.up_proj.weight"),
        like="mlp.gate.weight",
    ),
    "moe.down": Stack("mlp.experts.{expert}.down_proj.weight", like="mlp.gate.weight"),
}
# As transformers' models hold them in memory; their files have one tensor an expert.
PACKED_EXPERTS: Rows = {
    "moe.gate_up": "mlp.experts.gate_up_proj",
    "moe.down": "mlp.experts.down_proj",
}
SHARED: Rows = {
    "moe.shared.gate": "mlp.shared_experts.gate_proj.weight",
    "moe.shared.up": "mlp.shared_experts.up_proj.weight",
    "moe.shared.down": "mlp.shared_experts.down_proj.weight",
}
