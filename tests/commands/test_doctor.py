"""`jaxlm doctor`: its report on the machine and on attention."""

import jax

from jaxlm.cli import main
from jaxlm.model.presets import preset
from jaxlm.ops.linear import compute_dtype
from jaxlm.plan.attention_choice import attention_choices


def test_it_says_what_a_run_would_use(capsys):
    flags = ["--train.batch-size", "4", "--data.sequence-length", "128"]
    assert main(["doctor", *flags, "--model.decode-attention", "splash"]) == 0
    out = capsys.readouterr().out
    rows = {line[:20].strip(): line[20:].strip() for line in out.splitlines()}
    assert rows["jax"] == jax.__version__
    assert rows["devices"].startswith(str(jax.device_count()))
    assert rows["dtype auto"] == compute_dtype("auto").name
    assert rows["training 4 x 128"] == "global layers: auto took dense"
    assert max(len(line) for line in out.splitlines() if "/" not in line) <= 80
    # An implementation that cannot run is reported, and the report goes on.
    assert rows["decode 1 of 512"].startswith("attention 'splash': needs a TPU")


def test_each_kind_of_layer_has_its_choice():
    config = preset("gemma2-2b")
    choices = attention_choices(config, 1, 4096)
    assert set(choices) == {"local", "global"}
    for choice in choices.values():
        assert choice.name == "xla" and "pallas_tpu" in dict(choice.declined)
    decoding = attention_choices(config, 1, 1, 4096)
    assert {choice.name for choice in decoding.values()} == {"cached"}


def test_a_prompt_attends_to_itself_and_not_to_the_cache():
    """On a TPU: as benchmarks/results/attention_choice.json read from programs."""
    device = jax.sharding.AbstractDevice("TPU v5", num_cores=1, platform="tpu")
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        sizes = (preset("llama3-8b"), 1, 4096, 8192)
        (prompt,) = attention_choices(*sizes, is_empty=True).values()
        (chunk,) = attention_choices(*sizes).values()
    assert (prompt.name, prompt.warning) == ("splash", None)
    assert chunk.name == "xla" and chunk.warning is not None
