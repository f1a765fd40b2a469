"""Bytes on the wire: of a program compiled here, and of texts as TPUs and GPUs have."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxlm.plan.traffic import Part, by_part, part_of, rows, traffic

HERE = Path(__file__).parent
MESH = {"data": 1, "fsdp": 8, "tensor": 2}


def program(*lines, computations=""):
    """An HLO text whose entry has an array `p` of 1024 bf16 and these lines."""
    entry = "\n".join(f"  {line}" for line in lines)
    return f"""HloModule step, is_scheduled=true
{computations}
ENTRY %main (p: bf16[1024]) -> bf16[1024] {{
  %p = bf16[1024]{{0:T(1024)(128)(2,1)S(1)}} parameter(0)
{entry}
}}
"""


def one(text):
    (transfer,) = traffic(text, MESH)
    return transfer


def test_a_gather_in_a_scan_sends_what_it_must():
    flags = "--xla_force_host_platform_device_count=8"
    child = subprocess.run(
        [sys.executable, HERE / "traffic_case.py"],
        env={**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(HERE.parents[1])},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert child.returncode == 0, child.stderr
    gather, reduction = json.loads(child.stdout)
    # Each of 4 chips sends its quarter of the 64 x 64 f32 to 3 others, in 5 layers.
    assert gather["bytes"] == 5 * 3 * (64 * 64 * 4 / 4)
    assert gather["times"] == 5 and gather["axes"] == ["fsdp"]
    assert (gather["part"], gather["kind"]) == ("layer weights", "all-gather")
    assert gather["dtype"] == "f32" and not gather["overlapped"]
    # A ring of 2 sends 64 f32 in two halves, twice.
    assert reduction["bytes"] == 64 * 4 and reduction["axes"] == ["data"]
    assert (reduction["part"], reduction["kind"]) == ("head", "all-reduce")


@pytest.mark.parametrize(
    "operation, kind, sent",
    [
        ("all-gather", "all-gather", 7),
        ("all-reduce", "all-reduce", 14 / 8),
        ("reduce-scatter", "reduce-scatter", 7 / 8),
        ("all-to-all", "all-to-all", 7 / 8),
    ],
)
def test_bytes_of_each_kind(operation, kind, sent):
    groups = "replica_groups={{0,2,4,6,8,10,12,14},{1,3,5,7,9,11,13,15}}"
    text = program(f"ROOT %x = bf16[1024] {operation}(%p), channel_id=1, {groups}")
    found = one(text)
    assert (found.kind, found.bytes) == (kind, 2048 * sent)
    assert (found.dtype, found.axes) == ("bf16", ("fsdp",))


@pytest.mark.parametrize(
    "groups, axes, members",
    [
        ("[2,8]<=[8,2]T(1,0)", ("fsdp",), 8),
        ("[8,2]<=[16]", ("tensor",), 2),
        ("[1,16]<=[16]", ("fsdp", "tensor"), 16),
        ("{{0,1},{2,3},{4,5},{6,7},{8,9},{10,11},{12,13},{14,15}}", ("tensor",), 2),
        ("{}", ("fsdp", "tensor"), 16),
        ("mesh['axis_0'=8,'axis_1'=2] {'axis_0'}", ("fsdp",), 8),
        ("mesh['axis_0'=16] {'axis_0':(8)2}", ("tensor",), 2),
        ("mesh['axis_0'=16] {'axis_0':(1)8}", ("fsdp",), 8),
        ("mesh['a'=4,'b'=4] {'a','b':(1)2}", ("fsdp",), 8),
    ],
)
def test_who_exchanges_with_whom(groups, axes, members):
    text = program(
        f"ROOT %x = bf16[8] all-gather(%p), replica_groups={groups}, a={{1}}"
    )
    assert one(text).axes == axes
    assert one(text).bytes == 2048 * (members - 1)


def test_a_permute_sends_its_operand_along_one_axis():
    pairs = ",".join(f"{{{i},{i ^ 1}}}" for i in range(16))
    found = one(
        program(
            "%s = (bf16[1024]{0:T(8,128)}, bf16[1024], u32[]{:S(2)}) "
            f"collective-permute-start(%p), source_target_pairs={{{pairs}}}",
            "ROOT %d = bf16[1024] collective-permute-done(%s)",
        )
    )
    assert (found.kind, found.bytes, found.axes) == ("permute", 2048, ("tensor",))
    assert not found.overlapped  # nothing is computed between the two


def test_a_permute_of_each_device_to_itself_sends_nothing():
    pairs = ",".join(f"{{{i},{i}}}" for i in range(16))
    permute = f"collective-permute(%p), source_target_pairs={{{pairs}}}"
    assert traffic(program(f"ROOT %x = bf16[1024] {permute}"), MESH) == []


def test_overlap_is_computing_between_start_and_end():
    fused = "%product (q: bf16[1024]) -> bf16[1024] {\n  ROOT %q = bf16[1024] parameter(0)\n}"
    text = program(
        "%s = (bf16[1024], bf16[8192]) all-gather-start(%p), replica_groups=[2,8]<=[16]",
        "%f = bf16[1024] fusion(%p), kind=kOutput, calls=%product",
        "ROOT %d = bf16[8192] all-gather-done(%s)",
        computations=fused,
    )
    assert one(text).overlapped


def test_the_three_fusions_of_an_overlapped_gather_are_one():
    """A TPU's fusions start a gather, compute beside it and end it."""

    def fusion(name):
        return (
            f"%{name} (q: bf16[1024]) -> bf16[8192] {{\n"
            "  %q = bf16[1024]{0} parameter(0)\n"
            "  ROOT %g = bf16[8192]{0} all-gather(%q), channel_id=7, "
            "replica_groups=mesh['axis_0'=8,'axis_1'=2] {'axis_0'}\n}\n"
        )

    names = ("start", "async_collective_fusion.3", "done")
    found = one(
        program(
            *(
                f"%{name}.f = bf16[8192] fusion(%p), kind=kCustom, calls=%{name}"
                for name in names
            ),
            computations="".join(map(fusion, names)),
        )
    )
    assert found.overlapped and found.bytes == 7 * 2048


