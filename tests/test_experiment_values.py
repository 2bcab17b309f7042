"""Values of an experiment's fields, set as a person does: by overrides of r1_tiny and of sweeps."""

from pathlib import Path

import pytest

from deepseek_jax.errors import ConfigError, UserError
from deepseek_jax.experiment import build_experiment, read_flags
from deepseek_jax.launch.jobs import build_jobs
from deepseek_jax.launch.sweep import Run, Sweep
from deepseek_jax.overrides import plain
from deepseek_jax.stages import build_stages
from deepseek_jax.training.schedules import constant, cosine, ramp

ROOT = Path(__file__).parents[1]
R1_TINY = str(ROOT / "experiments" / "r1_tiny.py")


def built(*overrides: str, base: str = R1_TINY) -> dict:
    """The stages by name, after `--config.` overrides."""
    config, name, workdir, _ = read_flags([f"--config={base}", *(f"--config.{override}" for override in overrides)])
    return {stage.name: stage for stage in build_stages(build_experiment(config, name, workdir, elsewhere=0))}


@pytest.mark.parametrize(
    ("override", "where", "expected"),
    [
        ("pretrain.data.shuffle=false", "pretrain.data.shuffle", False),
        ("sft.task_documents.whole_document=false", "sft.task_documents.whole_document", False),
        ("sft.task_documents.whole_document=True", "sft.task_documents.whole_document", True),
        ("pretrain.train.steps=1e3", "pretrain.train.steps", 1000),
        ("pretrain.train.eval_batches=None", "pretrain.train.eval_batches", None),
        ("pretrain.train.bias_update_speed=0", "pretrain.train.bias_update_speed", constant(0.0)),
        ("pretrain.train.optimizer.learning_rate=1e-3", "pretrain.train.optimizer.learning_rate", constant(1e-3)),
        (
            "pretrain.train.optimizer.learning_rate={'kind': 'cosine', 'peak': 1}",
            "pretrain.train.optimizer.learning_rate",
            cosine(1.0, 240),
        ),
        (
            "pretrain.train.bias_update_speed={'kind': 'ramp', 'start': 0, 'end': 1, 'steps': 7}",
            "pretrain.train.bias_update_speed",
            ramp(0.0, 1.0, 7),
        ),
        ("pretrain.train.optimizer.clip_norm=inf", "pretrain.train.optimizer.clip_norm", float("inf")),
        ("pretrain.data.sources[1].max_bytes=None", "pretrain.data.sources[1].max_bytes", None),
        ("pretrain.data.sources=[{'name': 'task', 'format': 'tokens'}]", "pretrain.data.sources[0].weight", 1.0),
        ("grpo.clip_epsilon=0.3", "grpo.program.config.clip_epsilon", (0.3, 0.3)),
        ("grpo.rewards={'os.path:basename': 2}", "grpo.program.config.rewards", (("os.path:basename", 2.0),)),
        ("grpo.preset=dr_grpo", "grpo.program.config.advantage_estimator", "group_mean"),
        ("grpo.eval.problems=64", "grpo.evaluation.num_sampled", 64),
        ("grpo.loop.keep_last=3", "grpo.loop.keep_last", 3),
        ("before.eval.temperature=1", "before.eval.temperature", 1.0),
    ],
)
def test_any_field_can_be_overridden(override, where, expected):
    value = built(override)
    stage, *steps = where.replace("[", ".[").split(".")
    value = value[stage]
    for step in steps:
        value = value[int(step[1:-1])] if step.startswith("[") else getattr(value, step)
    assert value == expected and type(value) is type(expected)


