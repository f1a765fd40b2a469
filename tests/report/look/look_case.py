"""A view of a small model that reads bytes."""

from model_case import make, small

from jaxlm.config import SampleConfig
from jaxlm.report.look.make_view import view_of
from jaxlm.tokenizers.bytes_and_characters import ByteTokenizer

TOKENIZER = ByteTokenizer()
CONFIG, PARAMS = make(
    small(vocab_size=257, layer_pattern=("global", "local"), window=4)
)
# The second text differs from the fourth token on.
TEXT, OTHER = "abcab</sc", "abcxb</sc"
SAMPLE = SampleConfig(temperature=0.7, top_k=40, top_p=0.8, min_p=0.02)


def view(**options):
    options = {
        "against": TOKENIZER.encode(OTHER),
        "num_prompt": 7,
        "title": "</script><b>",
        "call": "jaxlm look",
        **options,
    }
    text = options.pop("text", TEXT)
    return view_of(CONFIG, PARAMS, TOKENIZER, TOKENIZER.encode(text), **options)
