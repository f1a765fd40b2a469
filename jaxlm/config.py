"""Every setting of a run, as frozen dataclasses.

A `Config` is written in Python (`configs/`), overridden on the command line
(`--model.num-layers 12`), and stored as JSON in every run folder and checkpoint.
Impossible combinations raise `ValueError` with the field and the remedy.

The line below a field is its help in `train.py --help`.
"""

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Literal

from jaxlm.fields import check, check_types, nearest

BUNDLED_TEXT = "bundled:shakespeare.txt"
TOKENIZERS = ("chars", "bytes", "bpe", "sentencepiece")
"""Values of `data.tokenizer`, beside `hf:PATH`."""

# Fields of the model that change how it is computed, but not what it computes. They may
# change when a run is resumed.
EXECUTION_FIELDS = (
    "dtype",
    "remat",
    "unroll_layers",
    "attention",
    "context_attention",
    "sequence_parallel",
    "decode_attention",
)
WeightKind = Literal["float", "int8", "int4"]
CacheKind = Literal["full", "ring", "int8", "ring_int8", "int4", "ring_int4"]
AttentionName = Literal[
    "auto",
    "reference",
    "dense",
    "xla",
    "cached",
    "pallas_tpu",
    "pallas_gpu",
    "splash",
    "cudnn",
]


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Stretches rotary frequencies for contexts longer than those of training.

    Formulas and field meanings follow Hugging Face transformers
    (`modeling_rope_utils.py`); see `jaxlm/ops/rope.py`.
    """

    kind: Literal["linear", "dynamic", "llama3", "yarn", "longrope"]
    """Formula."""
    factor: float = 1.0
    """New context length divided by the original one."""
    original_context_length: int = 0
    """Context length of training, in tokens; 0 takes model.context_length."""
    low_frequency_factor: float = 1.0
    """llama3: wavelengths above original_context_length / this are stretched by factor,
    those between this and the next are stretched in part."""
    high_frequency_factor: float = 4.0
    """llama3: wavelengths below original_context_length / this are kept."""
    beta_fast: float = 32.0
    """yarn: frequencies that turn more often than this in the original context are
    kept."""
    beta_slow: float = 1.0
    """yarn: frequencies that turn less often than this in the original context are
    stretched by factor, those between this and beta_fast in part."""
    truncate: bool = True
    """yarn: round the dimensions at which stretching begins and ends to integers."""
    attention_factor: float | None = None
    """yarn, longrope: cos and sin are multiplied by this; None takes the formula of the
    paper."""
    short_factors: tuple[float, ...] = ()
    """longrope: divisor of each frequency, up to the original context length."""
    long_factors: tuple[float, ...] = ()
    """longrope: divisor of each frequency, beyond the original context length."""

    def __post_init__(self):
        check_types(self, "model.rope_scaling")
        where = "model.rope_scaling"
        check(self, where, "at least 1, at most a million", "factor")
        check(self, where, ">= 0", "original_context_length")
        positive = ("attention_factor", "low_frequency_factor", "beta_slow")
        check(self, where, "> 0", *positive)
        check(self, where, "all at least 0.001", "short_factors", "long_factors")
        for kind, low, high in (
            ("llama3", "low_frequency_factor", "high_frequency_factor"),
            ("yarn", "beta_slow", "beta_fast"),
        ):
            bounds = getattr(self, low), getattr(self, high)
            if self.kind == kind and bounds[0] >= bounds[1]:
                raise ValueError(
                    f"{where}.{low} is {bounds[0]}: it must be less than "
                    f"{where}.{high} {bounds[1]}"
                )
        if self.kind == "longrope" and not (self.short_factors and self.long_factors):
            raise ValueError(
                f"{where}.kind is 'longrope': set {where}.short_factors and "
                f"{where}.long_factors, one number for each rotated pair of dimensions"
            )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The architecture of a decoder-only Transformer, and how it is computed."""

    vocab_size: int = 0
    """Rows of the embedding table; 0 takes the tokenizer's size in training."""
    num_layers: int
    """Number of Transformer blocks."""
    model_dim: int
    """Width of the residual stream."""
    num_heads: int
    """Number of query heads."""
    num_kv_heads: int
    """Number of key/value heads: num_heads is MHA, 1 is MQA, in between is GQA."""
    head_dim: int
    """Width of a head; need not be model_dim / num_heads."""
    hidden_dim: int
    """Width inside the feed-forward, or inside each expert."""
    context_length: int
    """Largest number of tokens that the model attends over."""

    position: Literal["rope", "learned", "sinusoidal", "none"] = "rope"
    """Position encoding."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""
    rope_local_theta: float | None = None
    """Base in local layers, used unscaled (Gemma 3); None: as in global layers."""
    rope_fraction: float = 1.0
    """Fraction of head_dim that is rotated (partial rotary)."""
    rope_scaling: RopeScaling | None = None
    """Stretching of the rotary frequencies for long contexts."""
    rope_pattern: tuple[bool, ...] = (True,)
    """Which layers use RoPE, repeated over the layers; False is a NoPE layer."""

    layer_pattern: tuple[Literal["global", "local"], ...] = ("global",)
    """Attention of each layer, repeated over the layers."""
    window: int | None = None
    """Tokens that a local layer attends to, including the current one."""
    attention_bias: bool = False
    """Add biases to the query, key and value projections."""
    attention_output_bias: bool = False
    """Add a bias to the output projection of attention."""
    qk_norm: Literal["none", "head", "full"] = "none"
    """Normalize queries and keys: over each head, or over all heads (OLMo 2)."""
    attention_scale: float | None = None
    """Factor of the attention scores; None is head_dim ** -0.5."""
    attention_soft_cap: float | None = None
    """Soft cap of the attention scores, cap * tanh(scores / cap); None: no cap."""
    attention_sinks: bool = False
    """Learn a logit per head that joins the softmax but has no value (gpt-oss)."""

    activation: Literal[
        "silu", "gelu", "gelu_tanh", "relu", "relu_squared", "swiglu_clamped"
    ] = "silu"
    """Activation of the feed-forward; swiglu_clamped (gpt-oss) needs gated."""
    gated: bool = True
    """Multiply the activation by a second projection: silu gives SwiGLU, gelu GeGLU."""
    feed_forward_bias: bool = False
    """Add biases to the projections of the feed-forward."""
    num_experts: int = 0
    """Experts in each layer, chosen by a router; 0: one dense feed-forward."""
    experts_per_token: int = 0
    """Experts that the router chooses for each token."""
    router_normalize: bool = True
    """Make the weights of a token's experts sum to 1; False keeps the softmax's."""
    router_bias: bool = False
    """Add a bias to the router."""

    norm: Literal["rms", "rms_unit_offset", "layer"] = "rms"
    """Kind of norm; rms_unit_offset is RMSNorm that multiplies by 1 + scale (Gemma)."""
    norm_bias: bool = False
    """Add a bias to LayerNorm."""
    norm_epsilon: float = 1e-6
    """Added to the variance (for RMSNorm, to the mean square)."""
    norm_placement: Literal["pre", "post", "output", "both"] = "pre"
    """pre: x + f(norm(x)). post: norm(x + f(x)), the original Transformer.
    output: x + norm(f(x)), OLMo 2. both: x + norm(f(norm(x))), Gemma 2."""
    parallel_block: bool = False
    """Compute x + attention(norm(x)) + feed_forward(norm(x)), as GPT-NeoX does."""
    final_norm: bool = True
    """Normalize before the output head."""

    tied_embeddings: bool = True
    """Use the embedding table as the output head."""
    embedding_scale: float = 1.0
    """Factor of the embeddings, rounded to the compute dtype."""
    final_soft_cap: float | None = None
    """Soft cap of the logits, cap * tanh(logits / cap); None: no cap."""

    init: Literal["normal", "fan_in"] = "normal"
    """How weights are drawn. normal: with the standard deviation init_std. fan_in: with
    the inverse square root of a matrix's inputs, and an output head of zeros. In both,
    projections into the residual stream are divided by sqrt(2 * num_layers)."""
    init_std: float = 0.02
    """Standard deviation of the embeddings, and of the weights with init=normal."""

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute dtype; auto is bfloat16 where the device multiplies it natively."""
    remat: Literal["none", "dots", "attention", "full", "offload"] = "none"
    """What the backward pass computes again, to save memory. none: nothing. dots: all
    but products with weights and the attention kernel. attention: all but the attention
    kernel. full: each block, from its input. offload: as attention; what is kept
    waits in the memory of the host."""
    unroll_layers: int = 1
    """Layer groups in a scan step; more can run faster, but compile slower; 0: all."""
    attention: AttentionName = "auto"
    """Attention kernel; auto chooses by device and length (docs/attention.md)."""
    context_attention: Literal["auto", "ring", "gather"] = "auto"
    """With mesh.context: ring passes keys on from device to device, gather holds those
    of whole rows; auto is ring where the kernel can (docs/attention.md)."""
    sequence_parallel: bool = False
    """With mesh.tensor: between attention and feed-forward each device has its part of
    the tokens, which saves memory (docs/training.md)."""
    decode_attention: AttentionName = "auto"
    """Attention kernel for new tokens that read the KV cache, as when sampling; not
    every kernel can do it (docs/attention.md)."""

    def __post_init__(self):
        check_types(self, "model")
        positive = ("num_layers", "model_dim", "num_heads", "num_kv_heads")
        positive += ("head_dim", "hidden_dim", "context_length", "norm_epsilon")
        positive += ("attention_soft_cap", "final_soft_cap", "attention_scale")
        check(self, "model", "> 0", *positive)
        # Positions and ids are int32.
        check(self, "model", "below 2**31", "context_length", "vocab_size")
        check(self, "model", ">= 0", "vocab_size", "init_std", "unroll_layers")
        check(self, "model", ">= 0", "num_experts")
        check(self, "model", "at least one value", "layer_pattern", "rope_pattern")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"model.num_heads is {self.num_heads}: it must be a multiple of "
                f"model.num_kv_heads {self.num_kv_heads}, as each key/value head "
                "serves the same number of query heads"
            )
        if self.position == "rope":
            self._check_rope()
        elif self.rope_scaling is not None:
            raise ValueError(
                f"model.rope_scaling is set but model.position is {self.position!r}: "
                "set model.position to 'rope' or leave the scaling out"
            )
        if "local" in self.layer_pattern and self.window is None:
            raise ValueError(
                "model.layer_pattern has local layers: set model.window to the number "
                "of tokens they attend to"
            )
        if self.window is not None:
            if "local" not in self.layer_pattern:
                raise ValueError(
                    f"model.window is {self.window} but model.layer_pattern has no "
                    "local layer: add one or leave the window out"
                )
            if not 0 < self.window <= self.context_length:
                raise ValueError(
                    f"model.window is {self.window}: it must be from 1 to "
                    f"model.context_length {self.context_length}"
                )
        if self.parallel_block and self.norm_placement != "pre":
            raise ValueError(
                "model.parallel_block needs model.norm_placement 'pre', not "
                f"{self.norm_placement!r}"
            )
        if self.activation == "swiglu_clamped" and not self.gated:
            raise ValueError(
                "model.activation is 'swiglu_clamped', which acts on two projections: "
                "set model.gated to True"
            )
        self._check_experts()
        if self.norm_bias and self.norm != "layer":
            raise ValueError(
                f"model.norm_bias needs model.norm 'layer', not {self.norm!r}"
            )

    def _check_experts(self) -> None:
        if not self.num_experts:
            defaults = {f.name: f.default for f in dataclasses.fields(self)}
            for name in ("experts_per_token", "router_normalize", "router_bias"):
                if getattr(self, name) != defaults[name]:
                    raise ValueError(
                        f"model.{name} is {getattr(self, name)} but model.num_experts "
                        "is 0: set the number of experts or leave it out"
                    )
        elif not 1 <= self.experts_per_token <= self.num_experts:
            raise ValueError(
                f"model.experts_per_token is {self.experts_per_token}: it must be from "
                f"1 to model.num_experts {self.num_experts}"
            )

    def _check_rope(self) -> None:
        check(self, "model", "at least 1", "rope_theta", "rope_local_theta")
        check(self, "model", "in (0, 1]", "rope_fraction")
        if self.rotary_dim % 2 or self.rotary_dim == 0:
            raise ValueError(
                f"model.head_dim * model.rope_fraction is {self.rotary_dim}: it must "
                "be even and at least 2, as RoPE rotates pairs of dimensions"
            )
        scaling = self.rope_scaling
        if scaling is not None and scaling.kind == "dynamic" and self.rotary_dim < 4:
            raise ValueError(
                "model.rope_scaling.kind 'dynamic' needs 4 rotated dimensions or more: "
                "raise model.head_dim or model.rope_fraction"
            )
        if scaling is not None and scaling.kind == "yarn" and self.rope_theta <= 1:
            raise ValueError(
                f"model.rope_theta is {self.rope_theta}: with model.rope_scaling.kind "
                "'yarn' it must be > 1"
            )
        if scaling is not None and scaling.kind == "longrope":
            if (scaling.original_context_length or self.context_length) < 2:
                raise ValueError(
                    "model.rope_scaling.original_context_length is 1: with "
                    "model.rope_scaling.kind 'longrope' it must be at least 2"
                )
            for name in ("short_factors", "long_factors"):
                if len(getattr(scaling, name)) != self.rotary_dim // 2:
                    raise ValueError(
                        f"model.rope_scaling.{name} has {len(getattr(scaling, name))} "
                        f"numbers; {self.rotary_dim // 2} pairs are rotated"
                    )

    @property
    def rotary_dim(self) -> int:
        """Number of dimensions of a head that RoPE rotates."""
        return int(self.head_dim * self.rope_fraction)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the text comes from and how it becomes rows of tokens."""

    path: tuple[str, ...] = (BUNDLED_TEXT,)
    """Text files, .jsonl, .parquet (text also .gz, .zst), folders or globs.
    Each entry is a separate source of the mixture."""
    weights: tuple[float, ...] = ()
    """Relative share of rows from each entry of path; empty: proportional to size."""
    field: str = "text"
    """Field (.jsonl) or column (.parquet) that holds the text."""
    tokenizer: str = "chars"
    """chars: the distinct characters of the text. bytes: UTF-8 bytes.
    bpe, sentencepiece: subwords, learned from the text.
    hf:PATH: a tokenizer.json, its folder, or hf:owner/name."""
    tokenizer_model: str | None = None
    """SentencePiece .model file; None trains one on the text."""
    tokenizer_vocab_size: int = 4096
    """Vocabulary size of a tokenizer that is trained here."""
    tokenizer_algorithm: Literal["bpe", "unigram"] = "bpe"
    """Algorithm of a SentencePiece model that is trained here."""
    sequence_length: int = 256
    """Number of tokens in a row."""
    holdout_fraction: float = 0.1
    """Fraction of each source, at its end, that is held out for evaluation."""
    segment_attention: bool = True
    """Keep attention inside each document; False lets it cross documents in a row."""
    invalid_utf8: Literal["error", "replace"] = "error"
    """What to do with bytes that are not UTF-8; replace warns with their number."""
    cache_dir: str | None = None
    """Folder for tokenized text; None is jaxlm/tokens in the user's cache folder."""
    old_tokens: bool = False
    """Continue a run whose text has changed, with the tokens that it began with."""
    workers: int = 0
    """Processes that tokenize; 0 starts one for each CPU core."""
    prefetch: int = 2
    """Batches to prepare while a step runs."""

    def __post_init__(self):
        check_types(self, "data")
        check(self, "data", "at least one path", "path")
        check(self, "data", "not empty", "cache_dir", "tokenizer_model")
        check(self, "data", "in [0, 1)", "holdout_fraction")
        check(self, "data", "> 0", "sequence_length")
        check(self, "data", "> 3", "tokenizer_vocab_size")
        check(self, "data", ">= 0", "workers", "prefetch")
        if self.weights:
            if len(self.weights) != len(self.path):
                raise ValueError(
                    f"data.weights has {len(self.weights)} numbers for "
                    f"{len(self.path)} entries of data.path"
                )
            check(self, "data", ">= 0 and not all zero", "weights")
        named = self.tokenizer.startswith("hf:") and self.tokenizer != "hf:"
        if self.tokenizer not in TOKENIZERS and not named:
            raise ValueError(
                f"data.tokenizer is {self.tokenizer!r}"
                f"{nearest(self.tokenizer, list(TOKENIZERS))}: it must be one of "
                f"{', '.join(TOKENIZERS)}, or hf:PATH for a tokenizer of Hugging Face"
            )
        if self.tokenizer_model is not None and self.tokenizer != "sentencepiece":
            raise ValueError(
                "data.tokenizer_model is set but data.tokenizer is "
                f"{self.tokenizer!r}: set data.tokenizer to 'sentencepiece'"
            )


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """The number of devices along each axis of the mesh."""

    data: int = -1
    """Replicas, each with its part of the batch; -1 takes all remaining devices."""
    fsdp: int = 1
    """Parts into which the parameters and the batch are sharded."""
    expert: int = 1
    """Parts into which the experts and the batch are sharded; tokens go to experts."""
    context: int = 1
    """Parts into which each row is cut, for rows too long for one device."""
    tensor: int = 1
    """Parts into which heads, feed-forward and vocabulary are sharded."""

    def __post_init__(self):
        check_types(self, "mesh")
        axes = [axis.name for axis in dataclasses.fields(self)]
        check(self, "mesh", ">= 1, or -1", *axes)
        rest = [axis for axis in axes if getattr(self, axis) == -1]
        if len(rest) > 1:
            raise ValueError(
                f"mesh.{' and mesh.'.join(rest)} are -1: only one axis can take all "
                "remaining devices"
            )


