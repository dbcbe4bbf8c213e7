"""Training: a run as a pure function of its data weights.

Read `state`, `update` with `sgd`, `gradient` and `run`, in this order; the others hold one duty each.

determinism    what must be fixed, and whose turn it is
state          all that training carries, as a value; the cotangent, which is a type of its own
update         what an optimizer's rule and its adjoint are
sgd, adam, rmsprop      torch.optim's SGD, Adam, AdamW and RMSprop: each rule and its adjoint
optim          the user's optimizer, read: its rule, and the parameters that it trains
hypers         the hyper-parameters of each step, read from optimizer and scheduler
network        the model as a function of the tensors in it
gradient       what a step minimises, and its gradient
arguments      what a Run refuses, and how it says so
items          the identity of a Dataset's items
memory         what a model or a loss remembers outside its arguments
order          which examples form which batch
record         what a training passed through, to compare a replay with
finite         not a number, and where it first appeared
first_step     what a Run tries before it believes
run            Run, and the step
"""
