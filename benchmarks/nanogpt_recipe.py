"""Runs nanoGPT's CPU recipe for Shakespeare characters on any text, for a given time.

PEER_PYTHON benchmarks/nanogpt_recipe.py --nanogpt FOLDER --text FILE --seconds 250

The recipe of nanoGPT's README for a laptop CPU (4 layers of 128, 4 heads, 64 tokens,
batch 12, AdamW, cosine), with as many iterations as fit the time instead of its 2,000.
Prints the loss in nats per character over one full pass through the last tenth of the
text, in rows of 64, as train.py evaluates. Needs torch and a clone of nanoGPT.
"""

import argparse
import contextlib
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from peer_train import nanogpt

LENGTH, BATCH, PEAK, FINAL, WARMUP = 64, 12, 1e-3, 1e-4, 100


def rate(step: int, steps: int) -> float:
    if step < WARMUP:
        return PEAK * (step + 1) / (WARMUP + 1)
    done = (step - WARMUP) / max(steps - WARMUP, 1)
    return FINAL + 0.5 * (1 + math.cos(math.pi * done)) * (PEAK - FINAL)


def held_out_loss(loss_of, ids: np.ndarray) -> float:
    rows = (len(ids) - 1) // LENGTH
    inputs = ids[: rows * LENGTH].reshape(rows, LENGTH)
    targets = ids[1 : rows * LENGTH + 1].reshape(rows, LENGTH)
    total = 0.0
    with torch.no_grad():
        for start in range(0, rows, 128):
            x, y = (torch.from_numpy(a[start : start + 128]) for a in (inputs, targets))
            total += loss_of(x, y).item() * len(x)
    return total / rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nanogpt", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--seconds", type=float, default=250)
    parser.add_argument("--iterations", type=int, default=0)
    arguments = parser.parse_args()
    text = Path(arguments.text).read_text()
    characters = sorted(set(text))
    ids = np.array([characters.index(c) for c in text], np.int64)
    train, held_out = ids[: int(0.9 * len(ids))], ids[int(0.9 * len(ids)) :]
    torch.manual_seed(1337)
    shape = {"context_length": LENGTH, "vocab_size": len(characters), "num_layers": 4}
    shape |= {"num_heads": 4, "model_dim": 128}
    model, loss_of = nanogpt(arguments.nanogpt, shape)
    with contextlib.redirect_stdout(sys.stderr):
        optimizer = model.configure_optimizers(0.1, PEAK, (0.9, 0.99), "cpu")

    def step(number: int, steps: int) -> None:
        for group in optimizer.param_groups:
            group["lr"] = rate(number, steps)
        starts = torch.randint(len(train) - LENGTH, (BATCH,)).tolist()
        x = torch.stack([torch.from_numpy(train[i : i + LENGTH]) for i in starts])
        y = torch.stack(
            [torch.from_numpy(train[i + 1 : i + 1 + LENGTH]) for i in starts]
        )
        loss = loss_of(x, y)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    # The first steps measure the speed, with a learning rate near 0.
    steps = arguments.iterations
    start = time.perf_counter()
    if not steps:
        for _ in range(50):
            step(0, 10**9)
        steps = int(arguments.seconds / ((time.perf_counter() - start) / 50))
        start = time.perf_counter()
    for number in range(steps):
        step(number, steps)
    seconds = time.perf_counter() - start
    model.eval()
    loss = held_out_loss(loss_of, held_out)
    print(json.dumps({"iterations": steps, "seconds": seconds, "held_out_loss": loss}))


if __name__ == "__main__":
    main()
