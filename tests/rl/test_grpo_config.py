"""The published recipes, figure by figure, and what is refused."""

import pytest

from deepseek_jax.errors import ConfigError
from deepseek_jax.rl.config import PRESETS, GRPOConfig, preset


def fields(name, *names):
    config = preset(name)
    return tuple(getattr(config, n) for n in names)


def test_r1():
    sizes = (
        "prompts_per_rollout",
        "group_size",
        "num_minibatches",
        "inner_epochs",
        "minibatch_size",
        "completions_per_rollout",
    )
    for name in ("r1_zero", "r1_stage1", "r1_stage2"):
        assert fields(name, *sizes) == (512, 16, 16, 1, 512, 8192)
        assert fields(name, "learning_rate", "kl_coefficient", "reference_refresh_every", "ref_mix") == (
            3e-6,
            0.001,
            400,
            1.0,
        )
        assert fields(name, "clip_epsilon", "kl_estimator", "aggregation") == ((10.0, 10.0), "k3", "sequence_mean")
        assert fields(name, "advantage_estimator", "max_completion_length") == ("group_std", 32_768)
    assert fields("r1_zero", "steps", "temperature", "rollouts") == (10_400, 1.0, 650)
    assert dict(preset("r1_zero").rewards) == {"accuracy": 1.0, "format": 1.0}
    assert fields("r1_stage1", "temperature") == (1.0,)
    assert dict(preset("r1_stage1").rewards) == {"accuracy": 1.0, "format": 1.0, "language_consistency": 1.0}
    assert fields("r1_stage2", "temperature", "steps") == (0.7, 1_700)


def test_deepseekmath():
    assert fields("deepseekmath", "group_size", "completions_per_rollout", "steps_per_rollout") == (64, 1024, 1)
    assert fields("deepseekmath", "learning_rate", "kl_coefficient", "max_completion_length") == (1e-6, 0.04, 1024)
    assert fields("deepseekmath", "aggregation", "kl_estimator", "advantage_estimator") == (
        "sequence_mean",
        "k3",
        "group_std",
    )


def test_v32():
    assert fields("v32", "advantage_estimator", "kl_estimator") == ("group_mean", "unbiased_k3")
    assert fields("v32", "aggregation", "ratio") == ("sequence_mean", "token")
    assert preset("v32").off_policy_delta > 0 and preset("v32").replay_experts


def test_dapo():
    assert fields("dapo", "clip_epsilon", "aggregation", "kl_coefficient", "learning_rate") == (
        (0.2, 0.28),
        "token_mean",
        0.0,
        1e-6,
    )
    assert fields("dapo", "prompts_per_rollout", "group_size", "num_minibatches", "minibatch_size") == (
        512,
        16,
        16,
        512,
    )
    assert fields("dapo", "max_completion_length", "overlong_buffer", "wrong_reward", "warmup_steps") == (
        20_480,
        4_096,
        -1.0,
        320,
    )
    assert preset("dapo").oversampling > 1


def test_dr_grpo():
    assert fields("dr_grpo", "advantage_estimator", "aggregation", "kl_coefficient") == ("group_mean", "constant", 0.0)
    assert fields("dr_grpo", "group_size", "minibatch_size", "max_completion_length", "learning_rate") == (
        8,
        128,
        3_000,
        1e-6,
    )


@pytest.mark.parametrize("name", PRESETS)
def test_dictionary_round_trip(name):
    assert GRPOConfig.from_dict(preset(name).to_dict()) == preset(name)
    hash(preset(name))  # static argument of jit


def test_from_dict_starts_from_a_preset():
    config = GRPOConfig.from_dict(
        {"preset": "r1_stage2", "group_size": 8, "clip_epsilon": 0.2, "rewards": {"accuracy": 2}}
    )
    assert (config.group_size, config.temperature, config.clip_epsilon, config.rewards) == (
        8,
        0.7,
        (0.2, 0.2),
        (("accuracy", 2.0),),
    )


@pytest.mark.parametrize(
    "given,message",
    [
        ({"group_size": 1}, "at least 2"),
        ({"num_minibatches": 7}, "must divide prompts_per_rollout"),
        ({"temperature": 0.0}, "above 0"),
        ({"clip_epsilon": (0.2, 0.0)}, "R1 uses 10"),
        ({"clip_epsilon": (0.2,)}, "must be a list of 2"),
        ({"ref_mix": 0.0}, "ref_mix"),
        ({"dual_clip": 0.9}, "dual_clip"),
        ({"aggregation": "token-mean"}, "did you mean 'token_mean'"),
        ({"kl_estimator": "k4"}, "unbiased_k3"),
        ({"rewards": {}}, "at least one reward"),
        ({"rewards": {"accuracy": 0.0}}, "every weight is 0"),
        ({"rewards": [("format", 1), ("format", 1)]}, "twice"),
        ({"overlong_buffer": 50_000}, "overlong_buffer=50000: must be at least 0 and below 32,768"),
        ({"advantage_eps": 0.0, "advantage_std_floor": 0.0}, "both 0"),
        ({"inner_epochs": 0}, "at least 1"),
        ({"max_completion_length": 10**12}, "= 1000000001024: must be at most 2147483647; positions are int32"),
        ({"steps": 10**12}, "steps=1000000000000: must be from 1 to 2,147,483,647; a step is an int32"),
        ({"kl_coefficient": -0.1}, "at least 0"),
        ({"group_size": "16"}, "whole number"),
        ({"temperature": "hot"}, "a number"),
        ({"replay_experts": "no"}, "True or False"),
        ({"groupsize": 4}, "did you mean 'group_size'"),
        ({"preset": "r1zero"}, "did you mean 'r1_zero'"),
    ],
)
def test_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        GRPOConfig.from_dict(given)
