"""Loads the HTTP server with many clients, and compares its latency with llama.cpp's.

python benchmarks/serve.py load [--requests 10000] [--clients 200]
python benchmarks/serve.py latency --model model.gguf [--requests 32] [--clients 4]

`load`: a tiny model behind the server, in a process of its own. Clients send
completions and chats, whole and streamed, with stop strings, schemas and penalties;
some hang up, some send hostile bodies. Each answer is compared with what the same
request gave alone, and the server's memory is read after each tenth.

`latency`: times of the first token and of those that follow, of the same requests to
`jaxlm serve` and to llama.cpp's server (package xllamacpp), in turns, one at a time.
llama.cpp computes with the file's quantized weights, jaxlm with float32. It has not run
to its end yet: there are no figures.

Results go to benchmarks/results/serve.json.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from train_step import machine

RESULTS = Path(__file__).parent / "results" / "serve.json"
BODY_BYTES = 20_000
PORT = 8765
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
JSON = {"Content-Type": "application/json"}


def serve_tiny() -> None:
    """Serves a model of one layer, and prints the address."""
    import jax
    import uvicorn

    import jaxlm
    from jaxlm.infer.engine import Engine
    from jaxlm.serve.app import Limits, Server
    from jaxlm.serve.worker import Worker
    from jaxlm.tokenizers.bytes_and_characters import ByteTokenizer

    tokenizer = ByteTokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    )
    config = jaxlm.ModelConfig(
        vocab_size=257,
        num_layers=1,
        model_dim=32,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        hidden_dim=64,
        context_length=256,
        dtype="float32",
    )
    params = jaxlm.init(config, jax.random.key(0))
    worker = Worker(
        lambda: Engine(
            *(config, params),
            num_slots=32,
            token_bytes=tokenizer.token_bytes,
            top_logprobs=20,
        ),
        1000,
    )
    limits = Limits(body_bytes=BODY_BYTES, seconds=300.0)
    app = Server(
        *("tiny", config, tokenizer, worker),
        max_length=256,
        num_slots=32,
        limits=limits,
    ).app

    class Announced(uvicorn.Server):
        async def startup(self, sockets=None):
            await super().startup(sockets)
            port = self.servers[0].sockets[0].getsockname()[1]
            print(f"http://127.0.0.1:{port}", flush=True)

    Announced(uvicorn.Config(app, port=0, log_level="error")).run()


def serve_llama(model: str, slots: int) -> None:
    """Serves a GGUF file with llama.cpp."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = model
    params.n_parallel, params.n_ctx, params.warmup = slots, 512 * slots, True
    params.cpuparams.n_threads = len(os.sched_getaffinity(0))
    params.hostnames, params.port = ["127.0.0.1"], PORT
    server = xllamacpp.Server(params)
    assert str(PORT) in server.listening_address
    time.sleep(10_000)


def calls() -> list[tuple[str, dict[str, Any]]]:
    """Returns requests of all kinds: a path and a body."""
    found: list[tuple[str, dict[str, Any]]] = []
    for i in range(30):
        rules: dict[str, Any] = {
            "seed": i,
            "temperature": i % 3 / 2,
            "max_tokens": 9 + i % 8,
        }
        rules |= [{}, {"stop": ["e", "ab"]}, {"frequency_penalty": 0.5}, {"n": 2}][
            i % 4
        ]
        text = "x" * (1 + 5 * i)
        if i % 5 == 1:
            rules["response_format"] = {
                "type": "json_schema",
                "json_schema": {"name": "a", "schema": SCHEMA},
            }
        if i % 6 == 2:
            message = {"role": "user", "content": text}
            found.append(("/v1/chat/completions", {"messages": [message], **rules}))
        else:
            found.append(("/v1/completions", {"prompt": text, **rules}))
    return found


HOSTILE = [
    (b"[" * 10_000, 400),
    (b"{" * 10, 400),
    (b"\xff\xfe", 400),
    (b" " * (BODY_BYTES + 1), 413),
    (b'{"prompt": "a", "stop": ["\\ud800"]}', 400),
    (json.dumps({"prompt": "a", "stop": ["x" * 200] * 17}).encode(), 400),
    (json.dumps({"prompt": [[10**30]]}).encode(), 400),
    (b'{"prompt": "a", "temperature": NaN}', 400),
    (b'{"prompt": "a", "max_tokens": 100000}', 400),
    (b'{"prompt": "a", "unknown": 1}', 400),
]


def texts_of(answer: dict[str, Any]) -> list[str]:
    """Returns the text of each choice."""
    choices = answer["choices"]
    return [c["message"]["content"] if "message" in c else c["text"] for c in choices]


async def streamed(client: httpx.AsyncClient, path: str, body: dict) -> list[str]:
    """Returns the text of each choice of a stream, put together."""
    texts = [""] * body.get("n", 1)
    async with client.stream("POST", path, json={**body, "stream": True}) as response:
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                for choice in json.loads(line[6:])["choices"]:
                    delta = choice.get("delta", choice)
                    texts[choice["index"]] += delta.get(
                        "content", delta.get("text", "")
                    )
    return texts


