"""Kernels: derivatives of a derivative that PyTorch lacks, has slowly, or cuts off.

A training step is itself a derivative, so its adjoint is a second one. Read `replace` first: it is the table
of what takes the place of what. Then `gelu`, the shortest of the closed forms.

replace                 which operation takes the place of which, and the mode that sees to it
gelu                    GELU
convolution             convolutions in one, two and three dimensions
pooling                 average pooling
attention               scaled dot-product attention
normalisation_formulas  the first and second derivative of all normalisations, as arithmetic
normalisation           how these enter autograd's graph
layer_norm              layer and group normalisation
batch_norm              batch normalisation, and its running statistics
rewritten               operations that are written out in others, and operations that are refused
higher_order            what derivatives of a third or higher order need
checkpointing           activation checkpoints of the user's, which call a model again in the backward pass
stop_gradients          `detach`, `.data` and `no_grad`, exactly
escapes                 ways in which a number may escape from the graph of a step
valued                  one computation's number with the derivative of another
graph                   walks through autograd's graphs
precision               float64 all the way, for checks
"""