@dataclass(frozen=True, kw_only=True)
class ProcessesConfig:
    """The processes of a run on several hosts (docs/launch.md).

    On a TPU VM, GKE, SLURM and Open MPI none of these is needed.
    """

    coordinator: str | None = None
    """HOST:PORT of process 0, on which it listens; None: from the launcher."""
    count: int | None = None
    """Number of processes; None: from the launcher."""
    index: int | None = None
    """Number of this process, from 0; None: from the launcher."""
    detect: bool = True
    """Read what a launcher tells; False: this process is alone unless flags say
    otherwise."""
    heartbeat_seconds: float = 30.0
    """A process that is silent for this long ends the others."""
    barrier_minutes: float = 30.0
    """How long the processes wait for one another: before the first step, when they
    save, and for one that hangs, or ten times the longest wait before if that is more.
    """

    def __post_init__(self):
        check_types(self, "processes")
        check(self, "processes", "> 0", "count", "heartbeat_seconds", "barrier_minutes")
        check(self, "processes", ">= 0", "index")
        if self.coordinator is not None and not re.fullmatch(
            r".+:[0-9]{1,5}", self.coordinator
        ):
            raise ValueError(
                f"processes.coordinator is {self.coordinator!r}: it must be HOST:PORT"
            )


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer and its schedule."""

    name: Literal["adamw", "lion", "muon", "adafactor"] = "adamw"
    """muon orthogonalizes the updates of the layers' matrices.
    As in optax, the rest gets AdamW with Nesterov momentum and no decay."""
    learning_rate: float = 3e-4
    """Peak learning rate (with muon, of the matrices)."""
    adam_learning_rate: float | None = None
    """muon: peak learning rate of the AdamW part; None is learning_rate."""
    b1: float = 0.9
    """Decay of the first moment (adamw, lion, and the AdamW part of muon)."""
    b2: float = 0.95
    """Decay of the second moment (adamw, lion, and the AdamW part of muon)."""
    epsilon: float = 1e-8
    """Added to the square root of the second moment."""
    momentum: float = 0.95
    """muon: decay of the momentum."""
    weight_decay: float = 0.1
    """Decoupled weight decay of layer matrices and (not with muon) the head.
    Embeddings, norms and biases do not decay."""
    clip_norm: float | None = 1.0
    """Global norm to which larger gradients are scaled down; None: no clipping."""
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """Learning rate after warm-up; wsd is constant, then decays linearly at the end."""
    warmup_steps: int = 100
    """Steps of linear warm-up; if that is over half of the run, a tenth of it."""
    decay_fraction: float = 0.2
    """wsd: fraction of all steps, at the end, in which the learning rate decays."""
    final_fraction: float = 0.1
    """Final learning rate, as a fraction of the peak."""

    def __post_init__(self):
        check_types(self, "optimizer")
        positive = ("learning_rate", "epsilon", "clip_norm", "adam_learning_rate")
        check(self, "optimizer", "> 0", *positive)
        check(self, "optimizer", "in [0, 1)", "b1", "b2", "momentum")
        check(self, "optimizer", "in [0, 1]", "decay_fraction", "final_fraction")
        check(self, "optimizer", ">= 0", "warmup_steps", "weight_decay")

    def first_decayed(self, steps: int) -> int | None:
        """Returns the first step, from 0, whose learning rate depends on `steps`.

        None if there is none: under a constant schedule a run can always go on. Until
        that step, runs of any length are the same.
        """
        if self.schedule == "constant":
            return None
        rest = max(steps - self.warmup_steps, 1)
        decay = rest
        if self.schedule == "wsd":
            decay = min(max(round(self.decay_fraction * steps), 1), rest)
        return self.warmup_steps + rest - decay


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long to train, and what to log and save when."""

    steps: int = 1000
    """Number of optimizer steps."""
    batch_size: int = 16
    """Rows in a step, over all devices."""
    accumulation_steps: int = 1
    """Microbatches in a step, whose gradients are summed, weighted by tokens."""
    accumulate_whole: bool = False
    """Whether devices along mesh.fsdp exchange weights and gradients once a step, not
    once a microbatch. Each then holds all weights in the compute dtype and a whole
    gradient in f32."""
    seed: int = 0
    """Seed of the parameters and of the data order."""
    run_dir: str = "runs/default"
    """Folder for config.json, metrics.jsonl, checkpoints/, report.html and loss.png."""
    z_loss: float = 0.0
    """Weight of the loss log(Z)^2, which keeps logits from drifting (PaLM)."""
    load_balance_loss: float = 0.0
    """Weight of the load-balance loss of mixture-of-experts layers."""
    skip_spikes: int = 0
    """Do not apply steps whose loss or gradient is a spike or not finite, up to this
    many in a row; 0: apply all, and stop at one that is not finite."""
    skip_batches: tuple[str, ...] = ()
    """Ranges a:b of batches that no step trains on: a to b - 1.
    Batches have the numbers of the steps that would train on them, from 1."""
    loss_chunk: int = 0
    """Tokens of a device whose logits are in memory at once; 0: all."""
    log_every: int = 10
    """Steps between rows in metrics.jsonl."""
    eval_every: int = 500
    """Steps between evaluations on the held-out text; 0: only at the end."""
    eval_batches: int | None = None
    """Batches of held-out text in an evaluation; None: as many as take at most a tenth
    of the training time since the last one, by count of operations; 0: all."""
    sample_every: int = 500
    """Steps between text samples; 0: none."""
    sample_prompt: str = "\n"
    """Prompt of the text samples."""
    sample_tokens: int = 200
    """New tokens in each text sample."""
    look_every: int = 0
    """Steps between looks inside while the model reads a sentence, drawn in the report:
    entropy, lens depth, head scores, feed-forward memory; 0: none."""
    look_text: str = "The cat sat on the mat, and the dog sat"
    """That sentence; its first 32 tokens are read, and then again."""
    checkpoint_every: int = 500
    """Steps between checkpoints; 0: only at the end."""
    checkpoint_minutes: float = 15.0
    """Minutes after the last checkpoint at which one is due anyway; 0: never."""
    keep: int = 2
    """Number of latest checkpoints to keep."""
    keep_every: int = 0
    """Save at the multiples of this step too, and never delete those checkpoints, also
    when the run goes on without this flag; 0: none."""
    on_save_error: Literal["stop", "continue"] = "stop"
    """When a checkpoint cannot be saved, nor at a second try, nor the next that is due:
    stop the run, or go on. The last one of a run or a process must be saved."""
    max_minutes: float = 0.0
    """Minutes after which the run saves and stops, to be resumed; 0: no limit."""
    log_to: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ()
    """Also send metrics and samples there; each needs the extra of its name."""
    compile_cache: bool = True
    """Keep compiled programs in jaxlm/xla in the user's cache folder, unless
    JAX_COMPILATION_CACHE_DIR names another."""

    def __post_init__(self):
        check_types(self, "train")
        positive = ("steps", "batch_size", "accumulation_steps", "log_every", "keep")
        if self.steps >= 2**31:
            raise ValueError(f"train.steps is {self.steps}: it must be below 2**31")
        check(self, "train", "> 0", *positive)
        not_negative = ("seed", "z_loss", "loss_chunk", "eval_every", "sample_every")
        not_negative += ("look_every",)
        not_negative += ("sample_tokens", "checkpoint_every", "checkpoint_minutes")
        not_negative += ("keep_every", "max_minutes", "load_balance_loss")
        not_negative += ("eval_batches", "skip_spikes")
        check(self, "train", ">= 0", *not_negative)
        check(self, "train", "not empty", "run_dir")
        if self.batch_size % self.accumulation_steps:
            raise ValueError(
                f"train.batch_size is {self.batch_size}: it must be a multiple of "
                f"train.accumulation_steps {self.accumulation_steps}"
            )
        end = 0
        for text in self.skip_batches:
            if not re.fullmatch(r"[1-9][0-9]{0,17}:[1-9][0-9]{0,17}", text):
                raise ValueError(
                    f"train.skip_batches is {text!r}: it must be ranges such as "
                    "305:320, of numbers from 1"
                )
            first, after = map(int, text.split(":"))
            if after <= first:
                raise ValueError(
                    f"train.skip_batches is {text}: the second number must be the "
                    "larger"
                )
            if after >= 2**31:
                raise ValueError(
                    f"train.skip_batches is {text}: numbers must be below 2**31"
                )
            if first <= end:
                raise ValueError(
                    f"train.skip_batches is {' '.join(self.skip_batches)}: ranges must "
                    "be in order and have other batches between them"
                )
            end = after

    @property
    def skipped_batches(self) -> list[range]:
        """The ranges of `skip_batches`."""
        return [range(*map(int, text.split(":"))) for text in self.skip_batches]

    def batch_of(self, step: int) -> int:
        """Returns the number of the batch that a step trains on, both from 1."""
        batch = step
        for skipped in self.skipped_batches:
            if batch >= skipped.start:
                batch += len(skipped)
        return batch


@dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    """A trace of some steps, for xprof."""

    steps: str = ""
    """Range a:b of the steps to trace, a to b - 1, into RUN/profile/; empty: none."""

    def __post_init__(self):
        check_types(self, "profile")
        numbers = re.fullmatch(r"([1-9][0-9]{0,17}):([1-9][0-9]{0,17})", self.steps)
        if self.steps and not (numbers and int(numbers[1]) < int(numbers[2])):
            raise ValueError(
                f"profile.steps is {self.steps!r}: it must be a range such as 10:20, "
                "of numbers from 1"
            )

    @property
    def range(self) -> range:
        """The steps to trace."""
        return range(*map(int, self.steps.split(":"))) if self.steps else range(0)


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """How tokens are sampled; `infer/sampling.py` gives the order of the rules."""

    max_new_tokens: int = 256
    """Largest number of new tokens."""
    temperature: float = 1.0
    """Divisor of the logits; 0 takes the most likely token."""
    top_k: int = 0
    """Sample from the k most likely tokens; 0: from all."""
    top_p: float = 1.0
    """Sample from the most likely tokens that together have this probability; 1: from
    all."""
    min_p: float = 0.0
    """Sample from tokens with at least this fraction of the largest probability; 0:
    from all."""
    typical_p: float = 1.0
    """Sample from the tokens that together have this probability and whose surprisal is
    nearest to the entropy; 1: from all."""
    top_n_sigma: float = 0.0
    """Sample from logits within this many standard deviations of the largest; 0: from
    all."""
    xtc_probability: float = 0.0
    """How often XTC drops all tokens above the threshold but the least likely one."""
    xtc_threshold: float = 0.1
    """Probability from which on XTC may drop a token."""
    repetition_penalty: float = 1.0
    """Makes tokens of the text so far less likely; divides their positive logits and
    multiplies their negative ones; 1: off."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens that are among the new ones."""
    frequency_penalty: float = 0.0
    """Subtracted from the logit of a token each time it is among the new ones."""
    dry_multiplier: float = 0.0
    """Strength of DRY, which makes tokens less likely that prolong a repetition; 0:
    off."""
    dry_base: float = 1.75
    """Factor of DRY's penalty for each token that a repetition is longer."""
    dry_allowed_length: int = 2
    """Tokens of a repetition from which on DRY has an effect."""
    dry_breakers: tuple[str, ...] = ("\n", ":", '"', "*")
    """Texts that no repetition of DRY extends across."""
    no_repeat_ngram: int = 0
    """Never repeat so many tokens in a row; 0: off."""
    bias_ids: tuple[int, ...] = ()
    """Token ids whose logits are changed."""
    biases: tuple[float, ...] = ()
    """What is added to the logits of `bias_ids`, one number for each."""
    forbidden_ids: tuple[int, ...] = ()
    """Token ids that are never sampled."""
    min_new_tokens: int = 0
    """New tokens before which no token of `stop_ids` is sampled."""
    stop_ids: tuple[int, ...] = ()
    """Token ids that end a text and are not part of it; when empty, `sample` and `chat`
    take those of the tokenizer."""
    stop_strings: tuple[str, ...] = ()
    """Texts that end the new text and are not part of it."""

    def __post_init__(self):
        check_types(self, "sample")
        check(self, "sample", "> 0", "max_new_tokens", "repetition_penalty")
        check(self, "sample", ">= 0", "top_k", "top_n_sigma", "dry_multiplier")
        check(self, "sample", ">= 0", "no_repeat_ngram", "min_new_tokens")
        check(self, "sample", "at least 1", "dry_base", "dry_allowed_length")
        check(self, "sample", "in [0, 100]", "temperature")
        check(self, "sample", "in (0, 1]", "top_p", "typical_p")
        probabilities = ("min_p", "xtc_probability", "xtc_threshold")
        check(self, "sample", "in [0, 1]", *probabilities)
        if len(self.bias_ids) != len(self.biases):
            raise ValueError(
                f"sample.bias_ids has {len(self.bias_ids)} ids and sample.biases "
                f"{len(self.biases)} numbers: give one number for each id"
            )
        for name in ("stop_strings", "dry_breakers"):
            if "" in getattr(self, name):
                raise ValueError(f"sample.{name} has an empty text: leave it out")


