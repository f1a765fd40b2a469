"""Configs: what they reject, with which message, and the round trip through JSON."""

import dataclasses
import importlib.util
import json
import runpy
import sys
from pathlib import Path

import pytest

import jaxlm.config
from jaxlm.fields import diff, from_dict, nearest, to_dict

# Under pytest, argument types are checked in all of jaxlm, before the config's own
# checks run. This is a second copy of the module without those type checks.
_spec = importlib.util.spec_from_file_location("plain_config", jaxlm.config.__file__)
plain = sys.modules["plain_config"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(plain)
Config, DataConfig, MeshConfig = plain.Config, plain.DataConfig, plain.MeshConfig
ModelConfig, OptimizerConfig = plain.ModelConfig, plain.OptimizerConfig
RopeScaling, SampleConfig = plain.RopeScaling, plain.SampleConfig
TrainConfig = plain.TrainConfig

CONFIG_FILES = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))
SIZES = {
    "num_layers": 2,
    "model_dim": 32,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "hidden_dim": 64,
    "context_length": 64,
}


def model(**changes):
    return ModelConfig(**{**SIZES, **changes})


def full_config():
    """Differs from the defaults, so that a lost field shows in the round trip."""
    factors = (1.0, 1.5, 2.0, 2.5)
    scaling = RopeScaling(
        kind="longrope",
        factor=2,
        original_context_length=32,
        attention_factor=1.5,
        short_factors=factors,
        long_factors=factors,
    )
    return Config(
        model=model(
            vocab_size=99,
            rope_scaling=scaling,
            rope_pattern=(True, False),
            layer_pattern=("local", "global"),
            window=8,
            qk_norm="head",
            attention_soft_cap=50,
            tied_embeddings=False,
        ),
        data=DataConfig(path=("a.txt", "b/*.txt"), weights=(1, 0.5), sequence_length=7),
        mesh=MeshConfig(data=2, fsdp=-1, tensor=2),
        optimizer=OptimizerConfig(name="muon", clip_norm=None, adam_learning_rate=1),
        train=TrainConfig(steps=200, seed=5, run_dir="x", max_minutes=3),
        sample=SampleConfig(stop_ids=(1, 2), top_p=0.5),
        fresh=True,
        init_from="runs/other",
    )


