"""Everything that only a GPU can tell, in one call of some minutes: `python -m tests.gpu`.

__main__  starts the parts, each in a process of its own with its own time, and writes down what they find
stages    the parts: determinism, chapters, the tests marked `cuda`, and what the others share
works     the parts that take times and memory: the benchmark's networks, ResNet-9, GPT-2
plugin    what pytest needs to do a share of the tests and to tell of each at once
"""
