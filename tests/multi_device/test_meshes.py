"""Training on 8 devices equals training on one, whatever the mesh.

Each case is a child process with 8 CPU devices; see `mesh_case.py`. Differences of
gradients are shares of the largest value of a leaf: as absolute numbers, small
gradients would pass whatever they were.
"""

import json
import os

import mesh_case
import pytest
from forked_case import Forked

# Programs are cut for a mesh long before LLVM gets them, so it need not try hard.
FLAGS = """--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0
    --xla_llvm_disable_expensive_passes=true"""
# f32 sums of other orders; seen: 6e-6 over a leaf, 2e-6 in a loss.
TOLERANCE = 1e-5


def run_case(case, folder):
    """What a case in `mesh_case.py` prints."""
    return run_child(mesh_case.main, folder, case, folder)


def run_child(program, folder, *arguments):
    """The JSON object that a function prints in a process with 8 devices."""
    child = Forked(
        *(program, *arguments),
        output=folder / "child",
        environment={**os.environ, "XLA_FLAGS": FLAGS},
        folder=folder,
    )
    assert child.wait() == 0, child.err
    return json.loads(child.out.splitlines()[-1])


def check_equal(result, meshes):
    # Every leaf has a gradient that can be seen, those of q and k too.
    assert result["smallest_leaf"] > 1e-3
    for mesh in meshes:
        assert {n: d for n, d in result[mesh].items() if d > TOLERANCE} == {}, mesh


def check_gradients(result, meshes):
    check_equal(result, meshes)
    # One weight moved by 0.05, and half of the batch dropped.
    assert result["control_moved"] > 100 * TOLERANCE
    assert result["control_half"] > 10_000 * TOLERANCE


def test_meshes_that_do_not_fit(tmp_path):
    errors = run_case("errors", tmp_path)
    assert "mesh.tensor is 8, which does not divide 4 in the shape" in errors["divide"]
    assert "of 'layers/attn/" in errors["divide"]
    assert "choose another mesh.tensor or another size" in errors["divide"]
    assert (
        "mesh.data 3 x mesh.fsdp 1 x mesh.expert 1 x mesh.context 1 x mesh.tensor 1 does "
        in errors["fit"]
    )
    assert "fsdp 3" in errors["remain"] and "or -1 for one axis" in errors["remain"]


def test_rows_of_an_embedding_and_their_gradients_on_every_mesh(tmp_path):
    result = run_case("embedding", tmp_path)
    assert result.pop("largest") > 40
    for mesh, found in result.items():
        assert found["rows"] and found["gradient"] == 0, mesh
    # Twice, 10 ids go to 7 others, and rows of 32 go there and back; in f32, as CPUs
    # have no other. The table takes 4 * 448 * 4 bytes there and back.
    rows = 10 * 32 * 7 / 8
    assert result["one"]["sent"] == 0
    assert result["fsdp8"]["sent"] <= 2 * (7 * 10 * 4 + 2 * rows * 4) < 4 * 448 * 4


def test_matrices_that_two_axes_cut_are_exchanged_once(tmp_path):
    """There and back, each device sends its part to the 7 others, in eighths."""
    result = run_case("orthogonalize", tmp_path)
    assert result["difference"] < TOLERANCE and result["cut"]
    assert result["sent"] == 2 * 7 / 8


def test_rings_gather_and_scatter(tmp_path):
    result = run_case("rings", tmp_path)
    assert result["differences"] == [0.0, 0.0, 0.0]
    # Three uses of each matrix of a layer, and two of the head: `remat none` keeps none.
    assert result["permutes"] == 7 * 3 + 2


@pytest.mark.slow
def test_gradients_on_every_mesh(tmp_path):
    """Also with more tensor parts than key heads, and tokens that they do not divide;
    there the residual stream is cut as well.

    The next tests have the other meshes.
    """
    result = run_case("gradients", tmp_path)
    check_gradients(result, ["data8", "fsdp8", "fsdp2_tensor4", "tensor8"])
    # Two reductions of a layer's activations in each direction, each of which sends
    # them to 3 others and back in quarters.
    assert result["fsdp2_tensor4_sent"] == pytest.approx(4 * 2 * 3 / 4, rel=1e-3)
    # Where the residual stream is cut, a CPU still reduces all, and then gathers.
    assert result["tensor8_sent"] == pytest.approx(4 * 3 * 7 / 8, rel=2e-3)


@pytest.mark.slow
def test_gradients_of_experts_on_every_mesh(tmp_path):
    """The load-balance loss among them, which is a mean over the whole batch; and those
    through blocked attention."""
    result = run_case("experts", tmp_path)
    check_gradients(result, ["fsdp2_tensor4"])
    assert "layers/moe/router" in result["fsdp2_tensor4"]
    # As above, but experts scatter on a CPU too; and logits and gradients of the router.
    assert result["fsdp2_tensor4_sent"] == pytest.approx(
        (2 * 2 + 6) * 3 / 4 + 3 * 4 / 16 * 3 / 4, rel=0.01
    )