async def load(url: str, pid: int, num_requests: int, num_clients: int) -> dict:
    """Sends the requests; any answer that is not the expected one is counted."""
    kinds = calls()
    # The server closes idle connections after 5 s; the client must not use them then.
    limits = httpx.Limits(max_connections=num_clients, keepalive_expiry=2)
    wrong: list[str] = []
    counts = dict.fromkeys(("whole", "stream", "hang-up", "hostile"), 0)
    memory: list[float] = []
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        alone = []
        for path, body in kinds:
            response = await client.post(path, json=body)
            assert response.status_code == 200, response.text
            alone.append(texts_of(response.json()))

        async def one(i: int) -> None:
            path, body = kinds[i % len(kinds)]
            kind = ("whole", "stream", "hang-up", "hostile", "whole")[i // 30 % 5]
            counts[kind] += 1
            if kind == "hostile":
                data, status = HOSTILE[i % len(HOSTILE)]
                response = await client.post(
                    "/v1/completions", content=data, headers=JSON
                )
                if response.status_code != status:
                    wrong.append(f"{i}: {response.status_code} for {data[:60]!r}")
                return
            if kind == "hang-up":
                body = {**body, "max_tokens": 90, "stream": True}
                async with client.stream("POST", path, json=body) as response:
                    async for _ in response.aiter_lines():
                        break
                return
            if kind == "stream":
                texts = await streamed(client, path, body)
            else:
                texts = texts_of((await client.post(path, json=body)).json())
            if texts != alone[i % len(kinds)]:
                wrong.append(f"{i}: {texts} instead of {alone[i % len(kinds)]}")

        numbers = iter(range(num_requests))

        async def one_client() -> None:
            for i in numbers:
                try:
                    await one(i)
                except (httpx.HTTPError, KeyError) as error:
                    wrong.append(f"{i}: {error!r}")
                if i % (num_requests // 10) == num_requests // 10 - 1:
                    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
                    memory.append(pages * os.sysconf("SC_PAGE_SIZE") / 2**20)
                    print(i + 1, f"{memory[-1]:.0f} MiB", file=sys.stderr, flush=True)

        began = time.monotonic()
        await asyncio.gather(*(one_client() for _ in range(num_clients)))
        seconds = time.monotonic() - began
        metrics = (await client.get("/metrics")).text
    left = [x for x in metrics.splitlines() if x.startswith("jaxlm_requests_open ")]
    return {
        "requests": num_requests,
        "clients": num_clients,
        "seconds": seconds,
        "by_kind": counts,
        "wrong": wrong[:20],
        "num_wrong": len(wrong),
        "open_after": left,
        "resident_mib": memory,
    }


async def latency(url: str, num_requests: int, num_clients: int) -> dict:
    """Streams completions of 48 tokens, and returns quantiles in milliseconds."""
    first, gaps, rates = [], [], []
    # No connection is kept that a server may just be closing.
    limits = httpx.Limits(max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:

        async def one(i: int) -> None:
            prompt = f"Question {i}: tell a long story about the sea. " * (1 + i % 3)
            body = {"prompt": prompt, "max_tokens": 48, "temperature": 0}
            body |= {"stream": True}
            began, times = time.perf_counter(), []
            path = "/v1/completions"
            async with client.stream("POST", path, json=body) as response:
                async for line in response.aiter_lines():
                    if line.startswith("data: {"):
                        times.append(time.perf_counter())
            first.append(times[0] - began)
            gaps.extend(b - a for a, b in pairwise(times))
            rates.append((times[-1] - began) / 48)

        for i in range(3):
            await one(i)
        first.clear(), gaps.clear(), rates.clear()
        numbers = iter(range(num_requests))

        async def one_client() -> None:
            for i in numbers:
                await one(i)

        began = time.perf_counter()
        await asyncio.gather(*(one_client() for _ in range(num_clients)))
        seconds = time.perf_counter() - began
    named = {"first_token": first, "between_events": gaps, "per_token": rates}
    found = {
        f"{name}_ms_p{q}": float(np.percentile(values, q) * 1e3)
        for name, values in named.items()
        for q in (50, 99)
    }
    return {**found, "tokens_per_s": 48 * num_requests / seconds}


def started(*command: str, url: str | None = None) -> tuple[subprocess.Popen, str]:
    """Starts a server, and returns it with its address, which it prints or is given."""
    pipe = subprocess.PIPE if url is None else None
    process = subprocess.Popen([sys.executable, *command], stdout=pipe, text=True)
    if url is None:
        assert process.stdout is not None
        url = next(line.strip() for line in process.stdout if line.startswith("http"))
    while True:
        try:
            if httpx.get(f"{url}/health").status_code == 200:
                return process, url
        except httpx.HTTPError:
            if process.poll() is not None:
                raise SystemExit(f"{command} has ended") from None
        time.sleep(0.2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["load", "latency", "tiny", "llama"])
    parser.add_argument("--model", help="a GGUF file")
    parser.add_argument("--requests", type=int)
    parser.add_argument("--clients", type=int)
    arguments = parser.parse_args()
    if arguments.what == "tiny":
        serve_tiny()
        return
    if arguments.what == "llama":
        serve_llama(arguments.model, arguments.clients)
        return
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results["machine"] = machine()
    if arguments.what == "load":
        process, url = started(__file__, "tiny")
        try:
            sizes = arguments.requests or 10_000, arguments.clients or 200
            results["load"] = asyncio.run(load(url, process.pid, *sizes))
        finally:
            process.terminate()
    else:
        if arguments.model is None:
            parser.error("--model is needed: a GGUF file")
        clients = arguments.clients or 4
        ours = ["-m", "jaxlm.cli", "serve", arguments.model, "--slots", str(clients)]
        ours += ["--max-length", "512", "--port", str(PORT)]
        peer = [__file__, "llama", "--model", arguments.model]
        peer += ["--clients", str(clients)]
        results["latency"] = {"clients": clients, "load_average": os.getloadavg()[0]}
        for name, command in (("llama.cpp", peer), ("jaxlm", ours)):
            process, url = started(*command, url=f"http://127.0.0.1:{PORT}")
            try:
                sizes = arguments.requests or 32, clients
                results["latency"][name] = asyncio.run(latency(url, *sizes))
            finally:
                process.kill()
                process.wait()
    print(json.dumps(results, indent=2))
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
