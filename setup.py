"""Packaging. Lower bounds are the versions the tests were really run with, on Python 3.11 and 3.12."""

from setuptools import find_packages, setup

setup(
    name="deepseek_jax",
    version="0.1.0",
    description="DeepSeek-V3 and R1 in JAX: from random weights or a released checkpoint to a reasoning model",
    packages=find_packages(include=["deepseek_jax", "deepseek_jax.*", "kernels_pallas", "kernels_pallas.*"]),
    package_data={"kernels_pallas": ["tuning/*.json"]},
    python_requires=">=3.11",
    install_requires=[
        "jax>=0.10.2",  # arrays, automatic differentiation, compilation
        "flax>=0.12.8",  # Linen modules
        "optax>=0.2.8",  # AdamW and schedules
        "orbax-checkpoint>=0.12.8",  # asynchronous, atomic, sharded checkpoints
        "ml-collections>=1.1.0",  # experiment files and command-line overrides
        "tensorflow-datasets>=4.9.10",  # dataset builders, used without TensorFlow
        # tensorflow-datasets needs it to prepare a dataset and does not ask for it itself
        "importlib_resources>=7.1.0",
        "grain>=0.2.18",  # shuffling, sharding and checkpointable position of the data
        "pyarrow>=26.0.1",  # parquet files
        "pyyaml>=6.0.3",  # task files for SkyPilot
        "tokenizers>=0.23.3",  # tokenizer.json files
        "safetensors>=0.8.0",  # checks the headers of Hugging Face's weight files
        "jinja2>=3.1.6",  # the chat templates that come with checkpoints
        "rich>=15.0.0",  # tables and the progress bar
        "matplotlib>=3.11.2",  # figures
        "tensorboardX>=2.6.5",  # event files for TensorBoard without TensorFlow
    ],
    extras_require={
        # runs the tests, two files at a time; compares trees of arrays; see "slurm"; checks and formats the code,
        # pinned to a minor version, since another one formats differently and has other rules
        "test": ["pytest>=9.2.0", "pytest-xdist>=3.8.0", "chex>=0.1.92", "submitit>=1.5.4", "ruff==0.17.*"],
        # the reference implementation that parity tests compare with
        "parity": ["torch==2.13.0", "transformers>=5.23.0"],
        "math": ["math-verify[antlr4-13-2]>=0.9.0"],  # equality of mathematical answers in natural language
        "slurm": ["submitit>=1.5.4"],  # sweeps as SLURM jobs that are requeued
        # sweeps on spot machines of any cloud; other clouds are other extras of it
        "clouds": ["skypilot[gcp]>=0.14.1"],
        # compile for TPUs and GPUs that are not there, and read the machine code
        "aot": [
            "jax[tpu]>=0.10.2",
            "jax-cuda13-plugin>=0.10.2",
            "jax-cuda13-pjrt>=0.10.2",
            "nvidia-cuda-nvdisasm>=13.0",
        ],
        "tpu": ["jax[tpu]>=0.10.2"],
        "cuda": ["jax[cuda13]>=0.10.2"],
        "notebooks": ["jupyterlab>=4.4"],
    },
)
