"""Texts of the hub as rows of tokens: WikiText, TinyStories, or any other, and those that lie in a folder.

Nothing here is needed by a chapter, and all of it needs `datasets`.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..show import needs

# Merity et al. 2016 (CC BY-SA), and Eldan & Li 2023 (CDLA-Sharing): what load_dataset is given.
NAMES = {
    "wikitext": ("Salesforce/wikitext", "wikitext-103-raw-v1"),
    "tinystories": ("roneneldan/TinyStories",),
}


def corpus(
    name: str, tokenizer, train: int, test: int, length: int = 512, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """(train, test): int64 tokens (n, length + 1) and (m, length + 1), for `magic.text.loss`.

    name       "wikitext" (103, raw), "tinystories", another name on the hub, or a folder that
               `datasets.Dataset.save_to_disk` wrote; its training part needs a column "text"
    tokenizer  that of the model, such as `magic.text.pretrained` returns
    length     how many tokens of a row are predicted

    The first documents that give enough tokens are cut into rows without a gap, an end of text between two of
    them; which rows are the test's depends on `seed`.

    Raises ImportError without datasets, OSError where there is no such text, with what to put where, and
    ValueError where it is too short.
    """
    from ..text import pack

    rows, tokens, count = [], 0, (train + test) * length + 1
    for document in _documents(name):
        if document.strip():
            rows.append(tokenizer(document, add_special_tokens=False).input_ids)
            tokens += len(rows[-1]) + 1
        if tokens > count:
            break
    if not (train > 0 and test > 0 and tokens > count):
        raise ValueError(
            f"train={train} and test={test} rows of {length} tokens: {name!r} has {tokens:,} tokens, and "
            f"{count:,} are needed"
        )
    packed = pack(rows, length, separator=tokenizer.eos_token_id)
    order = torch.randperm(train + test, generator=torch.Generator().manual_seed(seed))
    return packed[order[:train]], packed[order[train:]]


def _documents(name: str):
    """The texts of the training part, one after the other."""
    datasets = needs("datasets", "text", "book.corpora needs")
    try:
        if Path(name).is_dir():
            found = datasets.load_from_disk(name)
        else:
            found = datasets.load_dataset(*NAMES.get(name, (name,)), split="train")
    except (OSError, ValueError) as error:  # what datasets raises where it finds nothing
        why = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        raise OSError(
            f"{name!r} could not be loaded: {why}. Where there is no network, give the path of a folder: "
            "load_dataset(…, split='train').save_to_disk(folder) writes one on a machine that has it, and a "
            "hub's cache can be copied to the folder that HF_HOME names"
        ) from error
    if "text" not in found.column_names:
        raise ValueError(f"{name!r} has no column 'text', but {', '.join(found.column_names)}")
    return (row["text"] for row in found)
