"""Text: causal language models, and what their training needs beside a Run.

A language model of transformers, with or without adapters of peft, is a model like any other; nothing here
knows of the replay. `import magic` does without both libraries.

losses    one loss for each sequence, or for each of its tokens
packing   texts as bytes, and tokens as rows of one length
loading   pretrained models, from a hub or without a network
"""

from .loading import pretrained
from .losses import loss
from .packing import byte_tokenizer, pack

__all__ = ["byte_tokenizer", "loss", "pack", "pretrained"]
