"""Loads the HTTP server with many clients, and compares its latency with llama.cpp's.

python benchmarks/serve.py load [--requests 10000] [--clients 200]
python benchmarks/serve.py latency --model model.gguf [--requests 32] [--clients 4]

`load`: a tiny model behind the server, in a process of its own. Clients send
completions and chats, whole and streamed, with stop strings, schemas and penalties;
some hang up, some send hostile bodies. Each answer is compared with what the same
request gave alone, and the server's memory is read after each tenth.

`latency`: times of the first token and of those that follow, of the same requests to
`jaxlm serve` and to llama.cpp's server (package xllamacpp), in turns of a few requests
each, and the CPU seconds that each server took. Both run all the time; the one whose
turn it is not is idle. llama.cpp computes with the file's quantized weights, jaxlm in
the dtype that `auto` is here. `per_token` is the time of a whole answer, that until its
first token included, for each of its 48 tokens.

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
    from jaxlm.infer.slots.engine import Engine
    from jaxlm.serve.app import Limits, Server
    from jaxlm.serve.connections import connection_options
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
            steps=1,
            prompt_tokens=64,
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

    config = uvicorn.Config(app, port=0, log_level="error", **connection_options())
    Announced(config).run()


def serve_llama(model: str, slots: int) -> None:
    """Serves a GGUF file with llama.cpp."""
    from peer_llama import llama_server

    _server = llama_server(model, slots, 512, PORT + 1)
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
        if i % 6 == 4:
            found.append(("/v1/responses", as_response({"input": text, **rules})))
        elif i % 6 == 2:
            message = {"role": "user", "content": text}
            found.append(("/v1/chat/completions", {"messages": [message], **rules}))
        else:
            found.append(("/v1/completions", {"prompt": text, **rules}))
    return found


def as_response(body: dict[str, Any]) -> dict[str, Any]:
    """Returns a body in the form of `/v1/responses`."""
    body["max_output_tokens"] = body.pop("max_tokens")
    if "response_format" in body:
        schema = body.pop("response_format")["json_schema"]
        body["text"] = {"format": {"type": "json_schema", **schema}}
    return body


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
    if "output" in answer:
        return [answer["output"][0]["content"][0]["text"]]
    choices = answer["choices"]
    return [c["message"]["content"] if "message" in c else c["text"] for c in choices]


async def streamed(client: httpx.AsyncClient, path: str, body: dict) -> list[str]:
    """Returns the text of each choice of a stream, put together."""
    texts = [""] * body.get("n", 1)
    async with client.stream("POST", path, json={**body, "stream": True}) as response:
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                event = json.loads(line[6:])
                if event.get("type") == "response.output_text.delta":
                    texts[0] += event["delta"]
                for choice in event.get("choices", []):
                    delta = choice.get("delta", choice)
                    texts[choice["index"]] += delta.get(
                        "content", delta.get("text", "")
                    )
    return texts


async def load(url: str, pid: int, num_requests: int, num_clients: int) -> dict:
    """Sends the requests; any answer that is not the expected one is counted."""
    kinds = calls()
    limits = httpx.Limits(max_connections=num_clients)
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
                name = next(n for n in body if n.startswith("max_"))
                body = {**body, name: 90, "stream": True}
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
        "server_cpu_s": cpu_seconds(pid),
        "load_average": os.getloadavg()[0],
        "by_kind": counts,
        "wrong": wrong[:20],
        "num_wrong": len(wrong),
        "open_after": left,
        "resident_mib": memory,
    }


def cpu_seconds(pid: int) -> float:
    """Returns what a process and its threads have taken so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


class Latency:
    """Times of the requests to one server."""

    def __init__(self, name: str, url: str, pid: int):
        self.name, self.url, self.pid = name, url, pid
        self.first, self.gaps, self.per_token = [], [], []
        self.seconds = self.cpu_s = 0.0

    async def turn(self, numbers: range, num_clients: int) -> None:
        """Streams completions of 48 tokens, and keeps their times."""
        # No connection is kept that a server may just be closing.
        limits = httpx.Limits(max_keepalive_connections=0)
        left, before = iter(numbers), cpu_seconds(self.pid)
        async with httpx.AsyncClient(
            base_url=self.url, timeout=600, limits=limits
        ) as client:

            async def one_client() -> None:
                for i in left:
                    await self._one(client, i)

            began = time.perf_counter()
            await asyncio.gather(*(one_client() for _ in range(num_clients)))
        self.seconds += time.perf_counter() - began
        self.cpu_s += cpu_seconds(self.pid) - before

    async def _one(self, client: httpx.AsyncClient, i: int) -> None:
        prompt = f"Question {i}: tell a long story about the sea. " * (1 + i % 3)
        body = {"prompt": prompt, "max_tokens": 48, "temperature": 0, "stream": True}
        began, times = time.perf_counter(), []
        async with client.stream("POST", "/v1/completions", json=body) as response:
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    times.append(time.perf_counter())
        self.first.append(times[0] - began)
        self.gaps.extend(b - a for a, b in pairwise(times))
        self.per_token.append((times[-1] - began) / 48)

    def found(self) -> dict[str, float]:
        """Returns quantiles in milliseconds, and rates."""
        named = {"first_token": self.first, "between_events": self.gaps}
        named["per_token"] = self.per_token
        num_tokens = 48 * len(self.first)
        return {
            f"{name}_ms_p{q}": float(np.percentile(values, q) * 1e3)
            for name, values in named.items()
            for q in (50, 99)
        } | {
            "tokens_per_s": num_tokens / self.seconds,
            "cpu_ms_per_token": self.cpu_s / num_tokens * 1e3,
        }


async def latencies(
    servers: list[Latency], num_requests: int, num_clients: int
) -> dict[str, Any]:
    """Measures servers in turns, each of two requests of each client."""
    loads, turn = [os.getloadavg()[0]], 2 * num_clients
    for server in servers:
        # Compiles what there is to compile, by prompts that are not measured:
        # llama.cpp keeps those that it has read.
        unmeasured = Latency(server.name, server.url, server.pid)
        await unmeasured.turn(range(1000, 1003), 1)
        await unmeasured.turn(range(1003, 1003 + turn), num_clients)
    for first in range(0, num_requests, turn):
        for server in servers:
            await server.turn(range(first, first + turn), num_clients)
            loads.append(os.getloadavg()[0])
    cores, note = len(os.sched_getaffinity(0)), "the machine had nothing else to do"
    if max(loads) > 2 * cores:
        # llama.cpp's threads spin while they wait for each other.
        note = "the machine was shared: wall times, and llama.cpp's CPU, say little"
    return {
        "clients": num_clients,
        "requests": len(servers[0].first),
        "note": note,
        "load_average_min": min(loads),
        "load_average_max": max(loads),
        **{server.name: server.found() for server in servers},
    }


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
    what = f"{arguments.what}, {machine()['processor']}"
    if arguments.what == "load":
        process, url = started(__file__, "tiny")
        try:
            sizes = arguments.requests or 10_000, arguments.clients or 200
            results[what] = asyncio.run(load(url, process.pid, *sizes))
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
        servers, processes = [], []
        try:
            for i, command in enumerate((ours, peer)):
                process, url = started(*command, url=f"http://127.0.0.1:{PORT + i}")
                processes.append(process)
                servers.append(Latency(("jaxlm", "llama.cpp")[i], url, process.pid))
            sizes = arguments.requests or 64, clients
            results[what] = asyncio.run(latencies(servers, *sizes))
        finally:
            for process in processes:
                process.kill()
                process.wait()
    results[what]["machine"] = machine()
    print(json.dumps(results, indent=2))
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
