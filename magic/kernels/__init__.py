"""Kernels: derivatives of a derivative that PyTorch lacks, has slowly, or cuts off.

A training step is itself a derivative, so its adjoint is a second one. Read `replace` first.

graph          walks through autograd's graphs
orders         what a derivative of a third or higher order needs
normalisation  batch, layer and group normalisation with closed second derivatives
rewritten      operations that are written out where they are traced, and those refused
checkpointing  activation checkpoints, which call a model again in the backward pass
replace        which operation takes the place of which, and when
escapes        ways on which a number may leave the graph
stop_gradients `detach`, `.data` and `no_grad`, exactly
precision      float64 all the way, for checks
"""
