"""Compiled programs as text: trip counts, device groups, and the traffic of programs whose traffic is known in closed
form."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from deepseek_jax.accounting.chips import CHIPS
from deepseek_jax.dry_run import hlo
from deepseek_jax.dry_run.collectives import replica_groups, traffic
from deepseek_jax.dry_run.compiled import compiled_report
from deepseek_jax.dry_run.hbm import memory_traffic
from deepseek_jax.dry_run.program_flops import FlopAssumptions
from deepseek_jax.dry_run.topologies import Topology, topology

MESH = {"x": 2, "y": 4}
TARGETS = [
    pytest.param(name, marks=pytest.mark.aot(chip=name.partition(":")[0]))
    for name in ("v5e:2x4", "v5p:2x2x2", "v6e:2x4", "tpu7x:2x2x1", "h100:8")
]


def target_mesh(name: str) -> Mesh:
    return Mesh(np.array(topology(name).devices).reshape(2, 4), ("x", "y"))


def compiled(name: str, fn, shape, spec, out_spec, dtype=jnp.float32) -> hlo.Module:
    mesh = target_mesh(name)
    x = jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
    mapped = jax.shard_map(fn, mesh=mesh, in_specs=spec, out_specs=out_spec)
    return hlo.parse(jax.jit(mapped).lower(x).compile().as_text())


# ----------------------------------------------------------------------------------------------------------------------
# Text


@pytest.mark.parametrize(
    "text, groups",
    [
        ("{{0,1},{2,3}}, dimensions={0}", [[0, 1], [2, 3]]),
        ("{}", [[0, 1, 2, 3]]),
        ("[2,2]<=[4], ", [[0, 1], [2, 3]]),
        ("[2,2]<=[2,2]T(1,0), ", [[0, 2], [1, 3]]),
        ("mesh['a'=2,'b'=2] {'b'}, dimensions", [[0, 1], [2, 3]]),
        ("mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
        ("mesh['a'=2,'b'=2] {'b','a'}", [[0, 2, 1, 3]]),
        ("mesh['a'=4] {'a':(1)2}", [[0, 2], [1, 3]]),
        ("mesh['a'=4] {'a':(2)2}", [[0, 1], [2, 3]]),
    ],
)
def test_replica_groups(text, groups):
    assert replica_groups(f"all-gather(%x), replica_groups={text}", 4).tolist() == groups


def test_unknown_groups_are_refused():
    with pytest.raises(ValueError, match="unknown form"):
        replica_groups("replica_groups=everybody", 4)
    with pytest.raises(ValueError, match="ENTRY"):
        hlo.parse("not a module")


LOOP = """
%add (a: f32[], b: f32[]) -> f32[] {{
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}}

%next (p0: s32[], p1: s32[]) -> s32[] {{
  %p0 = s32[] parameter(0)
  %p1 = s32[] parameter(1)
  ROOT %add.1 = s32[] add(%p0, %p1)
}}

%body (carry: (s32[], f32[8], s32[], s32[])) -> (s32[], f32[8], s32[], s32[]) {{
  %carry = (s32[], f32[8]{{0}}, s32[], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%carry), index=0
  %x = f32[8]{{0}} get-tuple-element(%carry), index=1
  %step = s32[] get-tuple-element(%carry), index=2
  %limit = s32[] get-tuple-element(%carry), index=3
  %sum.1 = f32[8]{{0}} all-reduce(%x), replica_groups={{{{0,1,2,3}},{{4,5,6,7}}}}, to_apply=%add
  %fusion = s32[] fusion(%i, %step), kind=kLoop, calls=%next
  ROOT %out = (s32[], f32[8]{{0}}, s32[], s32[]) tuple(%fusion, %sum.1, %step, {limit})
}}

