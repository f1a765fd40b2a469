"""What an unknown flag may stand for."""

import difflib

# A flag, or an argument without one -> what other programs call it.
_OTHER_WORDS = {
    "--optimizer.learning-rate": "lr",
    "--optimizer.weight-decay": "wd",
    "--optimizer.warmup-steps": "warmup",
    "--optimizer.clip-norm": "grad-clip max-grad-norm gradient-clip",
    "--optimizer.name": "optim",
    "--train.steps": "epochs num-epochs num-train-epochs max-steps max-iters iters",
    "--train.batch-size": "batch bs per-device-train-batch-size",
    "--train.accumulation-steps": "gradient-accumulation-steps",
    "--train.run-dir": "out out-dir output-dir output save-dir",
    "--train.checkpoint-every": "save-steps save-every",
    "--train.eval-every": "eval-interval eval-steps",
    "--data.path": "data data-dir dataset text train-file input",
    "--data.sequence-length": "seq-len seq-length max-seq-length block-size",
    "--model.num-layers": "n-layer n-layers layers depth",
    "--model.num-heads": "n-head n-heads heads",
    "--model.model-dim": "n-embd d-model hidden-size dim",
    "--model.hidden-dim": "intermediate-size d-ff ffn-dim",
    "--model.dtype": "precision",
    "--init-from": "model model-name model-name-or-path checkpoint pretrained",
    "--num-samples": "n num-return-sequences",
    "--temperature": "temp",
    "--max-new-tokens": "n-predict num-predict max-tokens max-length length num-tokens",
    "--system": "system-prompt",
    "--to": "format type outtype",
    "--against": "reference",
    "RUN": "run model model-name model-name-or-path checkpoint ckpt",
    "SRC": "src input model checkpoint",
    "DST": "dst out output outfile",
    "RUNS": "run runs run-dir",
}
_ADVICE = {
    "the same command again resumes a run": "resume resume-from-checkpoint continue",
    "JAX_PLATFORMS=cpu in the environment selects the device": "device gpu cpu cuda",
}


def suggestion(word: str, known: list[str]) -> str:
    """Returns what an unknown flag may stand for, in brackets; "" without an idea."""
    name = word.partition("=")[0]
    last = name.lstrip("-").rpartition(".")[2]
    for flag, others in _OTHER_WORDS.items():
        if flag in known and last in others.split():
            if flag.startswith("--"):
                return f" (did you mean {flag!r}?)"
            return f" ({flag} is given without a flag)"
    for advice, others in _ADVICE.items():
        if last in others.split():
            return f" ({advice})"
    by_last = {flag.lstrip("-").rpartition(".")[2]: flag for flag in reversed(known)}
    options = {flag.lstrip("-"): flag for flag in known} | by_last
    close = [last, *difflib.get_close_matches(name.lstrip("-"), options)]
    near = next((options[option] for option in close if option in options), None)
    return "" if near is None else f" (did you mean {near!r}?)"
