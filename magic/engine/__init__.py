"""The engine, REPLAY: the derivative of a whole run, from few states.

Read `adjoint`, `schedule`, `replay`, in this order: chapters 04 and 05 of the book, in the package's words.

adjoint        one step, pulled back
witness        the step's derivative against finite differences
actions        the six commands of a schedule
walk           a walk through a schedule: is it legal, and what does it take?
schedule       in which order a run is done again, as data
costs          what a schedule costs, without walking it
timeline       its picture
files, store   where states are kept: memory, host, disk
footprint      how much memory a function takes
trial          one step, measured
work           what a replay has to do, one way of doing it, and what that takes
search         the fastest way within a budget
planning       a schedule for a number of bytes
health         what a replay has checked and seen
resume         a folder in which a run survives being killed
replay         the loop: the derivative of a measure with respect to all data weights
"""