%condition (carry.1: (s32[], f32[8], s32[], s32[])) -> pred[] {{
  %carry.1 = (s32[], f32[8]{{0}}, s32[], s32[]) parameter(0)
  %i.1 = s32[] get-tuple-element(%carry.1), index=0
  %limit.1 = s32[] get-tuple-element(%carry.1), index=3
  ROOT %compare = pred[] compare(%i.1, %limit.1), direction={direction}
}}

ENTRY %main (x.1: f32[8]) -> f32[8] {{
  %x.1 = f32[8]{{0}} parameter(0)
  %start = s32[] constant(1)
  %two = s32[] constant(2)
  %copy = s32[] copy(%two)
  %ten = s32[] constant(10)
  %tuple = (s32[], f32[8]{{0}}, s32[], s32[]) tuple(%start, %x.1, %copy, %ten)
  %while = (s32[], f32[8]{{0}}, s32[], s32[]) while(%tuple), condition=%condition, body=%body{noted}
  ROOT %result = f32[8]{{0}} get-tuple-element(%while), index=1
}}
"""


@pytest.mark.parametrize(
    "changes, trips",
    [
        ({}, 5),  # 1, 3, 5, 7, 9
        ({"direction": "LE"}, 5),
        ({"noted": ', backend_config={"known_trip_count":{"n":"3"}}'}, 3),
        ({"limit": "%fusion"}, None),  # the bound moves with the loop
        ({"direction": "NE"}, 5),
        ({"direction": "GT"}, None),  # ends at once, or never
    ],
)
def test_trip_counts(changes, trips):
    module = hlo.parse(LOOP.format(**{"limit": "%limit", "direction": "LT", "noted": ""} | changes))
    scope = hlo.entry_scope(module)
    assert hlo.trip_count(module["main"].instructions["while"], scope) == trips
    found = traffic(module, 8, while_trips=100)
    assert found.by_axes(MESH) == {"y": {"all-reduce": 2 * 32 * 3 // 4 * (trips or 100)}}
    assert found.assumed_loops == (("while",) if trips is None else ())


TRUE_AND_FALSE = "true_computation=%sums_0, false_computation=%sums_1"
BRANCHES = """HloModule test

FileNames
1 "model.py"

FileLocations
1 {{file_name_id=1 function_name_id=1 line=30 end_line=31 column=8 end_column=9}}
2 {{file_name_id=1 function_name_id=1 line=40 end_line=40 column=8 end_column=9}}

StackFrames
1 {{file_location_id=1}}
2 {{file_location_id=2 parent_frame_id=1}}
3 {{file_location_id=1 parent_frame_id=2}}

%add (a: f32[], b: f32[]) -> f32[] {{
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}}

%sums_1 (p.1: f32[8]) -> f32[8] {{
  %p.1 = f32[8]{{0}} parameter(0)
  ROOT %s.1 = f32[8]{{0}} all-reduce(%p.1), replica_groups={{}}, to_apply=%add
}}

%sums_3 (p.2: f32[8]) -> f32[8] {{
  %p.2 = f32[8]{{0}} parameter(0)
  %s.2 = f32[8]{{0}} all-reduce(%p.2), replica_groups={{}}, to_apply=%add
  %s.3 = f32[8]{{0}} all-reduce(%s.2), replica_groups={{}}, to_apply=%add
  ROOT %s.4 = f32[8]{{0}} all-reduce(%s.3), replica_groups={{}}, to_apply=%add
}}

%sums_0 (p.3: f32[8]) -> f32[8] {{
  %p.3 = f32[8]{{0}} parameter(0)
  ROOT %same = f32[8]{{0}} negate(%p.3)
}}

