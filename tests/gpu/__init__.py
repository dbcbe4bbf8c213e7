"""Everything that only a GPU can tell, in one call of some minutes: `python -m tests.gpu`.

__main__     starts the parts, each in a process of its own with its own time, and writes down what they find
stages       the parts determinism and the tests marked `cuda`, and what the others share
chapters     the parts that read the book: each chapter against its stored outputs
works        the parts that take times and memory: the benchmark's networks, ResNet-9, GPT-2
experiments  the parts that are experiments of tests/experiments, and take several calls
plugin       what pytest needs to do a share of the tests and to tell of each at once
kept         a small table of what was told, with what it was measured on
"""
