"""A small SentencePiece model, trained by the library itself."""

import io

import sentencepiece


def trained(**options):
    model = io.BytesIO()
    options = {"vocab_size": 285, "hard_vocab_limit": False, **options}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["hello world hello there the then"] * 50),
        model_writer=model,
        minloglevel=2,
        **options,
    )
    return model.getvalue()
