"""Changes between a save and a resume: allowed, reported or rejected."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from checkpoint_case import CONFIG, restore, run_with_steps

from jaxlm.checkpoint.native import compatible, integrity
from jaxlm.checkpoint.native.checkpoint_manager import CheckpointManager
from jaxlm.checkpoint.native.step_folder import _check_arrays
from jaxlm.config import Config, DataConfig, TrainConfig
from jaxlm.fields import to_dict
from jaxlm.train.optimizer import make_schedule


def change(config=CONFIG, **sections):
    """`change(model={"num_layers": 3})`"""
    return dataclasses.replace(
        config,
        **{
            name: dataclasses.replace(getattr(config, name), **fields)
            for name, fields in sections.items()
        },
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return run_with_steps(tmp_path_factory.mktemp("run"), 5)


REFUSED = [
    ({"model": {"num_layers": 3}}, "model.num_layers: 2 -> 3"),
    ({"model": {"rope_theta": 5e5}}, "model.rope_theta: 10000.0 -> 500000.0"),
    ({"optimizer": {"name": "lion"}}, "optimizer.name: 'adamw' -> 'lion'"),
    ({"data": {"sequence_length": 128}}, "data.sequence_length: 256 -> 128"),
    ({"train": {"seed": 1}}, "train.seed: 0 -> 1"),
    ({"train": {"batch_size": 8}}, "train.batch_size: 16 -> 8"),
    (
        {"train": {"steps": 2000}},
        "train.steps: 1000 -> 2000, on which the cosine schedule has depended since "
        "step 3",
    ),
]


@pytest.mark.parametrize("sections, line", REFUSED)
def test_another_run_is_refused_with_the_difference(run, sections, line):
    with CheckpointManager(run) as checkpoints, pytest.raises(ValueError) as error:
        restore(checkpoints, config=change(**sections))
    message = str(error.value)
    assert line in message and "--fresh" in message and "--init-from" in message
    assert "\n" not in message


def test_a_run_is_repeated_with_the_flags_that_change_its_numbers():
    values = json.loads(json.dumps(to_dict(CONFIG)))
    assert compatible.is_repeated(values, CONFIG)
    moved = change(data={"workers": 1}, train={"run_dir": "elsewhere", "log_every": 7})
    assert compatible.is_repeated(values, dataclasses.replace(moved, fresh=True))
    for sections in (*(s for s, _ in REFUSED), {"sample": {"temperature": 0.1}}):
        assert not compatible.is_repeated(values, change(**sections))
    assert not compatible.is_repeated({}, CONFIG)


def test_several_differences_are_all_named():
    new = change(model={"num_layers": 3}, train={"seed": 7})
    with pytest.raises(ValueError, match=r"num_layers: 2 -> 3; train\.seed: 0 -> 7"):
        compatible.check_config(CONFIG, new, 5)


def test_what_follows_from_another_setting_is_not_named():
    new = change(model={"vocab_size": 97}, data={"path": ("notes", "b.txt")})
    with pytest.raises(ValueError) as error:
        compatible.check_config(CONFIG, new, 5)
    assert "(data.path: bundled:shakespeare.txt -> notes b.txt): start a new" in str(
        error.value
    )
    for old, step, why in (
        (CONFIG, 200, ", on which the cosine schedule has depended since step 3"),
        (change(optimizer={"schedule": "constant"}), 2, ", with a warm-up of 3 -> 5 s"),
    ):
        new = change(old, optimizer={"warmup_steps": 5}, train={"steps": 50})
        with pytest.raises(ValueError, match=rf"\(train\.steps: 1000 -> 50{why}"):
            compatible.check_config(old, new, step)


def test_the_remedy_of_another_run_works_as_it_stands(run):
    """A new run folder is the first remedy, and `--init-from` needs one too."""
    with CheckpointManager(run) as checkpoints, pytest.raises(ValueError) as error:
        restore(checkpoints, config=change(train={"seed": 1}))
    assert str(error.value).endswith(
        ": start a new run with --train.run-dir NEW (--init-from RUN gives it these "
        "weights), set it back, or start over with --fresh"
    )


def test_accumulation_steps_matter_with_a_balance_loss():
    """With a balance loss, splitting a batch changes more than rounding."""
    experts = {"num_experts": 4, "experts_per_token": 2}
    train = {"load_balance_loss": 0.01}
    old = change(model=experts, train=train)
    new = change(model=experts, train={**train, "accumulation_steps": 4})
    with pytest.raises(ValueError, match=r"train\.accumulation_steps: 1 -> 4"):
        compatible.check_config(old, new, 5)


def test_free_fields_change_silently(run):
    new = change(
        data={"workers": 3, "prefetch": 9, "cache_dir": "/tmp"},
        mesh={"fsdp": 4},
        sample={"temperature": 0.1},
        train={"log_every": 1, "run_dir": "elsewhere", "keep": 9, "max_minutes": 1.0},
    )
    new = dataclasses.replace(new, fresh=True, init_from="x")
    reported = []
    with CheckpointManager(run, report=reported.append) as checkpoints:
        assert restore(checkpoints, config=new).step == 5
    assert reported == []


def test_fields_that_only_affect_rounding_are_reported(run):
    new = change(model={"dtype": "bfloat16"}, train={"accumulation_steps": 4})
    reported = []
    with CheckpointManager(run, report=reported.append) as checkpoints:
        assert restore(checkpoints, config=new).step == 5
    assert len(reported) == 1 and "may not be bit-identical" in reported[0]
    assert "model.dtype: 'auto' -> 'bfloat16'" in reported[0]
    assert "train.accumulation_steps: 1 -> 4" in reported[0]


@pytest.mark.parametrize(
    "optimizer, steps, until",
    [
        ({"schedule": "constant"}, 5000, 1000),
        # The last fifth decays: of the run before, or of a shorter one.
        ({"schedule": "wsd", "decay_fraction": 0.2}, 5000, 800),
        ({"schedule": "wsd", "decay_fraction": 0.2}, 500, 400),
        ({"schedule": "linear"}, 5000, 3),
    ],
)
def test_the_number_of_steps_may_change_until_the_rate_depends_on_it(
    optimizer, steps, until
):
    old = change(optimizer=optimizer)
    new = change(old, train={"steps": steps})
    assert compatible.check_config(old, new, until) == []
    # Up to there, the rates of both runs are the same.
    old_rate, new_rate = (
        jax.vmap(make_schedule(c.optimizer, c.train.steps, 1.0))(np.arange(1000))
        for c in (old, new)
    )
    assert (old_rate[:until] == new_rate[:until]).all()
    if until < 1000:
        assert (old_rate[until : until + 2] != new_rate[until : until + 2]).any()
        with pytest.raises(ValueError, match=rf"train\.steps: 1000 -> {steps}, on whi"):
            compatible.check_config(old, new, until + 1)


def test_files_may_have_moved_while_their_contents_are_the_same(run):
    moved = change(data={"path": ("/elsewhere.txt",), "tokenizer": "hf:/elsewhere"})
    with CheckpointManager(run, report=lambda line: None) as checkpoints:
        assert restore(checkpoints, config=moved).step == 5
        with pytest.raises(ValueError, match=r"data\.path: bundled:.* -> /elsewhere"):
            restore(checkpoints, config=moved, data_fingerprint="other")


@pytest.mark.parametrize("what", ["tokenizer", "data"])
def test_another_fingerprint_is_refused(run, what):
    error = pytest.raises(ValueError, match=rf"the {what} is not the one.*other-1")
    with CheckpointManager(run) as checkpoints, error:
        restore(checkpoints, **{f"{what}_fingerprint": "other-1"})


def test_another_version_gives_one_line(tmp_path):
    run = run_with_steps(tmp_path, 5)
    path = run / "checkpoints/5/meta.json"
    meta = json.loads(path.read_text())
    meta["environment"]["versions"]["jax"] = "0.0.1"
    meta["environment"]["device_kind"] = "TPU v9"
    # model.dtype auto depends on the CPU, and so does what XLA compiles for it.
    meta["environment"] |= {"cpu": "Z80", "auto_dtype": "float8"}
    # Others have flags of JAX: those of an earlier version are not known.
    meta["environment"] |= {"jax_default_matmul_precision": "highest"}
    del meta["environment"]["jax_default_prng_impl"]
    path.write_text(json.dumps(meta))
    integrity.write_manifest(path.parent)
    reported = []
    with CheckpointManager(run, report=reported.append) as checkpoints:
        assert restore(checkpoints).step == 5
    assert len(reported) == 1 and "\n" not in reported[0]
    assert "jax: 0.0.1 -> " in reported[0] and "device_kind: TPU v9 -> " in reported[0]
    assert "cpu: Z80 -> " in reported[0] and "auto_dtype: float8 -> " in reported[0]
    assert "jax_default_matmul_precision: highest -> None" in reported[0]
    assert "prng" not in reported[0]


@pytest.mark.parametrize("begun, way", [("float32", "unset"), ("float64", "set")])
def test_numbers_of_64_bits_are_told_by_their_flag(begun, way):
    stored = {"params": {"w": (begun, [2])}}
    other = {"float32": "float64", "float64": "float32"}[begun]
    wanted = {"w": jax.ShapeDtypeStruct((2,), np.dtype(other))}
    error = pytest.raises(ValueError, match=rf"^{way} JAX_ENABLE_X64: the arrays of r")
    with jax.enable_x64(way == "unset"), error:
        _check_arrays(Path("run"), {"arrays": stored}, "params", wanted)


def test_a_config_with_an_unknown_field_is_named(tmp_path):
    run = run_with_steps(tmp_path, 5)
    path = run / "checkpoints/5/meta.json"
    meta = json.loads(path.read_text())
    meta["config"]["train"]["warp"] = 1
    path.write_text(json.dumps(meta))
    integrity.write_manifest(path.parent)
    error = pytest.raises(ValueError, match="unknown field 'warp'")
    with CheckpointManager(run) as checkpoints, error:
        restore(checkpoints)


def test_the_lists_name_fields_that_exist():
    sections = {f.name for f in dataclasses.fields(Config)}
    assert {"model", "data", "optimizer", "train"} <= sections
    for config, names in (
        (DataConfig, compatible._FREE_DATA),
        (DataConfig, compatible._FILES),
        (TrainConfig, compatible._FREE_TRAIN + compatible._ROUNDING_TRAIN),
    ):
        assert set(names) <= {f.name for f in dataclasses.fields(config)}