def test_an_all_reduce_whose_rest_is_dropped_is_a_scatter():
    fused = (
        "%all-reduce-scatter.2 (q: f32[512]) -> f32[64] {\n"
        "  %q = f32[512]{0} parameter(0)\n"
        "  %r = f32[512]{0} all-reduce(%q), channel_id=3, replica_groups=[2,8]<=[16]\n"
        "  ROOT %s = f32[64]{0} dynamic-slice(%r)\n}"
    )
    found = one(
        program(
            "%w = f32[512] bitcast(%p)",
            "ROOT %f = f32[64] fusion(%w), kind=kCustom, calls=%all-reduce-scatter.2",
            computations=fused,
        )
    )
    assert (found.kind, found.bytes) == ("reduce-scatter", 2048 * 7 / 8)


LOOP = """
%body (b: (u32[], bf16[1024])) -> (u32[], bf16[1024]) {
  %b = (u32[], bf16[1024]) parameter(0)
  %two = u32[]{:T(128)} constant(2)
  %i = u32[] get-tuple-element(%b), index=0
  %x = bf16[1024] get-tuple-element(%b), index=1
  %s = (bf16[1024], bf16[1024]) collective-permute-start(%x), source_target_pairs={{0,2},{2,0}}
  %d = bf16[1024] collective-permute-done(%s)
  %next = u32[] add(%i, %two)
  ROOT %t = (u32[], bf16[1024]) tuple(%next, %d)
}

%condition (c: (u32[], bf16[1024])) -> pred[] {
  %limit = u32[] constant(16)
  %c = (u32[], bf16[1024]) parameter(0)
  %i = u32[] get-tuple-element(%c), index=0
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}
"""


@pytest.mark.parametrize(
    "attributes, trips",
    [("", 7), (', backend_config={"known_trip_count":{"n":"5"}}', 5)],
)
def test_trips_of_a_loop(attributes, trips):
    """Counted from 2 to 16 in twos, or as the compiler says."""
    found = one(
        program(
            "%first = u32[] constant(2)",
            "%copied = u32[] copy(%first)",
            "%t = (u32[], /*index=1*/bf16[1024]) tuple(%copied, /*index=1*/%p)",
            "%w = (u32[], bf16[1024]) while(%t), condition=%condition, "
            f"body=%body{attributes}",
            computations=LOOP,
        )
    )
    assert (found.times, found.bytes) == (trips, trips * 2048)


@pytest.mark.parametrize(
    "name, kind, axes, part",
    [
        ("jvp()/while/body/Block/mlp/convert_element_type", "all-gather", "fsdp", "layer weights"),
        ("jvp()/while/body/Block/mlp/convert_element_type", "all-reduce", "fsdp", "layer weights"),
        ("jvp()/Block/mlp/shard_map/all_gather", "all-reduce", "fsdp", "layer weights"),
        ("Block/mlp/weight_gradient/shard_map/reduce_scatter", "all-reduce", "fsdp", "gradients"),
        ("jvp()/Block/mlp/BTD,DF->BTF/dot_general", "permute", "fsdp", "layer weights"),
        ("jvp()/Block/mlp/BTF,FD->BTD/dot_general", "all-reduce", "tensor", "tensor parallelism"),
        ("Block/mlp/weight_gradient/BTD,BTF->DF/dot_general", "permute", "fsdp", "gradients"),
        ("transpose(jvp())/Block/attn_norm/reduce_sum", "all-reduce", "fsdp", "gradients"),
        ("transpose(jvp(head))/while/body/dot_general", "all-reduce", "fsdp", "head"),
        ("transpose(jvp(Embedder))/scatter-add", "all-reduce", "fsdp", "embedding"),
        ("state.params[\\'embed\\'][\\'table\\']", "all-gather", "fsdp", "embedding"),
        ("optimizer/reduce_sum", "all-reduce", "fsdp", "optimizer"),
        ("reduce_sum", "all-reduce", "fsdp", "rest"),
    ],
)  # fmt: skip
def test_the_part_comes_from_the_name(name, kind, axes, part):
    assert part_of(f"jit(train_step)/{name}", kind, (axes,)) == part


def test_sums_and_rows():
    found = traffic(
        program(
            "%x = bf16[8192] all-gather(%p), replica_groups=[2,8]<=[16], "
            'metadata={op_name="jit(step)/jvp(head)/dot_general"}',
            "%y = bf16[8192] all-gather(%p), replica_groups=[2,8]<=[16], "
            'metadata={op_name="jit(step)/transpose(jvp(head))/dot_general"}',
            "%z = bf16[1024] all-reduce(%p), replica_groups=[8,2]<=[16]",
        ),
        MESH,
    )
    sums = by_part(found)
    assert sums[Part.HEAD] == 2 * 7 * 2048 / 2**30
    assert sums[Part.TENSOR] == 2048 / 2**30
    assert sums[Part.GRADIENTS] == 0
    head, other = rows(found)
    assert (head["part"], head["kind"]) == ("head", "all-gather")
    assert other["part"] == "tensor parallelism"
    assert head["gib"] == pytest.approx(sums[Part.HEAD], rel=1e-3)