def test_a_network_without_experts_or_compressed_queries():
    model = built("model.moe=None", "model.attention.q_lora_rank=None")["grpo"].experiment.model.config
    assert model.moe is None and model.attention.q_lora_rank is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        *(
            (
                f"pretrain.train.optimizer.{field}=abc",
                f"config.pretrain: train.optimizer.{field}='abc': must be a number",
            )
            for field in ("b1", "weight_decay")
        ),
        *(
            (f"sft.train.{field}=2.5", f"config.sft: train.{field}=2.5: must be a whole number")
            for field in ("log_every", "microbatch")
        ),
        ("pretrain.data.shuffle=abc", "config.pretrain: data.shuffle='abc': must be True or False"),
        ("pretrain.data.streams=abc", "data.streams='abc': must be a whole number"),
        ("pretrain.data.sources[0].weight=nan", r"data.sources\[0\].weight='nan': must be a number"),
        ("pretrain.train.objective.loss_chunk=abc", "objective.loss_chunk='abc'"),
        ("pretrain.train.steps=-5", "config.pretrain: train.steps=-5: must be at least 1"),
        ("pretrain.train.optimizer.weight_decay=inf", "weight_decay='inf': must be a number"),
        ("pretrain.train.optimizer.learning_rate=-1e-3", "learning_rate goes down to -0.001"),
        ("pretrain.train.optimizer.learning_rate.peak=abc", "learning_rate.peak='abc': must be a number"),
        ("pretrain.train.optimizer.learning_rate={'kind': 'cosine', 'peak': 0, 'final_fraction': 2}", None),
        (
            "pretrain.train.optimizer.learning_rate={'kind': 'step_decay', 'peak': 1, 'at': 0.5}",
            "learning_rate.at=0.5: must be a list",
        ),
        ("pretrain.seq_len=0", "config.pretrain: seq_len=0: must be at least 2"),
        (
            "pretrain.seq_len=48",
            "seq_len=48: a demonstration of the task has up to 49 tokens .*raise seq_len to at least 49",
        ),
        ("task.bits=50", "config.pretrain: seq_len=98: a demonstration of the task has up to 109 tokens"),
        ("pretrain.batch_size=0", "config.pretrain: batch_size=0: a whole number of sequences, at least 1"),
        ("sft.batch_size=-3", "config.sft: batch_size=-3"),
        ("sft.train.microbatch=7", "config.sft: train.microbatch=7 does not divide batch_size=64"),
        ("pretrain.train.batch_size=32", "batch_size=64 and train.batch_size, which reaches 32"),
        (
            "pretrain.train.batch_size={'kind': 'ramp', 'start': 0.5, 'end': 64, 'steps': 9}",
            "train.batch_size=0.5: a whole number",
        ),
        ("grpo.loss_chunk=abc", "config.grpo: loss_chunk='abc'"),
        ("grpo.loss_chunk=0", "config.grpo: loss_chunk=0: must be at least 1"),
        ("grpo.eval.seed=abc", "config.grpo: eval.seed='abc': must be a whole number"),
        ("grpo.eval.top_p=0", "eval.top_p=0"),
        ("grpo.optimizer.b2=abc", "config.grpo: optimizer.b2='abc'"),
        (
            "grpo.optimizer.learning_rate={'kind': 'cosine', 'peak': 1e-3}",
            "optimizer.learning_rate and learning_rate and warmup_steps are two answers",
        ),
        ("grpo.group_size=abc", "config.grpo: group_size='abc': must be a whole number"),
        ("grpo.rewards=['accuracy']", r"config.grpo: rewards\[0\]='accuracy': must be a list of 2"),
        ("grpo.grpo.steps=3", "config.grpo: grpo: GRPO's own fields now stand in the stage's section itself"),
        ("grpo.clip_eps=0.2", "config.grpo: unknown field clip_eps: did you mean 'clip_epsilon'"),
        ("grpo.lop={}", "config.grpo: unknown field lop: did you mean 'loop'"),
        ("before.batch_size=0", "config.before: batch_size=0"),
        ("before.eval_batches=0", "config.before: eval_batches=0"),
        ("sft.task_documents.cot_probability=2", "task_documents.cot_probability=2.0: must be from 0 to 1"),
        ("sft.task_documents.count=0", "task_documents.count=0"),
        ("task.split_classes=abc", "task.parity.split_classes='abc': must be a whole number"),
        ("task=parity", "task='parity': must be a mapping"),
        ("model.tie_embeddings=abc", "model.tie_embeddings='abc': must be True or False"),
        ("model.rope.theta=-1", "RopeConfig.theta=-1"),
        ("model=3", "model=3: must be a mapping of the fields of ModelConfig"),
        ("precision.name=3", "config.precision=3: allowed|which has no fields"),
        ("grpo.grpo={1: 2}", "config.grpo.grpo has the key 1: names of fields are text"),
        ("tokenizer=" + "x" * 500, "no file has so long a name"),
        ("tokenizer=None", "config.tokenizer=None: must be text"),
        ("seed=1.5", "config.seed=1.5: must be a whole number"),
        ("seed=-1", "config.seed=-1: from 0"),
        ("stages=pretrain", "config.stages='pretrain': must be a list"),
        ("stages=[]", "config.stages is empty"),
        ("stages=['pretrain','pretrain']", "config.stages names 'pretrain' twice"),
        ("stages=['../x']", "config.stages names '../x'"),
        ("mesh.fsdp=abc", "mesh.fsdp='abc': must be a whole number"),
        ("mesh.rules={'embd': 'fsdp'}", "mesh.rules.embd: did you mean 'embed'"),
        ("mesh.fsdp=7", "fsdp of 7 in all does not divide pretrain.batch_size=64"),
        ("mesh.tensor=1000000000000", "at most 131072"),
    ],
)
def test_refused_before_anything_runs(override, message):
    if message is None:  # a cosine of 0 throughout is 0
        assert built(override)["pretrain"].train.optimizer.learning_rate.always(0.0)
        return
    with pytest.raises(UserError, match=message):
        built(override)


