"""Training: a run as a pure function of its data weights.

Read `state`, `optim`, `run`, in this order; the others hold one duty each.

determinism    what must be fixed, and whose turn it is
state          all that training carries, as a value; the cotangent, which is a type of its own
optim          SGD, Adam and AdamW as pure functions, read from the user's object
optim_adjoint  their derivatives
arguments      what a Run refuses, and how it says so
items          the identity of a Dataset's items
memory         what a model or a loss remembers outside its arguments
order          which examples form which batch
record         what a training passed through, to compare a replay with
finite         not a number, and where it first appeared
first_step     what a Run tries before it believes
run            Run, and the step
"""
