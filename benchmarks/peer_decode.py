"""Times transformers' `generate` in its own Python. Called by decode.py.

On a GPU it has a static cache, for which transformers compiles the forward pass.
"""

import argparse
import json
import time

from peer_train import transformers_llama


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--prompt", type=int, required=True)
    parser.add_argument("--new", type=int, required=True)
    parser.add_argument("--repeats", type=int, required=True)
    parser.add_argument("--model", type=json.loads, required=True)
    arguments = parser.parse_args()
    import torch

    torch.manual_seed(0)
    model, _ = transformers_llama(arguments.model)
    gpu = torch.cuda.is_available()
    device = "cuda" if gpu else "cpu"
    model = model.to(device, getattr(torch, arguments.dtype)).eval()
    model.config.use_cache = True
    shape = (arguments.batch, arguments.prompt)
    prompt = torch.randint(0, arguments.model["vocab_size"], shape, device=device)

    def seconds(new: int) -> float:
        start = time.perf_counter()
        tokens = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
            cache_implementation="static" if gpu else None,
        )
        tokens.cpu()
        return time.perf_counter() - start

    with torch.inference_mode():
        # Each length of a static cache is compiled, and captured at its second call.
        for new in (1, 1, *(arguments.new,) * 3) if gpu else (2,):
            seconds(new)
        # The prompt gives the first token, so the difference is that of decoding.
        prefill = [seconds(1) for _ in range(arguments.repeats)]
        decode = []
        if arguments.new > 1:
            decode = [seconds(arguments.new) - min(prefill) for _ in prefill]
    result = {"prefill_s": prefill, "decode_s": decode, "version": torch.__version__}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