# Section, fields, and the message: the field, its value and the remedy.
WRONG = [
    *(
        ("model", {name: value}, rf"model\.{name} is {value}: it must be > 0")
        for name in SIZES
        for value in (0, -1)
    ),
    ("model", {"init_std": -0.1}, r"model\.init_std is -0\.1: it must be >= 0"),
    ("model", {"rope_local_theta": 0.0}, r"model\.rope_local_theta is 0\.0: it must"),
    ("model", {"vocab_size": -1}, r"model\.vocab_size is -1: it must be >= 0"),
    ("model", {"num_experts": -1}, r"model\.num_experts is -1: it must be >= 0"),
    *(
        (
            "model",
            {"num_experts": 4, "experts_per_token": k},
            rf"model\.experts_per_token is {k}: .*from 1 to model\.num_experts 4",
        )
        for k in (0, 5)
    ),
    *(
        (
            "model",
            {name: value},
            rf"model\.{name} is {value} but model\.num_experts is 0: set the number",
        )
        for name, value in (
            ("experts_per_token", 2),
            ("router_bias", True),
            ("router_normalize", False),
        )
    ),
    (
        "model",
        {"activation": "swiglu_clamped", "gated": False},
        r"model\.activation is 'swiglu_clamped'.*set model\.gated to True",
    ),
    ("model", {"norm_epsilon": 0}, r"model\.norm_epsilon is 0\.0: it must be > 0"),
    ("model", {"unroll_layers": -1}, r"model\.unroll_layers is -1: it must be >= 0"),
    (
        "model",
        {"num_kv_heads": 3},
        r"num_heads is 4: .*a multiple of model\.num_kv_heads 3, as each key/value",
    ),
    (
        "model",
        {"rope_theta": -1.0},
        r"model\.rope_theta is -1\.0: it must be at least 1",
    ),
    (
        "model",
        {"rope_fraction": 0.0},
        r"model\.rope_fraction is 0\.0: it must be in \(0, 1\]",
    ),
    ("model", {"rope_fraction": 1.5}, r"model\.rope_fraction is 1\.5"),
    ("model", {"head_dim": 7}, r"head_dim \* model\.rope_fraction is 7.*must be even"),
    (
        "model",
        {"rope_scaling": RopeScaling(kind="linear"), "position": "learned"},
        r"model\.rope_scaling is set but model\.position is 'learned'.*'rope'",
    ),
    (
        "model",
        {
            "rope_scaling": RopeScaling(
                kind="longrope", short_factors=(1.0,), long_factors=(1.0,)
            )
        },
        r"rope_scaling\.short_factors has 1 numbers; 4 pairs are rotated",
    ),
    ("model", {"layer_pattern": ("local",)}, r"layer_pattern.*set model\.window"),
    ("model", {"window": 8}, r"window is 8 but model\.layer_pattern.*leave the window"),
    (
        "model",
        {"layer_pattern": ("local",), "window": 65},
        r"model\.window is 65: it must be from 1 to model\.context_length 64",
    ),
    ("model", {"layer_pattern": ("local",), "window": 0}, r"model\.window is 0"),
    ("model", {"layer_pattern": ()}, r"model\.layer_pattern is \(\): .*at least one"),
    ("model", {"rope_pattern": ()}, r"model\.rope_pattern is \(\): .*at least one"),
    (
        "model",
        {"parallel_block": True, "norm_placement": "post"},
        r"parallel_block needs model\.norm_placement 'pre', not 'post'",
    ),
    ("model", {"norm_bias": True}, r"norm_bias needs model\.norm 'layer', not 'rms'"),
    ("model", {"attention_soft_cap": 0.0}, r"model\.attention_soft_cap is 0\.0.*> 0"),
    ("model", {"final_soft_cap": -3}, r"model\.final_soft_cap is -3\.0.*> 0"),
    ("model", {"attention_scale": 0.0}, r"model\.attention_scale is 0\.0.*> 0"),
    (
        "model",
        {"qk_norm": "heads"},
        r"model\.qk_norm is 'heads': it must be one of 'none', 'head', 'full' "
        r"\(did you mean 'head'\?\)",
    ),
    (
        "model",
        {"context_length": 2**31},
        r"context_length is 2147483648.*below 2\*\*31",
    ),
    ("model", {"num_layers": 2.0}, r"model\.num_layers is 2\.0: it must be an integer"),
    (
        "model",
        {"num_layers": True},
        r"model\.num_layers is True: it must be an integer",
    ),
    (
        "model",
        {"rope_theta": "1e4"},
        r"model\.rope_theta is '1e4': it must be a number",
    ),
    (
        "model",
        {"tied_embeddings": 1},
        r"model\.tied_embeddings is 1: it must be True or False",
    ),
    ("model", {"window": "8"}, r"model\.window is '8': it must be an integer or None"),
    ("rope_scaling", {"kind": "linear", "factor": 0.5}, r"factor is 0\.5.*at least 1"),
    (
        "rope_scaling",
        {"kind": "longrope"},
        r"kind is 'longrope': set model\.rope_scaling\.short_factors and model\.rope_s",
    ),
    *(
        ("rope_scaling", {"kind": "yarn", name: value}, rf"{name} is {value}: it must")
        for name, value in (
            *(("attention_factor", 0.0), ("original_context_length", -1)),
            *(("beta_slow", 0.0), ("beta_slow", 32.0)),
        )
    ),
    (
        "rope_scaling",
        {"kind": "llama3", "low_frequency_factor": 4.0},
        r"low_frequency_factor is 4\.0: .*less than .*high_frequency_factor 4\.0",
    ),
    ("model", {"rope_fraction": 0.1}, r"rope_fraction is 0: .*even and at least 2"),
    (
        "model",
        {"head_dim": 2, "rope_scaling": RopeScaling(kind="dynamic")},
        r"'dynamic' needs 4 rotated dimensions or more: raise model\.head_dim",
    ),
    (
        "model",
        {"rope_theta": 1.0, "rope_scaling": RopeScaling(kind="yarn")},
        r"rope_theta is 1\.0: with model\.rope_scaling\.kind 'yarn' it must be > 1",
    ),
    ("rope_scaling", {"kind": "yarm"}, r"model\.rope_scaling\.kind.*mean 'yarn'"),
    ("data", {"path": ()}, r"data\.path is \(\): it must be at least one path"),
    ("data", {"path": "a.txt"}, r"data\.path is 'a\.txt': it must be a tuple"),
    ("data", {"weights": (1.0, 2.0)}, r"data\.weights has 2 numbers for 1 entries"),
    ("data", {"weights": (-1.0,)}, r"data\.weights.*>= 0 and not all zero"),
    ("data", {"weights": (0.0,)}, r"data\.weights.*>= 0 and not all zero"),
    ("data", {"holdout_fraction": 1.0}, r"data\.holdout_fraction is 1\.0.*in \[0, 1\)"),
    ("data", {"sequence_length": 0}, r"data\.sequence_length is 0: it must be > 0"),
    ("data", {"tokenizer_vocab_size": 3}, r"data\.tokenizer_vocab_size is 3.*> 3"),
    ("data", {"workers": -1}, r"data\.workers is -1: it must be >= 0"),
    ("data", {"prefetch": -1}, r"data\.prefetch is -1: it must be >= 0"),
    (
        "data",
        {"tokenizer_model": "x.model"},
        r"tokenizer_model is set but data\.tokenizer is 'chars'.*'sentencepiece'",
    ),
    ("data", {"tokenizer": "char"}, r"data\.tokenizer.*did you mean 'chars'"),
    ("data", {"tokenizer": "hf:"}, r"data\.tokenizer is 'hf:'.*, or hf:PATH"),
    ("mesh", {"data": 0}, r"mesh\.data is 0: it must be >= 1, or -1"),
    ("mesh", {"tensor": -2}, r"mesh\.tensor is -2: it must be >= 1, or -1"),
    ("mesh", {"fsdp": -1}, r"mesh\.data and mesh\.fsdp are -1: only one axis can"),
    ("optimizer", {"name": "adam"}, r"optimizer\.name.*did you mean 'adamw'"),
    *(
        ("optimizer", {name: 0.0}, rf"optimizer\.{name} is 0\.0: it must be > 0")
        for name in ("learning_rate", "epsilon", "clip_norm", "adam_learning_rate")
    ),
    *(
        ("optimizer", {name: 1.0}, rf"optimizer\.{name} is 1\.0: it must be in \[0, 1")
        for name in ("b1", "b2", "momentum")
    ),
    *(
        (
            "optimizer",
            {name: 1.1},
            rf"optimizer\.{name} is 1\.1: it must be in \[0, 1\]",
        )
        for name in ("decay_fraction", "final_fraction")
    ),
    ("optimizer", {"warmup_steps": -1}, r"optimizer\.warmup_steps is -1.*>= 0"),
    ("optimizer", {"weight_decay": -0.1}, r"optimizer\.weight_decay is -0\.1.*>= 0"),
    *(
        ("train", {name: 0}, rf"train\.{name} is 0: it must be > 0")
        for name in ("steps", "batch_size", "accumulation_steps", "log_every", "keep")
    ),
    *(
        ("train", {name: -1}, rf"train\.{name} is -1(\.0)?: it must be >= 0")
        for name in (
            *("seed", "z_loss", "loss_chunk", "eval_every", "sample_every"),
            *("sample_tokens", "checkpoint_every", "checkpoint_minutes"),
            *("keep_every", "max_minutes", "load_balance_loss", "eval_batches"),
        )
    ),
    (
        "train",
        {"batch_size": 16, "accumulation_steps": 3},
        r"train\.batch_size is 16: .*a multiple of train\.accumulation_steps 3",
    ),
    ("sample", {"max_new_tokens": 0}, r"sample\.max_new_tokens is 0: it must be > 0"),
    *(
        ("sample", {"temperature": t}, r"sample\.temperature is .*in \[0, 100\]")
        for t in (-1.0, 1e9)
    ),
    ("sample", {"top_k": -1}, r"sample\.top_k is -1: it must be >= 0"),
    *(
        ("sample", {"top_p": p}, r"sample\.top_p is .*: it must be in \(0, 1\]")
        for p in (0.0, 1.5)
    ),
    *(
        (section, {name: x}, rf"{section}\.{name} is .*: it must be finite")
        for section, name in (
            *(("sample", "temperature"), ("sample", "top_p"), ("model", "rope_theta")),
            *(("optimizer", "learning_rate"), ("optimizer", "epsilon")),
        )
        for x in (float("nan"), float("inf"))
    ),
    (
        "sample",
        {"stop_ids": (1.5,)},
        r"sample\.stop_ids is \(1\.5,\): it must be a tuple",
    ),
    (
        "train",
        {"log_to": ("mlflow", "wandbb")},
        r"train\.log_to is .*: it must be a tuple, and each of its values one of "
        r"'tensorboard', 'wandb', 'mlflow'",
    ),
    ("train", {"log_to": "wand"}, r"train\.log_to is 'wand': it must be a tuple"),
]
SECTIONS = {
    "model": model,
    "rope_scaling": RopeScaling,
    "data": DataConfig,
    "mesh": MeshConfig,
    "optimizer": OptimizerConfig,
    "train": TrainConfig,
    "sample": SampleConfig,
}


