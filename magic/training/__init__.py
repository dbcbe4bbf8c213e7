"""Training: a run as a pure function of its data weights.

Read `state`, `optim`, `run`, in this order; each of the others has one duty.

determinism       what must be fixed for a run to be a function, and which thread may train
state             all that training carries, as a value; the cotangent, which is a type of its own
optim             SGD, Adam and AdamW as pure functions, read from the user's object
optim_adjoint     their derivatives
arguments         what a Run refuses of models, losses and measures
examples          the data, the batches and the indices that a user gives, and what is refused of them
dataset_identity  a digest of a Dataset's items
hidden_state      what a model or a loss may remember outside its arguments
order             `magic.batches`: which examples form which batch
record            what a training passed through, to compare a replay with
finite            numbers that are not finite, and where they first appeared
first_step        the first step, tried three times when a Run is made
run               Run, and the step
"""