def test_the_batch_of_a_schedule_is_the_one_that_is_used_and_checked():
    schedule = "pretrain.train.batch_size={'kind': 'ramp', 'start': 16, 'end': 48, 'steps': 9}"
    assert built("pretrain.batch_size=None", schedule)["pretrain"].batch_size == 48
    assert built("pretrain.batch_size=48", schedule)["pretrain"].batch_size == 48
    assert built("pretrain.train.batch_size=None")["pretrain"].batch_size == 64
    with pytest.raises(ConfigError, match="microbatch=12 does not divide train.batch_size=16"):
        built("pretrain.batch_size=48", schedule, "pretrain.train.microbatch=12")
    with pytest.raises(ConfigError, match="missing field batch_size"):
        built("pretrain.batch_size=None")
    stages = "stages=['pretrain']"
    built("mesh.fsdp=16", schedule, "pretrain.batch_size=48", stages)
    for size in (12, 48):  # 12 divides the largest, and 48 too; the schedule starts at 16
        with pytest.raises(ConfigError, match=f"fsdp of {size} in all does not divide pretrain.batch_size=16"):
            built(f"mesh.fsdp={size}", schedule, "pretrain.batch_size=48", stages)
    with pytest.raises(ConfigError, match="fsdp of 8 in all does not divide pretrain.train.microbatch=4"):
        built("mesh.fsdp=8", "pretrain.train.microbatch=4", stages)
    with pytest.raises(ConfigError, match="context of 4 in all does not divide pretrain.seq_len=98"):
        built("mesh.context=4", stages)


def test_reinforcement_learning_has_the_same_optimizers():
    stage = built("grpo.optimizer.name=muon", "grpo.optimizer.muon.update_rms=0.18")["grpo"]
    assert stage.optimizer.muon.update_rms == 0.18 and set(stage.updated_by()) == {"muon", "adamw"}
    with pytest.raises(ConfigError, match="config.grpo: optimizer.name='adam': did you mean 'adamw'"):
        built("grpo.optimizer.name=adam")