@pytest.mark.parametrize("section, fields, message", WRONG)
def test_errors_name_the_field_and_the_remedy(section, fields, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        SECTIONS[section](**fields)


def test_sections_must_fit_together():
    with pytest.raises(
        ValueError, match=r"sequence_length is 65, more than model\.con"
    ):
        Config(model=model(), data=DataConfig(sequence_length=65))
    short = DataConfig(sequence_length=64)
    balanced = TrainConfig(load_balance_loss=0.1)
    with pytest.raises(ValueError, match=r"_loss is 0\.1 but model\.num_experts is 0"):
        Config(model=model(), data=short, train=balanced)
    experts = model(num_experts=4, experts_per_token=2)
    Config(model=experts, data=short, train=balanced)
    with pytest.raises(
        ValueError, match=r"config\.model is 3: it must be a ModelConfig"
    ):
        Config(model=3)


@pytest.mark.parametrize("field", ["attention_scale", "rope_theta", "init_std"])
def test_an_integer_is_a_valid_float(field):
    whole, real = model(**{field: 2}), model(**{field: 2.0})
    assert type(getattr(whole, field)) is float
    assert whole == real and hash(whole) == hash(real)


def test_configs_are_frozen_and_hashable():
    config = full_config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.model.num_layers = 3
    assert hash(config) == hash(full_config())


@pytest.mark.parametrize(
    "config", [full_config(), Config(model=model(context_length=256))], ids=["full", ""]
)
def test_json_round_trip(config):
    text = json.dumps(to_dict(config), allow_nan=False)
    back = from_dict(Config, json.loads(text))
    assert back == config
    assert isinstance(back.data.path, tuple)
    assert type(back.model.attention_soft_cap) is type(config.model.attention_soft_cap)


def test_from_dict_names_the_wrong_field():
    values = to_dict(full_config())
    cases = [
        (
            ("model", "num_layer", 3),
            r"config\.model: unknown field 'num_layer' \(did y",
        ),
        (
            ("model", "num_layers", "3"),
            r"model\.num_layers is '3': it must be an integer",
        ),
        (("data", "path", "x"), r"data\.path is 'x'"),
        (("train", "zzz", 0), r"config\.train: unknown field 'zzz'$"),
    ]
    for (section, name, value), message in cases:
        wrong = {**values, section: {**values[section], name: value}}
        with pytest.raises(ValueError, match=message):
            from_dict(Config, wrong)
    missing = {n: v for n, v in values["model"].items() if n != "head_dim"}
    with pytest.raises(ValueError, match=r"config\.model: field 'head_dim' is missing"):
        from_dict(Config, {**values, "model": missing})
    with pytest.raises(ValueError, match=r"config: field 'model' is missing"):
        from_dict(Config, {})


def test_diff():
    old = full_config()
    assert diff(old, full_config()) == []
    new = dataclasses.replace(
        old,
        model=dataclasses.replace(old.model, num_layers=4, dtype="bfloat16"),
        train=dataclasses.replace(old.train, seed=6),
        init_from=None,
    )
    assert diff(old, new, ignore=("dtype",)) == [
        "model.num_layers: 2 -> 4",
        "train.seed: 5 -> 6",
        "init_from: 'runs/other' -> None",
    ]
    plain = dataclasses.replace(old.model, rope_scaling=None)
    assert len(diff(old.model, plain)) == 1 and "-> None" in diff(old.model, plain)[0]


def test_nearest():
    options = ["num_layers", "num_heads", "model_dim"]
    assert nearest("num_layer", options) == " (did you mean 'num_layers'?)"
    assert nearest("xyz", options) == ""


@pytest.mark.parametrize("file", CONFIG_FILES, ids=lambda p: p.stem)
def test_shipped_configs_build(file):
    module = runpy.run_path(str(file))
    config = module["get_config"]()
    assert isinstance(config, jaxlm.config.Config)
    assert from_dict(jaxlm.config.Config, to_dict(config)) == config
    # The docstring has the command.
    assert f"train.py configs/{file.name}" in module["__doc__"] or (
        file.stem == "shakespeare" and "python train.py" in module["__doc__"]
    )
    # Two files must not write into one run folder.
    assert config.train.run_dir == f"runs/{file.stem}"