ENTRY %main (x: f32[8], yes: pred[], other: s32[]) -> f32[8] {{
  %x = f32[8]{{0}} parameter(0)
  %yes = pred[] parameter(1)
  %other = s32[] parameter(2)
  %index = s32[] convert(%yes)
  %first = f32[8]{{0}} conditional(%index, %x, %x), branch_computations={{%sums_1, %sums_3}}{forward}
  ROOT %second = f32[8]{{0}} conditional({test}, %first, %first), {branches}{backward}
}}
"""
FORWARD, BACKWARD, ELSEWHERE = (f', metadata={{op_name="cond" stack_frame_id={frame}}}' for frame in (1, 3, 2))


@pytest.mark.parametrize(
    "forward, backward, test, least, most",
    [
        # Together: 1 + 1 of False or 3 + 0 of True; alone each has a cheaper branch, not the same one.
        (FORWARD, BACKWARD, "%other", 2, 3),
        ("", "", "%yes", 2, 3),
        (FORWARD, ELSEWHERE, "%yes", 2, 3),
        (FORWARD, ELSEWHERE, "%other", 1, 4),
        ("", "", "%other", 1, 4),
    ],
)
def test_compiled_conditionals_of_one_predicate_take_the_same_branch(forward, backward, test, least, most):
    module = hlo.parse(BRANCHES.format(branches=TRUE_AND_FALSE, forward=forward, backward=backward, test=test))
    assert [len(traffic(module, 8, branch=branch).collectives) for branch in ("least", "most")] == [least, most]


def test_conditionals_in_a_loop_count_as_often_as_they_run():
    """False has one sum outside of the loop and one in each of its four rounds; True has three and none. Written
    together, they take True."""
    loop = """
%body (c: (s32[], f32[8], s32[])) -> (s32[], f32[8], s32[]) {{
  %c = (s32[], f32[8]{{0}}, s32[]) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %y = f32[8]{{0}} get-tuple-element(%c), index=1
  %test = s32[] get-tuple-element(%c), index=2
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %inside = f32[8]{{0}} conditional(%test, %y, %y), branch_computations={{%sums_1, %sums_0}}{backward}
  ROOT %out = (s32[], f32[8]{{0}}, s32[]) tuple(%next, %inside, %test)
}}

%condition (k: (s32[], f32[8], s32[])) -> pred[] {{
  %k = (s32[], f32[8]{{0}}, s32[]) parameter(0)
  %j = s32[] get-tuple-element(%k), index=0
  %limit = s32[] constant(4)
  ROOT %less = pred[] compare(%j, %limit), direction=LT
}}

ENTRY"""
    text = BRANCHES.replace("\nENTRY", loop, 1)
    second = text[text.index("  ROOT %second") : text.rindex("}}")]
    text = text.replace(
        second,
        """  %start = s32[] constant(0)
  %all = (s32[], f32[8]{{0}}, s32[]) tuple(%start, %first, %other)
  %loop = (s32[], f32[8]{{0}}, s32[]) while(%all), condition=%condition, body=%body
  ROOT %last = f32[8]{{0}} get-tuple-element(%loop), index=1
