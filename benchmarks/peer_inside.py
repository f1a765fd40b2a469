"""Times TransformerLens in its own Python. Called by inside.py.

Its bridge wraps the model of transformers in `folder`. No weight is folded or centered,
so that its numbers are those of the published model, as ours are.
"""

import argparse
import json

from timed_tasks import REPEATS, Task, measured


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--texts", type=json.loads, required=True)
    parser.add_argument("--long-text", type=json.loads, required=True)
    parser.add_argument("--metric", type=json.loads, required=True)
    parser.add_argument("--cells", type=json.loads, required=True)
    parser.add_argument("--threads", type=int, required=True)
    arguments = parser.parse_args()
    from importlib.metadata import version

    import pandas
    import tokenizers
    import torch
    import transformers
    from transformer_lens import patching
    from transformer_lens.model_bridge import TransformerBridge

    torch.set_num_threads(arguments.threads)
    torch.set_grad_enabled(False)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        arguments.folder, dtype=torch.float32, attn_implementation="eager"
    )
    # The bridge reads a tokenizer from the folder; the texts are ids already.
    words = tokenizers.models.WordLevel({"<s>": 0}, unk_token="<s>")
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(words),
        **dict.fromkeys(("bos_token", "eos_token", "pad_token"), "<s>"),
    ).save_pretrained(arguments.folder)
    model = TransformerBridge.boot_transformers(
        arguments.folder, hf_model=loaded, device="cpu", dtype=torch.float32
    )
    clean, corrupt = (torch.tensor(text) for text in arguments.texts)
    cells = pandas.DataFrame(arguments.cells, columns=["layer", "pos"])
    long, (token, against) = torch.tensor(arguments.long_text), arguments.metric

    def metric(logits):
        return logits[0, -1, token] - logits[0, -1, against]

    def one_site():
        return model.run_with_cache(
            long, names_filter=lambda name: name.endswith("hook_resid_post")
        )[1]

    def head_attribution():
        cache = model.run_with_cache(long)[1]
        # `logit_attrs` divides by the norm's divisor.
        heads = cache.stack_head_results(layer=-1, pos_slice=-1, apply_ln=False)
        return cache.logit_attrs(heads, token, against, pos_slice=-1)

    def sweep():
        _, cache = model.run_with_cache(clean)
        # What get_act_patch_resid_pre is, for these cells.
        return patching.generic_activation_patch(
            *(model, corrupt, cache, metric),
            patch_setter=patching.layer_pos_patch_setter,
            activation_name="resid_pre",
            index_df=cells,
        )

    tasks = {
        "forward": Task(lambda: model(long)),
        "cache_all_sites": Task(lambda: model.run_with_cache(long)[1]),
        "cache_resid_post": Task(one_site),
        "head_attribution": Task(head_attribution),
        "sweep": Task(sweep, repeats=1, warm=False),
    }
    figures, results = measured(tasks)
    print(
        json.dumps(
            {
                "versions": {
                    name: version(name)
                    for name in ("transformer-lens", "transformers", "torch")
                },
                "tasks": figures,
                "heads": results["head_attribution"].flatten().tolist(),
                "cells": results["sweep"].tolist(),
                "repeats": REPEATS,
            }
        )
    )


if __name__ == "__main__":
    main()
