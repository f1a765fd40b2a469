"""llama.cpp's server (package xllamacpp), and the times of its prefill and decoding.

Called by decode.py and serve.py.
"""

import argparse
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import xllamacpp


def llama_server(model: str, slots: int, length: int, port: int) -> xllamacpp.Server:
    """Serves a GGUF file on this machine; `length` tokens fit in each slot."""
    params = xllamacpp.CommonParams()
    params.model.path = model
    params.n_parallel, params.n_ctx, params.warmup = slots, length * slots, True
    params.cpuparams.n_threads = len(os.sched_getaffinity(0))
    params.hostnames, params.port = ["127.0.0.1"], port
    server = xllamacpp.Server(params)
    assert str(port) in server.listening_address
    return server


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True, help="a GGUF file")
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--prompt", type=int, required=True)
    parser.add_argument("--new", type=int, required=True)
    parser.add_argument("--repeats", type=int, required=True)
    parser.add_argument("--port", type=int, default=8775)
    arguments = parser.parse_args()
    length = arguments.prompt + arguments.new + 8
    server = llama_server(arguments.model, arguments.batch, length, arguments.port)
    call = {"temperature": 0, "ignore_eos": True, "cache_prompt": False}

    def one(row: int, new: int) -> None:
        prompt = [1000 + (row * 97 + i * 31) % 10_000 for i in range(arguments.prompt)]
        response = httpx.post(
            f"{server.listening_address}/completion",
            json={**call, "prompt": prompt, "n_predict": new},
            timeout=600,
        )
        response.raise_for_status()
        assert response.json()["tokens_predicted"] == new

    with ThreadPoolExecutor(arguments.batch) as pool:

        def seconds(new: int) -> float:
            start = time.perf_counter()
            rows = range(arguments.batch)
            list(pool.map(one, rows, [new] * arguments.batch))
            return time.perf_counter() - start

        seconds(2)
        # The prompt gives the first token, so the difference is that of decoding.
        prefill = [seconds(1) for _ in range(arguments.repeats)]
        decode = []
        if arguments.new > 1:
            decode = [seconds(arguments.new) - min(prefill) for _ in prefill]
    result = {"prefill_s": prefill, "decode_s": decode}
    print(json.dumps({**result, "version": xllamacpp.__version__}), flush=True)
    # Its threads do not end by themselves.
    os._exit(0)


if __name__ == "__main__":
    main()