""",
    )
    module = hlo.parse(text.format(forward=FORWARD, backward=BACKWARD))
    for branch, sums in (("least", 3), ("most", 1 + 4)):
        assert sum(c.times for c in traffic(module, 8, branch=branch).collectives) == sums


def test_branches_follow_another_measure():
    """Each branch has so many collectives, whatever the other one costs; memory follows as well."""
    module = hlo.parse(BRANCHES.format(branches=TRUE_AND_FALSE, forward=FORWARD, backward=BACKWARD, test="%other"))
    place = hlo.Place("model.py", 30, 8)
    assert (
        module.place(module["main"].instructions["first"])
        == module.place(module["main"].instructions["second"])
        == place
    )
    for taken, sums in ((0, 1 + 1), (1, 3 + 0)):
        found = traffic(module, 8, taken={(place, 2): taken})
        assert [len(found.collectives), found.taken[place, 2]] == [sums, taken]
        # A sum reads 32 bytes and writes 32, and so does a negation; the conversion of the predicate moves 5.
        assert memory_traffic(module, taken=found.taken) == 64 * (2 + 2 * taken) + 5


def test_a_report_counts_the_branches_of_the_flops():
    """Of a compiled program whose bytes would choose otherwise: three sums of True, not two of False, on every line of
    the report."""

    class Compiled:
        def as_text(self):
            return BRANCHES.format(branches=TRUE_AND_FALSE, forward=FORWARD, backward=BACKWARD, test="%other")

        def memory_analysis(self):
            return types.SimpleNamespace(
                argument_size_in_bytes=0,
                output_size_in_bytes=0,
                alias_size_in_bytes=0,
                temp_size_in_bytes=0,
                generated_code_size_in_bytes=0,
            )

    target = Topology(
        "", CHIPS["h100"], tuple(types.SimpleNamespace(platform="gpu", process_index=0) for _ in range(8)), ()
    )
    mesh = types.SimpleNamespace(size=8, devices=np.array(target.devices, dtype=object), shape={"x": 8})
    for taken, sums, moved in ((1, 3, 64 * 4 + 5), (0, 2, 64 * 2 + 5)):
        report = compiled_report(
            Compiled(),
            {},
            {},
            {(hlo.Place("model.py", 30, 8), 2): taken},
            target,
            mesh,
            FlopAssumptions(branch="least"),
        )
        assert report["collective_bytes"] == {"x": {"all-reduce": sums * 2 * 32 * 7 // 8}}
        assert report["hbm_bytes"] == moved


def test_arrays_of_a_shape():
    assert (
        hlo.shape_bytes("(bf16[4,256]{1,0:T(8,128)(2,1)}, s4[3]{0}, u32[]{:S(2)}, token[], f8e4m3fn[2,2])")
        == 2048 + 2 + 4 + 0 + 4
    )
    assert list(hlo.arrays("(f32[2]{0:T(128)S(1)}, pred[3])")) == [(8, False), (3, True)]


# ----------------------------------------------------------------------------------------------------------------------
# Real programs. Sizes are large enough that XLA leaves the collectives as they are.

ROWS, WIDTH = 4096, 1024
LOCAL = ROWS // 8 * WIDTH * 4  # bytes on one device


@pytest.mark.parametrize("target", TARGETS)
def test_collectives_in_a_loop(target):
    """One of every kind, three times, with something between them that XLA can't move across. A sum of which every
    device keeps its part may come out as a TPU's own fusion of an all-reduce and a slice."""

    def body(x, _):
        x = lax.pcast(lax.psum(x, "y"), "y", to="varying") ** 2
        x = lax.all_to_all(x, "y", 0, 0, tiled=True) ** 2
        x = lax.all_to_all(x, ("x", "y"), 0, 0, tiled=True) ** 2
        x = lax.ppermute(x, "x", [(0, 1), (1, 0)]) ** 2
        return lax.psum_scatter(lax.all_gather(x, "y", tiled=True) ** 2, "y", tiled=True) ** 2, None

    module = compiled(
        target, lambda x: lax.scan(body, x, None, length=3)[0], (ROWS, WIDTH), P(("x", "y")), P(("x", "y"))
    )
    found = traffic(module, 8)
    assert found.by_axes(MESH) == {
        "y": {
            "all-gather": 3 * 4 * LOCAL * 3 // 4,
            "all-reduce": 3 * 2 * LOCAL * 3 // 4,
            "all-to-all": 3 * LOCAL * 3 // 4,
            "reduce-scatter": 3 * 4 * LOCAL * 3 // 4,
        },
        "x": {"collective-permute": 3 * LOCAL},
        "x+y": {"all-to-all": 3 * LOCAL * 7 // 8},
    }
    assert found.assumed_loops == ()


@pytest.mark.parametrize("target", TARGETS)
def test_ragged_exchange_counts_full_buffers(target):
    def fn(x):
        out = lax.pcast(jnp.zeros((2 * x.shape[0], x.shape[1]), x.dtype), ("x", "y"), to="varying")
        sizes = jnp.full((4,), x.shape[0] // 4, jnp.int32)
        offsets = jnp.arange(4, dtype=jnp.int32) * sizes
        at_peer = lax.axis_index("y").astype(jnp.int32) * sizes
        return lax.ragged_all_to_all(x, out, offsets, sizes, at_peer, sizes, axis_name="y")

    moved = traffic(compiled(target, fn, (ROWS, WIDTH), P(("x", "y")), P(("x", "y"))), 8).by_axes(MESH)
    assert moved["y"]["ragged-all-to-all"] == LOCAL * 3 // 4


@pytest.mark.parametrize("target", [TARGETS[0], TARGETS[-1]])
def test_memory_traffic_of_products_in_a_loop(target):
    """Products with one matrix of a stack after another: each matrix is read once, by a TPU that keeps x on the chip no
    more than that; at most XLA copies the matrix first, then x, and reads and writes all of them."""
    n, trips = 4096, 6
    sharding = NamedSharding(target_mesh(target), P())
    x = jax.ShapeDtypeStruct((n, n), jnp.bfloat16, sharding=sharding)
    w = jax.ShapeDtypeStruct((trips, n, n), jnp.bfloat16, sharding=sharding)
    program = jax.jit(lambda x, w: lax.scan(lambda x, w: (x @ w, None), x, w)[0])
    moved = memory_traffic(hlo.parse(program.lower(x, w).compile().as_text())) / (n * n * 2)
    assert trips + 2 <= moved <= 7 * trips + 3


def test_slices_and_updates_in_place_cost_what_they_touch():
    text = """
%read (p0: f32[100,8], p1: s32[]) -> f32[1,8] {
  %p0 = f32[100,8]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %copy = f32[100,8]{0,1} copy(%p0)
  %zero = s32[] constant(0)
  ROOT %slice = f32[1,8]{0,1} dynamic-slice(%copy, %p1, %zero), dynamic_slice_sizes={1,8}
}

%write (q0: f32[100,8], q1: f32[1,8], q2: s32[]) -> f32[100,8] {
  %q0 = f32[100,8]{1,0} parameter(0)
  %q1 = f32[1,8]{1,0} parameter(1)
  %q2 = s32[] parameter(2)
  %zero.1 = s32[] constant(0)
  ROOT %update = f32[100,8]{1,0} dynamic-update-slice(%q0, %q1, %q2, %zero.1)
}

ENTRY %main (a: f32[100,8], i: s32[]) -> f32[100,8] {
  %a = f32[100,8]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %row = f32[1,8]{1,0} fusion(%a, %i), kind=kLoop, calls=%read
  %near = f32[1,8]{1,0:T(8,128)S(1)} negate(%row)
  ROOT %new = f32[100,8]{1,0} fusion(%a, %near, %i), kind=kLoop, calls=%write
}
"""
    row, index = 8 * 4, 4
    # The row is read and written; then read again to be negated on the chip; then written from there. Both fusions read
    # the index.
    assert memory_traffic(hlo.parse(text)) == (row + index + row) + row + (index + row)


TOUCHED = """
%double (d0: f32[8]) -> f32[8] {{
  %d0 = f32[8]{{0}} parameter(0)
  ROOT %twice = f32[8]{{0}} add(%d0, %d0)
}}

%row (r0: f32[100,8], r1: s32[]) -> f32[1,8] {{
  %r0 = f32[100,8]{{1,0}} parameter(0)
  %r1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %slice = f32[1,8]{{1,0}} dynamic-slice(%r0, %r1, %zero), dynamic_slice_sizes={{1,8}}
}}

%two_rows (t0: f32[100,8], t1: s32[]) -> f32[1,8] {{
  %t0 = f32[100,8]{{1,0}} parameter(0)
  %t1 = s32[] parameter(1)
  %zero.2 = s32[] constant(0)
  %one_row = f32[1,8]{{1,0}} fusion(%t0, %t1), kind=kLoop, calls=%row
  %first = f32[1,8]{{1,0}} slice(%t0), slice={{[0:1],[0:8]}}
  ROOT %both = f32[1,8]{{1,0}} add(%one_row, %first)
}}

%row_of_wide (n0: bf16[2,8], n1: s32[]) -> f32[1,8] {{
  %n0 = bf16[2,8]{{1,0}} parameter(0)
  %n1 = s32[] parameter(1)
  %zero.3 = s32[] constant(0)
  %converted = f32[2,8]{{1,0}} convert(%n0)
  ROOT %narrow = f32[1,8]{{1,0}} dynamic-slice(%converted, %n1, %zero.3), dynamic_slice_sizes={{1,8}}
}}

%write (w0: f32[100,8], w1: bf16[2,8], w2: s32[]) -> (f32[100,8], f32[2,8]) {{
  %w0 = f32[100,8]{{1,0}} parameter(0)
  %w1 = bf16[2,8]{{1,0}} parameter(1)
  %w2 = s32[] parameter(2)
  %wide = f32[2,8]{{1,0}} convert(%w1)
  %update = f32[100,8]{{1,0}} dynamic-update-slice(%w0, %wide, %w2, %w2)
  %moved = f32[100,8]{{1,0}} copy(%update)
  ROOT %results = (f32[100,8]{{1,0}}, f32[2,8]{{1,0}}) tuple(%moved, %wide)
}}

ENTRY %main (a: f32[100,8], b: f32[1,8], i: s32[], v: f32[8], w: bf16[2,8], near: f32[8], rows: s32[3]) -> f32[] {{
  %a = f32[100,8]{{1,0}} parameter(0)
  %b = f32[1,8]{{1,0}} parameter(1)
  %i = s32[] parameter(2)
  %v = f32[8]{{0}} parameter(3)
  %w = bf16[2,8]{{1,0}} parameter(4)
  %near = f32[8]{{0:T(128)S(1)}} parameter(5)
  %rows = s32[3]{{0}} parameter(6)
  %x = {instruction}
  ROOT %done = f32[] constant(0)
}}
"""
V, ROW, INDEX = 8 * 4, 8 * 4, 4


@pytest.mark.parametrize(
    "instruction, read, written",
    [
        ("f32[8]{0} add(%v, %v)", 2 * V, V),
        ("f32[8]{0} add(%v, %near)", V, V),  # what lies on the chip costs nothing
        ("f32[8]{0:T(128)S(1)} negate(%v)", V, 0),
        ("f32[1,8]{1,0} dynamic-slice(%a, %i, %i), dynamic_slice_sizes={1,8}", ROW, ROW),
        ("f32[50,8]{1,0} slice(%a), slice={[0:50],[0:8]}", 50 * ROW, 50 * ROW),
        ("f32[3,8]{1,0} gather(%a, %rows), offset_dims={1}", 3 * ROW, 3 * ROW),
        ("f32[100,8]{1,0} dynamic-update-slice(%a, %b, %i, %i)", ROW + 2 * INDEX, ROW),
        ("f32[100,8]{1,0} scatter(%a, %rows, %b), to_apply=%double", 3 * 4 + ROW, ROW),
        ("f32[8]{0} fusion(%v), kind=kLoop, calls=%double", V, V),  # used twice, read once
        ("f32[1,8]{1,0} fusion(%a, %i), kind=kLoop, calls=%row", ROW + INDEX, ROW),
        ("f32[1,8]{1,0} fusion(%a, %i), kind=kLoop, calls=%two_rows", 2 * ROW + INDEX, ROW),
        ("f32[1,8]{1,0} fusion(%w, %i), kind=kLoop, calls=%row_of_wide", 8 * 2 + INDEX, ROW),
        (
            "(f32[100,8]{1,0}, f32[2,8]{1,0}) fusion(%a, %w, %i), kind=kLoop, calls=%write",
            2 * 8 * 2 + INDEX,
            2 * 2 * ROW,
        ),
        ("(f32[8]{0:T(128)S(1)}, f32[8]{0}, u32[]{:S(2)}) copy-start(%v)", V, 0),
        ("(f32[8]{0}, f32[16]{0}) all-gather-start(%v), replica_groups={{0,1}}, dimensions={0}", V, 2 * V),
        ("f32[8]{0} all-reduce-start(%v), replica_groups={{0,1}}, to_apply=%double", V, V),
        ("f32[8]{0} call(%v), to_apply=%double", 2 * V, V),
        ("f32[8]{0} bitcast(%v)", 0, 0),
    ],
)
def test_bytes_that_an_instruction_touches(instruction, read, written):
    assert memory_traffic(hlo.parse(TOUCHED.format(instruction=instruction))) == read + written


@pytest.mark.parametrize(
    "dtype, size",
    [
        ("pred", 8),
        ("s4", 4),
        ("u2", 2),
        ("s8", 8),
        ("f8e4m3fn", 8),
        ("f8e8m0fnu", 8),
        ("f4e2m1fn", 4),
        ("bf16", 16),
        ("f16", 16),
        ("f32", 32),
        ("s64", 64),
        ("c64", 64),
        ("c128", 128),
    ],
)
def test_width_of_an_element(dtype, size):
    assert hlo.shape_bytes(f"{dtype}[3,8]{{1,0}}") == 3 * size
    assert hlo.shape_bytes(f"{dtype}[]") == -(-size // 8)


COUNTED = """
%body (c: (s32[], f32[8])) -> (s32[], f32[8]) {{
  %c = (s32[], f32[8]{{0}}) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %x = f32[8]{{0}} get-tuple-element(%c), index=1
  %step = s32[] constant({step})
  %next = s32[] {update}
  %y = f32[8]{{0}} negate(%x)
  ROOT %out = (s32[], f32[8]{{0}}) tuple(%next, %y)
}}

%condition (k: (s32[], f32[8])) -> pred[] {{
  %k = (s32[], f32[8]{{0}}) parameter(0)
  %j = s32[] get-tuple-element(%k), index=0
  %limit = s32[] constant({limit})
  ROOT %test = pred[] compare(%j, %limit), direction={direction}
}}

ENTRY %main (v: f32[8]) -> f32[8] {{
  %v = f32[8]{{0}} parameter(0)
  %start = s32[] constant({start})
  %both = (s32[], f32[8]{{0}}) tuple(%start, %v)
  %loop = (s32[], f32[8]{{0}}) while(%both), condition=%condition, body=%body
  ROOT %last = f32[8]{{0}} get-tuple-element(%loop), index=1
}}
"""


@pytest.mark.parametrize(
    "start, limit, direction, update, step, trips",
    [
        (0, 10, "LT", "add(%i, %step)", 3, 4),
        (0, 9, "LT", "add(%step, %i)", 3, 3),
        (0, 9, "LE", "add(%i, %step)", 3, 4),
        (10, 0, "GT", "subtract(%i, %step)", 4, 3),
        (8, 0, "GE", "subtract(%i, %step)", 4, 3),
        (10, 0, "GT", "add(%i, %step)", -5, 2),
        (-2, 2, "NE", "add(%i, %step)", 2, 2),
        (5, 5, "LT", "add(%i, %step)", 1, 0),
        (0, 10, "LT", "subtract(%i, %step)", 1, None),
        (0, 10, "LT", "add(%i, %step)", 0, None),
        (0, 10, "LT", "subtract(%step, %i)", 1, None),
        (0, 10, "LT", "multiply(%i, %step)", 2, None),
    ],
)
def test_loops_that_count(start, limit, direction, update, step, trips):
    """The negation in the body moves 64 bytes each time, the counter 12; a loop whose end is not known is counted as
    often as one says."""
    module = hlo.parse(COUNTED.format(start=start, limit=limit, direction=direction, update=update, step=step))
    assert hlo.trip_count(module["main"].instructions["loop"], hlo.entry_scope(module)) == trips
    assert memory_traffic(module, while_trips=7) == (64 + 12) * (7 if trips is None else trips)
