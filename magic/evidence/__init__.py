"""Evidence: is the prediction true? Train again, and see.

together       many retrainings at once
retraining     the run without some examples
rows           what one row of a bank is, and the SQLite file that holds it
bank           outputs of retrained models, kept in a file
outputs        many retrainings, on all cores, none of them twice
comparison     predicted against true: the linear datamodeling score, leave-one-out, intervals
judging        several methods by several judges: these, the removal of the top, brittleness
verification   the whole derivative against a few trainings
optimality     how far the prediction is from the best linear one
curvature      how far the tangent reaches
forecast       the LDS to be expected, from replays at a few random sets
smoothness     how smooth a run is in its weights
estimates      what the baselines share
classes        losses that are cross-entropies: of a label, or of every next token
trak, ekfac    two baselines by the libraries of their authors
source, dvemb  two that go back through the training, with something simpler in place of its curvature
controls       chance, losses, gradients' norms, and how alike two examples are
baselines      all these, gradient similarity and TracIn, for comparison
explorer, explorer_widgets    who helped and harmed, in a notebook: pick, remove, train, compare
"""
