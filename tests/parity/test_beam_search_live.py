"""Beam search finds the texts and scores that transformers finds."""

import dataclasses

import numpy as np
import pytest

pytestmark = pytest.mark.parity

NAME = "llama2-7b"


@pytest.mark.parametrize(
    "penalty, stops", [(1.0, ()), (1.0, (59, 51)), (-2.0, (59, 51))]
)
def test_texts_and_scores_are_those_of_transformers(penalty, stops):
    import hf_case
    import torch
    from parity_case import CASES, nested, tokens, weights

    from jaxlm.infer.beam_search import beam_search

    config = dataclasses.replace(CASES[NAME], dtype="float32")
    model = hf_case.build(NAME, config)
    model.generation_config.eos_token_id = None
    # Prompts of other lengths, searched together.
    prompts = [tokens(config)[0, :n].tolist() for n in (5, 9, 40)]
    found = beam_search(
        *(config, nested(weights(config)), prompts),
        num_beams=4,
        max_new_tokens=12,
        length_penalty=penalty,
        stop_ids=stops,
    )
    ended = 0
    for prompt, beams in zip(prompts, found, strict=True):
        theirs = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt)),
            num_beams=4,
            num_return_sequences=4,
            max_new_tokens=12,
            do_sample=False,
            length_penalty=penalty,
            eos_token_id=list(stops) or None,
            pad_token_id=0,
            early_stopping=False,
            output_scores=True,
            return_dict_in_generate=True,
        )
        scores = [beam.score for beam in beams]
        # Sums of 12 log-probabilities in f32, times up to 12 ** 2.
        np.testing.assert_allclose(
            scores, theirs.sequences_scores, rtol=2e-6, atol=1e-4
        )
        for beam, row in zip(beams, theirs.sequences[:, len(prompt) :], strict=True):
            row = row.tolist()[: len(beam.tokens) + 1]
            assert beam.tokens.tolist() == row[: len(beam.tokens)]
            ended += len(beam.tokens) < 12
    assert (ended > 0) == bool(stops)
