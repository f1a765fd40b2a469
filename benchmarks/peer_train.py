"""Times a peer's training step in its own Python. Called by train_step.py.

Both peers take the usual step: bf16 autocast or f32, clipping at norm 1, torch's AdamW.
"""

import argparse
import contextlib
import json
import sys
import time


def transformers_llama():
    """Makes a Llama with the shape of SmolLM2-135M and random weights."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=49152,
        num_hidden_layers=30,
        hidden_size=576,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        intermediate_size=1536,
        max_position_embeddings=256,
        rope_theta=100_000.0,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        use_cache=False,
    )
    model = transformers.LlamaForCausalLM(config)
    # transformers shifts the labels itself, so inputs are also the labels.
    return model, lambda x, y: model(input_ids=x, labels=x).loss, 49152, 4, 256


def nanogpt_baby(folder: str):
    """Makes nanoGPT's Shakespeare character model from its own model.py."""
    sys.path.insert(0, folder)
    from model import GPT, GPTConfig

    with contextlib.redirect_stdout(sys.stderr):
        model = GPT(
            GPTConfig(
                block_size=256,
                vocab_size=65,
                n_layer=6,
                n_head=6,
                n_embd=384,
                dropout=0.0,
                bias=False,
            )
        )
    return model, lambda x, y: model(x, y)[1], 65, 16, 256


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("peer", choices=["transformers", "nanogpt"])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--nanogpt")
    arguments = parser.parse_args()
    import torch

    torch.manual_seed(0)
    if arguments.peer == "transformers":
        model, loss_of, vocab, B, T = transformers_llama()
    else:
        model, loss_of, vocab, B, T = nanogpt_baby(arguments.nanogpt)
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1
    )
    x, y = (torch.randint(0, vocab, (B, T)) for _ in range(2))
    autocast = arguments.dtype == "bfloat16"

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = loss_of(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    start = time.perf_counter()
    first_loss = step()
    first = time.perf_counter() - start
    seconds = []
    for _ in range(arguments.steps + 2):
        start = time.perf_counter()
        last_loss = step()
        seconds.append(time.perf_counter() - start)
    print(
        json.dumps(
            {
                "seconds": seconds[2:],
                "first_step_s": first,
                "losses": [first_loss, last_loss],
                "version": torch.__version__,
            }
        )
    )


if __name__ == "__main__":
    main()
