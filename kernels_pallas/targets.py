"""Compiling for NVIDIA GPUs on a host that has none, and reading the machine code of the kernels.

It needs the two packages of the CUDA plugin (jax-cuda13-plugin and jax-cuda13-pjrt, of jax's own version), but no
driver and no GPU; the package nvidia-cuda-nvdisasm adds the disassembly. The machine code tells registers, spills and
instructions. It does not tell whether the results are right, nor how long they take.
"""

import collections
import contextlib
import dataclasses
import importlib.util
import os
import pathlib
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping

import jax
from jax.experimental import topologies

from kernels_pallas.hopper import REGISTERS, SHARED_MEMORY, SHARED_MEMORY_PER_CORE


@dataclasses.dataclass(frozen=True)
class Target:
    """A GPU as XLA's `GpuTargetConfigProto` describes it, from `xla/backends/gpu/target_config/specs` of openxla/xla.
    `kind` is the driver's name for it."""

    kind: str
    major: int  # of the compute capability
    cores: int  # streaming multiprocessors
    memory: int  # bytes
    bandwidth: int  # bytes per second
    l2: int = 52_428_800  # bytes of cache

    def proto(self) -> str:
        """The text form of the proto. The numbers written out below are the same for all targets."""
        return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {SHARED_MEMORY_PER_CORE}
  threads_per_core_limit: 2048
  core_count: {self.cores}
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {self.bandwidth}
  l2_cache_size: {self.l2}
  clock_rate_ghz: 1.98
  device_memory_size: {self.memory}
  shared_memory_per_block_optin: {SHARED_MEMORY}
  cuda_compute_capability {{ major: {self.major} feature_extension: ACCELERATED_FEATURES }}
  registers_per_core_limit: {REGISTERS}
  registers_per_block_limit: {REGISTERS}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 12 }}
runtime_version {{ major: 13 minor: 0 patch: 0 }}
device_description_str: "{self.kind}"
"""


H100 = Target("NVIDIA H100 80GB HBM3", major=9, cores=132, memory=84929347584, bandwidth=3352320000000)
H200 = Target("NVIDIA H200", major=9, cores=132, memory=151397597184, bandwidth=4800000000000)
B200 = Target("NVIDIA B200", major=10, cores=148, memory=191514411008, bandwidth=7672320000000, l2=132_644_864)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """Figures of one kernel's machine code. `instructions` counts the SASS opcodes in its text, such as "QGMMA",
    without their modifiers; it is None without nvdisasm. `ptx` is the assembly from which it was made."""

    registers: int
    spill_stores: int  # bytes, like the next two
    spill_loads: int
    shared_memory: int
    instructions: Mapping[str, int] | None
    ptx: str

    @property
    def fp8_products(self) -> int:
        """The number of warpgroup matrix instructions on E4M3 × E4M3 in the kernel's text; each covers 32 of K."""
        return self._products("k32.f32.e4m3.e4m3")

    @property
    def bf16_products(self) -> int:
        """The number of those on bfloat16; each covers 16 of K."""
        return self._products("k16.f32.bf16.bf16")

    def _products(self, kind: str) -> int:
        return len(re.findall(rf"wgmma\.mma_async\.sync\.aligned\.m64n\d+{re.escape(kind)}", self.ptx))


# by lowered program: jax 0.10 compiles equal kernels once in a process, and dumps them once
_compiled: dict[str, tuple[Kernel, ...]] = {}


def compile_for(target: Target, fn: Callable, *shapes: jax.ShapeDtypeStruct) -> tuple[Kernel, ...]:
    """Compiles jit(fn) for one `target`, and returns its Mosaic GPU kernels in the order in which they were compiled.

    `shapes` are pytrees of ShapeDtypeStruct. Raises RuntimeError without the CUDA plugin, and whatever lowering or
    compiling raises.
    """
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        raise RuntimeError(
            "compile_for: needs the packages jax-cuda13-plugin and jax-cuda13-pjrt, of the same version as jax"
        )
    topology = topologies.get_topology_desc(platform="cuda", target_config=target.proto(), topology="1x1x1")
    mesh = topologies.make_mesh(topology, (1,), ("device",))
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated), shapes)
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.sharding.use_abstract_mesh(mesh.abstract_mesh))
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        # read whenever a kernel is lowered and compiled
        stack.enter_context(_environment(MOSAIC_GPU_DUMP_TO=folder, **_disassembler()))
        lowered = jax.jit(fn).lower(*shapes)
        lowered.compile()
        dumped = sorted(pathlib.Path(folder).glob("*.ptxas"), key=lambda log: log.stat().st_mtime_ns)
        program = lowered.as_text()
        if dumped or program not in _compiled:
            _compiled[program] = tuple(_read(path) for path in dumped)
    return _compiled[program]


@contextlib.contextmanager
def _environment(**variables: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _disassembler() -> dict[str, str]:
    """The environment variable by which Mosaic GPU finds bin/nvdisasm, if nvidia-cuda-nvdisasm is installed."""
    package = importlib.util.find_spec("nvidia")
    for folder in package.submodule_search_locations or () if package else ():
        for program in pathlib.Path(folder).glob("*/bin/nvdisasm"):
            return {"MOSAIC_GPU_CUDA_ROOT": str(program.parent.parent)}
    return {}


def _read(ptxas: pathlib.Path) -> Kernel:
    """Reads the dumps of one kernel: PTX, the assembler's log, the passes' log, and SASS."""
    log = ptxas.read_text()
    with ptxas.with_suffix(".mlir-passes.log").open() as passes:
        shared = next(found for line in passes if (found := re.search(r"dynamic_shared_memory_size %c(\d+)_i32", line)))
    sass, instructions = ptxas.with_suffix(".sass_ctrl"), None
    if sass.exists():
        instructions = collections.Counter(
            re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)", sass.read_text())
        )
    number = lambda pattern: int(re.search(pattern, log).group(1))
    return Kernel(
        registers=number(r"Used (\d+) registers"),
        spill_stores=number(r"(\d+) bytes spill stores"),
        spill_loads=number(r"(\d+) bytes spill loads"),
        shared_memory=int(shared.group(1)),
        instructions=instructions,
        ptx=ptxas.with_suffix(".ptx").read_text(),
    )
