"""The engine, REPLAY: the derivative of a whole run, from few states.

Read `tracing`, `adjoint`, `schedule`, `replay`, in this order: chapters 04 and 06 of the book, in the
package's words.

refusals           what has no derivative is refused
vjp                many targets pulled back through one graph
asked              what a replay may be asked for beside the scores
tracing            the graph of one step's gradient
adjoint            one step, pulled back
finite_difference  a slope by finite differences, and the doubt in it
witness            the step's derivative against finite differences
measure_witness    the measure's derivative against finite differences
rounding           how far two ways to one derivative may differ, and what is nothing but noise
actions            the six commands of a schedule
walk               a walk through a schedule: is it legal, and what does it take?
schedule           in which order a run is done again, as data
costs              what a schedule costs, without walking it
timeline           its picture
files              files that are whole or not there at all
store, places      where states are kept: memory, host, disk
footprint          how much memory a function takes
measuring          what is measured, and what differentiating it takes
trial              one step, measured
work               what a replay has to do, one way of doing it, and what that takes
search             the fastest way within a budget
planning           a schedule for a number of bytes
health             what a replay has checked and seen
verdict            what a few trainings say of a whole derivative
folder             whose a folder is
resume             a run that survives being killed
listeners          who hears of every step and pull: the bar, the scores, the witness, the notes
finders            who finds what was asked for beside the scores
replay             the loop: the derivative of a measure with respect to all data weights
"""
