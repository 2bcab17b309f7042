"""experiments/ablations/sliding_window_mla.py: what a query sees, in whole sequences and through the cache."""

import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sliding_window_mla

from deepseek_jax.__main__ import main
from deepseek_jax.accounting import flops
from deepseek_jax.accounting.counts import count_parameters
from deepseek_jax.errors import CheckpointError, ConfigError
from deepseek_jax.generation.__main__ import main as generate
from deepseek_jax.interop import config_to_hf
from deepseek_jax.model.attention_core import Tokens
from deepseek_jax.model.cache import init_cache, write
from deepseek_jax.model.config import MLAConfig, ModelConfig, RopeConfig
from deepseek_jax.model.ops import Ops
from deepseek_jax.model.runtime import RuntimeConfig
from deepseek_jax.model.transformer import Transformer, abstract_variables
from deepseek_jax.parallel.mesh import build_mesh
from deepseek_jax.parallel.rules import build_rules
from deepseek_jax.parallel.sharding import MeshOps
from deepseek_jax.training.checkpoints import load_variables

FOLDER = Path(__file__).parents[2] / "experiments" / "ablations"
WINDOW, B, T = 3, 2, 11
SIZES = dict(num_heads=2, kv_lora_rank=8, qk_nope_head_dim=6, qk_rope_head_dim=8, v_head_dim=5, q_lora_rank=10)
# Unoptimized code: these programs run once on a few numbers, so that compiling them is what costs time.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def model(window: int | None, layers: int = 2, ops: Ops = Ops()) -> Transformer:
    attention = MLAConfig(**SIZES) if window is None else sliding_window_mla.SlidingWindowMLA(**SIZES, window=window)
    fields = dict(vocab_size=40, hidden_size=16, num_layers=layers, intermediate_size=24, attention=attention)
    return Transformer(ModelConfig(**fields, rope=RopeConfig(theta=100.0)), ops)


@functools.cache
def variables(layers: int = 2):
    """Numbers of std 0.3, norms near 1; drawn without a compile."""
    rng = np.random.default_rng(0)

    def leaf(path, shape):
        norm = "scale" in jax.tree_util.keystr(path)
        return jnp.float32(norm + (0.1 if norm else 0.3) * rng.normal(size=shape.shape))

    return jax.tree_util.tree_map_with_path(leaf, abstract_variables(model(None, layers)))


TOKENS = np.random.default_rng(0).integers(1, 40, (B, T)).astype(np.int32)
POSITIONS = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
ONE_DOCUMENT = np.ones((B, T), np.int32)
SEGMENTS = np.array([[1] * T, [1] * 4 + [2] * 5 + [0] * 2], np.int32)


def logits_of(transformer: Transformer, variables, *arguments, cache=None):
    tokens, segments, positions = arguments
    output = transformer.apply(variables, tokens, segment_ids_BT=segments, positions_BT=positions, cache=cache)
    return transformer.apply(variables, output.hidden_BTD, method="unembed"), output


@functools.cache
def compiled(transformer: Transformer):
    return jit(functools.partial(logits_of, transformer))


def whole(transformer: Transformer, layers: int = 2, segments=SEGMENTS):
    return compiled(transformer)(variables(layers), TOKENS, segments, POSITIONS)


@pytest.mark.parametrize("chunk", [0, 4])
def test_a_query_sees_its_window_and_nothing_else(chunk):
    """Of one layer, position t is what plain MLA gives where only the window's tokens are in t's document."""
    windowed, _ = whole(model(WINDOW, 1, Ops(runtime=RuntimeConfig(attention_chunk=chunk))), 1)
    plain = model(None, 1)
    call = jit(functools.partial(logits_of, plain, variables(1)))
    for b in range(B):
        seen = np.zeros((T, T), np.int32)
        for t in range(T):
            for s in range(max(0, t - WINDOW + 1), t + 1):
                seen[t, s] = SEGMENTS[b, s] == SEGMENTS[b, t]
        repeated = np.broadcast_to(TOKENS[b], (T, T)), seen, np.broadcast_to(POSITIONS[b], (T, T))
        alone, _ = call(*repeated)
        for t in np.flatnonzero(SEGMENTS[b]):
            np.testing.assert_allclose(windowed[b, t], alone[t, t], atol=1e-5)


def test_a_window_as_long_as_the_sequence_is_mla_bit_for_bit():
    plain, as_long, shorter = (whole(model(window, 1), 1, ONE_DOCUMENT) for window in (None, T, T - 1))
    for got, want in zip(jax.tree.leaves(as_long), jax.tree.leaves(plain), strict=True):
        np.testing.assert_array_equal(got, want)
    assert np.abs(shorter[0] - plain[0]).max() > 1e-4