def test_the_learning_rate_of_reinforcement_learning_has_one_meaning(tmp_path):
    lines = (
        "from r1_tiny import get_config as base\n\n\ndef get_config():\n    config = base()\n"
        "    del config.grpo.learning_rate, config.grpo.warmup_steps\n    return config\n"
    )
    (tmp_path / "mine.py").write_text(
        "import sys\n\nsys.path.append(" + repr(str(ROOT / "experiments")) + ")\n" + lines
    )
    given = built("grpo.optimizer.learning_rate={'kind': 'cosine', 'peak': 1e-3}", base=str(tmp_path / "mine.py"))[
        "grpo"
    ].program.optimizer
    plainly = built("grpo.learning_rate=1e-3", "grpo.warmup_steps=0", base=str(tmp_path / "mine.py"))[
        "grpo"
    ].program.optimizer
    import jax.numpy as jnp

    params = gradients = {"kernel": jnp.ones((2, 2))}
    first = []
    for optimizer in (given, plainly):
        state = optimizer.init(params)
        for _ in range(60):
            updates, state = optimizer.update(gradients, state, params)
        first.append(float(updates["kernel"][0, 0]))
    # over the stage's 80 steps
    assert first[0] / first[1] == pytest.approx(float(cosine(1e-3, 80)(59)) / 1e-3, rel=1e-4)
    # the recipe's own: no contradiction
    built("grpo.optimizer.learning_rate={'kind': 'ramp', 'start': 0, 'end': 3e-4, 'steps': 10}")


def test_an_evaluation_of_text_needs_no_task():
    alone = ("task=None", "stages=['before']")
    with pytest.raises(ConfigError, match="config.before: stage 'before' works on a task"):
        built(*alone)
    config, name, workdir, _ = read_flags([f"--config={R1_TINY}", *(f"--config.{override}" for override in alone)])
    del config.before["eval"]
    (stage,) = build_stages(build_experiment(config, name, workdir))
    assert stage.eval is None and stage.summary() == "bits per byte of stdlib"
    del config.before["data"]
    with pytest.raises(ConfigError, match="works on a task"):
        build_stages(build_experiment(config, name, workdir))


def test_a_task_asks_for_the_byte_tokenizer(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
    words.add_special_tokens(["<s>", "</s>"])
    words.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    for stage in ("pretrain", "grpo", "before"):
        with pytest.raises(
            ConfigError,
            match=f"config.{stage}: .*config.tokenizer=.*set it to 'byte', and model.vocab_size to 272 or more",
        ):
            built(f"tokenizer={tmp_path}", f"stages=['{stage}']")
    # the task is not used
    built(f"tokenizer={tmp_path}", "stages=['pretrain']", "pretrain.data.sources=[{'name': 'stdlib'}]")
    with pytest.raises(ConfigError, match="vocab_size is 200"):
        built("model.vocab_size=200")


def test_a_sweep_can_override_what_a_command_line_can(tmp_path):
    values = {
        "pretrain.train.optimizer.learning_rate": 1e-3,
        "pretrain.train.bias_update_speed": {"kind": "ramp", "start": 0.0, "end": 1.0, "steps": 7},
        "pretrain.data.sources[1].name": "2024",
        "pretrain.data.shuffle": False,
        "model.attention.q_lora_rank": None,
        "pretrain.train.optimizer.clip_norm": float("inf"),
        "grpo.rewards": {"os.path:basename": 1.0},
        "stages": ("pretrain",),
    }
    (job,) = build_jobs(Sweep(R1_TINY, [Run("a", values)]), tmp_path)
    fields = plain(job.config)
    assert (
        fields["pretrain"]["train"]["optimizer"] == {"learning_rate": 1e-3, "clip_norm": "inf"}
        and fields["model"]["attention"]["q_lora_rank"] is None
    )
    assert fields["pretrain"]["train"]["bias_update_speed"] == values["pretrain.train.bias_update_speed"]
    assert fields["pretrain"]["data"]["sources"][1]["name"] == "2024" and fields["pretrain"]["data"]["shuffle"] is False
    assert fields["grpo"]["rewards"] == {"os.path:basename": 1.0} and tuple(fields["stages"]) == ("pretrain",)