@pytest.mark.slow
def test_gradients_of_experts_on_several_devices(tmp_path):
    """Also where rows are cut, by gathered keys, and weights go around rings; with a
    window and sinks.

    Tokens are gathered by 2 devices, and exchanged by 4. Of two microbatches, statistics
    of the router and biases of the experts are exchanged in each, gradients at the end.
    """
    result = run_case("exchanged", tmp_path)
    check_gradients(result, ["fsdp2_expert2_tensor2", "fsdp2_expert2_context2"])
    assert "permute" not in result["fsdp2_expert2_tensor2_exchanges"]
    assert result["fsdp2_expert2_context2_exchanges"] == ["permute"]
    assert max(result["accumulated"]) < TOLERANCE
    assert 0 < result["sent_after_each"] < 600
    # Once for both microbatches. Matrices of experts do not cross their axis, which
    # would more than double this.
    assert 0 < result["sent_others"] < 1.05 * (2 * 7 / 8) * 4 * result["other_weights"]
    # A CPU gets the rows of all, of which an accelerator would get its own. There and
    # back, in either direction, 16 f32 for 2 experts of each of 2 rows of 32 tokens; 3
    # others get them, and send as many as there is room for. And numbers of rows.
    rows = 2 * 32 * 2
    assert 0 < result["sent"] - 2 * 3 * (rows + 4 * 64) * 16 * 4 < 512


@pytest.mark.nightly
def test_gradients_of_experts_on_four_devices_whose_rows_are_cut(tmp_path):
    check_gradients(run_case("exchanged_context", tmp_path), ["expert4_context2"])


@pytest.mark.slow
def test_gradients_through_rings_of_three_dimensions(tmp_path):
    """Gathered in each layer, and once for two microbatches."""
    result = run_case("torus", tmp_path)
    check_gradients(result, ["2x2x2", "fsdp8"])
    assert result["control_once"] > 100 * TOLERANCE
    assert result["2x2x2_exchanges"] == result["exchanges"] == ["permute"]


@pytest.mark.nightly
def test_gradients_through_rings_of_two_dimensions(tmp_path):
    """Weights go around them; of so few devices the compiler scatters the gradients."""
    result = run_case("flat torus", tmp_path)
    check_gradients(result, ["fsdp8", "2x2x2"])
    assert result["fsdp8_exchanges"] == ["permute"]


@pytest.mark.slow
def test_gradients_through_a_kernel_on_every_device(tmp_path):
    check_gradients(run_case("kernel", tmp_path), ["2x2x2"])


def check_losses(result, mesh):
    assert result["last"] != result["first"]
    assert result[mesh] < TOLERANCE, mesh
    # The whole state lies on the mesh, moments as their parameters, and as
    # `abstract_state` says, which is what a checkpoint is restored onto.
    assert result[f"{mesh}_wrong"] == []
    assert result[f"{mesh}_abstract"] == []
    if "fsdp8" in mesh:
        # Norms are whole on each device; the rest is cut into 8.
        assert result[f"{mesh}_bytes"] < 0.2


def check_resumed(result, saved_on, meshes):
    # The mesh that it was saved on: the same program, so the same bits.
    assert result[saved_on] == 0.0
    for mesh in (saved_on, *meshes):
        assert result[f"{mesh}_equal"]
        assert result[mesh] < TOLERANCE
    # Without the moments the first loss on the last is right, and those after are not.
    assert result["control_equal"]
    assert result["control"] > 100 * TOLERANCE
    assert len(result["said"]) == len(meshes) + 1 and all(
        "may not be bit-identical" in line for line in result["said"]
    )


@pytest.mark.slow
def test_20_steps_and_the_layout_of_every_leaf_and_resuming_on_other_meshes(tmp_path):
    result = run_case("adamw", tmp_path)
    check_losses(result, "fsdp8")
    assert result["fsdp8_moments"] >= 14
    assert result["last"] < result["first"] - 0.1
    check_resumed(result["resumed"], "2x2x2", ["one", "data8", "tensor8", "fsdp8"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "case, mesh, moments",
    [
        ("accumulation", "fsdp2_tensor4", 14),
        ("adafactor", "2x2x2", 0),
        ("experts_muon", "fsdp8", 14),
    ],
)
def test_20_steps_and_the_layout_of_every_leaf(tmp_path, case, mesh, moments):
    result = run_case(case, tmp_path)
    check_losses(result, mesh)
    assert result[f"{mesh}_moments"] >= moments
    # The others learn less than random batches differ.
    if case == "adafactor":
        assert result["last"] < result["first"] - 0.1


@pytest.mark.slow
def test_muon_resumes_on_another_mesh(tmp_path):
    check_resumed(run_case("muon", tmp_path), "fsdp2_tensor4", ["2x2x2"])


@pytest.mark.slow
def test_all_devices_skip_a_step_that_is_not_finite_on_some(tmp_path):
    """And keep their parts bit for bit; a checkpoint holds what they compare with."""
    assert run_case("skips", tmp_path) == {
        **{"same": True, "skipped": 2, "in_a_row": 0},
        **{"restored": True, "devices": 8},
    }


@pytest.mark.slow
@pytest.mark.parametrize("case", ["edits", "edits_experts"])
def test_every_site_is_read_and_edited_alike_on_every_mesh(tmp_path, case):
    result = run_case(case, tmp_path)
    for mesh, differences in result.items():
        assert len(differences) > 20
        # Sites of the last layers have been through sums in another order.
        assert {n: d for n, d in differences.items() if d > 2e-5} == {}, mesh


@pytest.mark.slow
def test_sweeps_and_taps_of_a_generation_are_equal_on_a_mesh(tmp_path):
    for mesh, differences in run_case("inside", tmp_path).items():
        assert {n: d for n, d in differences.items() if d > 2e-5} == {}, mesh


@pytest.mark.slow
def test_generation_is_equal_on_every_mesh(tmp_path):
    """A test of taps, above, has fsdp 2 x tensor 4."""
    result = run_case("generate", tmp_path)
    assert min(result.pop("different")) > 5
    assert all(result.values()), result
