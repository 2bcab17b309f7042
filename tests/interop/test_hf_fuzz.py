"""Damaged files of a Hugging Face folder: each is read or refused by a UserError, never anything else. 10,000 of each
with `-m fuzz`."""

import json

import pytest
from damage import COUNTS, damaged, damaged_text, tried

from deepseek_jax.errors import CheckpointError
from deepseek_jax.interop import config_from_hf, open_folder
from deepseek_jax.interop.hf_config import read_config
from deepseek_jax.interop.safetensors_io import DTYPES, read_header, read_tensor

CONFIG = dict(
    model_type="deepseek_v3", vocab_size=96, hidden_size=32, intermediate_size=40, moe_intermediate_size=12,
    num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4, kv_lora_rank=14, q_lora_rank=18,
    qk_nope_head_dim=10, qk_rope_head_dim=16, v_head_dim=6, n_routed_experts=16, num_experts_per_tok=3,
    n_shared_experts=1, first_k_dense_replace=3, rms_norm_eps=1e-6, n_group=4, topk_group=2, routed_scaling_factor=2.5,
    norm_topk_prob=True, scoring_func="sigmoid", topk_method="noaux_tc", rope_theta=1e4, tie_word_embeddings=False,
    num_nextn_predict_layers=1, max_position_embeddings=163840, eos_token_id=1, bos_token_id=0, head_dim=16,
    hidden_act="silu",
    rope_scaling=dict(
        type="yarn", factor=40, original_max_position_embeddings=4096, beta_fast=32, beta_slow=1, mscale=1.0,
        mscale_all_dim=1.0
    ),
    quantization_config=dict(quant_method="fp8", fmt="e4m3", weight_block_size=[128, 128], activation_scheme="dynamic",
                             scale_fmt="ue8m0"),
)  # fmt: skip
HEADER = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    "c": {"dtype": "F8_E4M3", "shape": [1, 3], "data_offsets": [32, 35]},
}
INDEX = {"metadata": {"total_size": 35}, "weight_map": dict.fromkeys("abc", "one.safetensors")}
VALUES = [
    None, -1, 0, 1, 2, 3, 7, 1e9, 10**30, 10**400, 1.5, -0.0, 1e-300, float("nan"), float("inf"), True, False, "x", "",
    "8", "sigmoid", "\ud800", "\x00", "../x", ".", "F32", "I64", "F8_E4M3", [], {}, [1], [-1], [2.0, 3], ["2", 3],
    [[1]], {"a": 1}, [0, 24, 1], [24, 0], [0, 10**20], [128, 128], "deepseek", "deepseek_v2", "one.safetensors",
    "two.safetensors",
]  # fmt: skip


@pytest.mark.parametrize("count", COUNTS)
def test_headers(tmp_path, count):
    file, whole = tmp_path / "x.safetensors", json.dumps(HEADER).encode()

    def attempt(rng):
        raw = damaged_text(rng, HEADER, VALUES) if rng.random() < 0.9 else whole
        length = (
            len(raw)
            if rng.random() < 0.9
            else rng.choice([0, 1, 2**63, 2**64 - 1, len(raw) + 50, max(len(raw) - 3, 0)])
        )
        file.write_bytes(
            (length.to_bytes(8, "little") + raw + bytes(rng.choice([35, 35, 35, 34, 36, 0])))[
                : rng.choice([5, 10**6, 10**6, 10**6])
            ]
        )
        for tensor in read_header(file).values():
            if tensor.dtype in DTYPES:
                assert read_tensor(tensor).shape == tensor.shape

    tried(count, attempt)


@pytest.mark.parametrize("count", COUNTS)
def test_configs(tmp_path, count):
    file = tmp_path / "config.json"

    def attempt(rng):
        file.write_bytes(damaged_text(rng, CONFIG, VALUES))
        config_from_hf(read_config(tmp_path))

    tried(count, attempt)


@pytest.mark.parametrize("count", COUNTS)
def test_quantization_configs(count):
    known = {"quant_method", "fmt", "weight_block_size", "activation_scheme", "scale_fmt"}

    def attempt(rng):
        quantization = damaged(rng, {"q": CONFIG["quantization_config"]}, VALUES)
        fields = CONFIG | {"quantization_config": quantization.get("q")}
        config_from_hf(fields)
        left = {name: value for name, value in (quantization.get("q") or {}).items() if name in known}
        whole = CONFIG["quantization_config"] | {"scale_fmt": left.get("scale_fmt")}
        # what is read is what we can read
        assert left.get("scale_fmt") in (None, "ue8m0") and left.items() <= whole.items()

    tried(count, attempt)


@pytest.mark.parametrize("count", COUNTS)
def test_index_files(tmp_path, count):
    """The network is never the one of config.json, so that problems are there; they too are words that can be
    printed."""
    raw = json.dumps(HEADER).encode()
    (tmp_path / "one.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(35))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))

    def attempt(rng):
        (tmp_path / "model.safetensors.index.json").write_bytes(damaged_text(rng, INDEX, VALUES))
        opened = open_folder(tmp_path)
        assert opened.problems
        with pytest.raises(CheckpointError, match="can't be imported"):
            opened.raise_problems()
        "\n".join(opened.problems).encode()

    tried(count, attempt)