def test_a_sequence_divided_among_devices_is_seen_through_the_same_window():
    sizes = {"data": 1, "fsdp": 2, "expert": 1, "context": 4, "tensor": 1}
    ops = MeshOps("float32", mesh=build_mesh(sizes, {}, jax.devices()), rules=build_rules())
    arguments = variables(1), TOKENS[:, :8], SEGMENTS[:, :8], POSITIONS[:, :8]
    alone, divided = (compiled(model(WINDOW, 1).clone(ops=ops))(*arguments)[0] for ops in (Ops(), ops))
    np.testing.assert_allclose(divided, alone, atol=1e-5)


def decoded(transformer: Transformer):
    """The logits of positions 5 to 10: prefill of five tokens, then two at a time through the cache."""
    _, output = whole(transformer, segments=ONE_DOCUMENT)
    cache = init_cache(transformer.config, B, T + 1, jnp.float32)
    cache = write(cache, jax.tree.map(lambda entry: entry[:, :, :5], output.latents), POSITIONS[:, :5], 0)
    step, found = jit(functools.partial(logits_of, transformer, variables())), []
    for start in range(5, T, 2):
        slots = slice(start, start + 2)
        logits, new = step(TOKENS[:, slots], ONE_DOCUMENT[:, slots], POSITIONS[:, slots], cache=cache)
        cache = write(cache, new.latents, POSITIONS[:, slots], start)
        found.append(logits)
    return jnp.concatenate(found, axis=1)


def test_decoding_through_the_cache_equals_whole_sequences(monkeypatch):
    transformer = model(WINDOW)
    expected = whole(transformer, segments=ONE_DOCUMENT)[0][:, 5:]
    np.testing.assert_allclose(decoded(transformer), expected, atol=1e-5)

    mask = Tokens.cached_and_new_mask  # a cache that is read without the window
    monkeypatch.setattr(Tokens, "cached_and_new_mask", lambda self, attends_to: mask(self, None))
    assert np.abs(decoded(transformer) - expected).max() > 1e-3


def test_flops_count_the_window_and_parameters_are_mlas():
    window, plain = sliding_window_mla.SlidingWindowMLA(**SIZES, window=WINDOW), MLAConfig(**SIZES)
    for length in (2, WINDOW, 100):
        pairs = sum(min(t + 1, WINDOW) for t in range(length))
        assert window.mean_keys(length) == pytest.approx(pairs / length, abs=0.5)  # half a key is the diagonal's
    assert window.mean_keys(WINDOW) == plain.mean_keys(WINDOW)
    assert (window.cached_keys(2), window.cached_keys(100)) == (2, WINDOW)
    a, b = model(WINDOW).config, model(None).config
    assert count_parameters(a).main == count_parameters(b).main
    saved = flops.forward_flops_per_token(b, 36) - flops.forward_flops_per_token(a, 36)
    assert saved == 2 * plain.pair_flops * (18 - 2.875)
    assert (
        flops.decode_flops_per_token(b, 100) - flops.decode_flops_per_token(a, 100) == 2 * plain.cached_pair_flops * 97
    )


def test_a_window_of_nothing_is_refused_and_an_export_too():
    with pytest.raises(ConfigError, match="SlidingWindowMLA.window=0: must be an integer, at least 1"):
        sliding_window_mla.SlidingWindowMLA(**SIZES, window=0)
    with pytest.raises(CheckpointError, match="cannot say attention.kind='sliding_window_mla:SlidingWindowMLA'"):
        config_to_hf(model(WINDOW).config)


def test_a_run_goes_on_and_its_checkpoint_generates(tmp_path, monkeypatch, capsys):
    """The class is found again by its name; without its folder the message says what to put on PYTHONPATH."""
    tiny = {"num_layers": 1, "hidden_size": 8, "attention.window": 5, "moe": None}
    flags = [f"--config={FOLDER / 'sliding_window_mla.py'}", f"--workdir={tmp_path}", "--config.stages=('pretrain',)"]
    flags += [f"--config.model.{field}={value}" for field, value in tiny.items()]
    flags += ["--config.pretrain.batch_size=2", "--config.pretrain.task_documents.count=64"]
    flags += ["--config.pretrain.train.optimizer.learning_rate=1e-3", "--config.pretrain.train.eval_batches=1"]
    for steps in (1, 2):
        assert main([*flags, f"--config.pretrain.train.steps={steps}"]) == 0
    assert "going on from step 1 of 2" in capsys.readouterr().out
    assert generate([f"--checkpoint={tmp_path}", "--prompt=0", "--max_new_tokens=2"]) in (0, 1)
    attention = load_variables(tmp_path)[0].attention
    assert (type(attention), attention.window) == (sliding_window_mla.SlidingWindowMLA, 5)

    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if folder != str(FOLDER)])
    monkeypatch.delitem(sys.modules, "sliding_window_mla")
    with pytest.raises(CheckpointError, match="No module named 'sliding_window_mla'.*on PYTHONPATH"):
        load_variables(tmp_path)
