"""Text: causal language models, and what their training needs beside a Run.

A language model of transformers, with or without adapters of peft, is a model like any other; nothing here
knows of the replay. `import magic` does without both libraries.

losses    one loss for each sequence, or for each of its tokens
packing   texts as bytes, and tokens as rows of one length
loading   pretrained models, from a hub or without a network

With a small model from its configuration:

    tokens = text.pack(text.byte_tokenizer()(page).input_ids, 64)          # (n, 65)
    run = magic.Run(model, optimizer, tokens, text.loss(), batches)
    scores = magic.attribute(run, lambda model: text.loss()(model, tokens[:2]))

With sequences of several lengths, a padding collator makes a batch out of a list of items:

    data = [tokenizer(page) for page in pages]
    collate = transformers.DataCollatorWithPadding(tokenizer)
    run = magic.Run(model, optimizer, data, text.loss(), batches, collate=collate)
"""

from .loading import pretrained
from .losses import loss
from .packing import byte_tokenizer, pack

__all__ = ["byte_tokenizer", "loss", "pack", "pretrained"]