NEEDS_INIT_FROM = "CHECKPOINT"
"""`init_from` of a config file whose user must give one."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """A training run."""

    model: ModelConfig
    """Architecture."""
    data: DataConfig = field(default_factory=DataConfig)
    """Training text, tokenizer and rows."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """Number of devices along each axis of the mesh."""
    processes: ProcessesConfig = field(default_factory=ProcessesConfig)
    """The processes of a run on several hosts."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer and learning rate."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Length of the run, and what to log and save when."""
    sample: SampleConfig = field(default_factory=lambda: SampleConfig(temperature=0.8))
    """How the text samples during training are drawn."""
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    """A trace of some steps, for xprof."""
    fresh: bool = False
    """Start over in a run folder that has checkpoints, and move those aside."""
    resume_step: int | None = None
    """Continue from this saved step, not the newest, and move later ones aside."""
    init_from: str | None = None
    """Checkpoint whose model and parameters start the run, at step 0:
    a run or step folder, a Hugging Face folder, a .gguf file, or hf:owner/name."""

    def __post_init__(self):
        check_types(self, "config")
        if self.resume_step is not None and self.fresh:
            raise ValueError("--fresh starts over: leave it or --resume-step out")
        if self.data.sequence_length > self.model.context_length:
            raise ValueError(
                f"data.sequence_length is {self.data.sequence_length}, more than "
                f"model.context_length {self.model.context_length}: make rows shorter "
                "or the context longer"
            )
        if self.train.load_balance_loss and not self.model.num_experts:
            raise ValueError(
                f"train.load_balance_loss is {self.train.load_balance_loss} but "
                "model.num_experts is 0: set the number of experts or leave it out"
            )
