"""Training: a run as a pure function of its data weights.

Read `state`, `update` with `sgd`, `gradient` and `run`, in this order; each of the others has one duty.

determinism       what must be fixed for a run to be a function, and which thread may train
state             all that training carries, as a value; the cotangent, which is a type of its own
update            what an optimizer's rule and its adjoint are
differentiated    the adjoint of a rule by autograd, and what a rule needs for that
by_hypers         the derivative of SGD and Adam by their hyper-parameters
sgd, adam, rmsprop    optimizers: each rule as a pure function, its adjoint below it
adagrad, nadam, radam, adafactor, muon    optimizers whose rule is all there is; autograd finds the adjoint
optim             the table of optimizers; the user's, read: their rules, and the parameters that they train
hypers            the hyper-parameters of each step, read from optimizers and schedulers
network           the model as a function of the tensors in it
clipping          gradients that are clipped before the optimizer sees them, and the adjoint of that
gradient          what a step minimises, and its gradient
arguments         what a Run refuses of models, losses and measures
examples          the data, batches, weights and indices that a user gives, and what is refused of them
dataset_identity  a digest of a Dataset's items
run_identity      what a run is: everything that its bits depend on
hidden_state      what a model or a loss may remember outside its arguments
order             `magic.batches`: which examples form which batch
record            what a training notes of itself, to compare a replay with
finite            numbers that are not finite, and where they first appeared
first_step        the first step, tried three times when a Run is made
run               Run, and the step
ranks             one run on several processes, each with its share of every batch
variants          other runs made from one: with other data or rates, another start, or only its last steps
"""
