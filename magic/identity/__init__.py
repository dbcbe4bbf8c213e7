"""Identity: is this the same run as before, to the bit and to the last line of its code?

fingerprints   the bits of tensors and texts as short strings
bytecode       what a function's code says, and what it refers to
content        the content of any Python value, as one digest
parts          a loss, a measure or a model, part by part, with a name for each; what has changed, in words
"""
