"""Times a peer's training step in its own Python. Called by train_step.py.

Both peers take the usual step: bf16 autocast or f32, clipping at norm 1, torch's AdamW.
On a GPU the model is compiled and AdamW is fused, as is usual there.
"""

import argparse
import contextlib
import json
import sys
import time


def transformers_llama(shape: dict):
    """Makes a Llama of a shape, written as `ModelConfig`, with random weights."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=shape["vocab_size"],
        num_hidden_layers=shape["num_layers"],
        hidden_size=shape["model_dim"],
        num_attention_heads=shape["num_heads"],
        num_key_value_heads=shape["num_kv_heads"],
        head_dim=shape["head_dim"],
        intermediate_size=shape["hidden_dim"],
        max_position_embeddings=shape["context_length"],
        rope_theta=shape["rope_theta"],
        rms_norm_eps=shape["norm_epsilon"],
        tie_word_embeddings=shape["tied_embeddings"],
        use_cache=False,
    )
    model = transformers.LlamaForCausalLM(config)
    # transformers shifts the labels itself, so inputs are also the labels.
    return model, lambda x, y: model(input_ids=x, labels=x).loss


def nanogpt(folder: str, shape: dict):
    """Makes a GPT of a shape, written as `ModelConfig`, by nanoGPT's own model.py."""
    sys.path.insert(0, folder)
    from model import GPT, GPTConfig

    with contextlib.redirect_stdout(sys.stderr):
        model = GPT(
            GPTConfig(
                block_size=shape["context_length"],
                vocab_size=shape["vocab_size"],
                n_layer=shape["num_layers"],
                n_head=shape["num_heads"],
                n_embd=shape["model_dim"],
                dropout=0.0,
                bias=False,
            )
        )
    return model, lambda x, y: model(x, y)[1]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("peer", choices=["transformers", "nanogpt"])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--model", type=json.loads, required=True)
    parser.add_argument("--nanogpt")
    arguments = parser.parse_args()
    import torch

    torch.manual_seed(0)
    shape = arguments.model
    if arguments.peer == "transformers":
        model, loss_of = transformers_llama(shape)
    else:
        model, loss_of = nanogpt(arguments.nanogpt, shape)
    gpu = torch.cuda.is_available()
    device = "cuda" if gpu else "cpu"
    model.to(device).train()
    if gpu:
        torch.set_float32_matmul_precision("high")
        model.compile()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1, fused=gpu
    )
    rows = (arguments.batch, shape["context_length"])
    x, y = (
        torch.randint(0, shape["vocab_size"], rows, device=device) for _ in range(2)
    )
    autocast = arguments.dtype == "bfloat16"

    def step() -> float:
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
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
    result = {"seconds": seconds[2:], "first_step_s": first}
    result["losses"] = [first_loss, last_loss]
    print(json.dumps(result | {"version": torch.__version__}))


if __name__ == "__main__":
    main()
