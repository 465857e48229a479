"""The losses: `LOSSES`, name -> row; each a pure function of sequence logps.

pairs.py       what a loss function sees
margin.py      losses of the margin between the two sides
sides.py       losses of each side on its own
divergences.py f-divergences in place of the reverse KL
table.py       LOSSES
keywords.py    the keywords, checked
recipe.py      the keywords put together: combinations, weights, parameterisations, several betas
"""

from .keywords import LossKeywords
from .margin import sigmoid
from .pairs import LossOptions, Pairs
from .table import LOSSES, Loss

__all__ = ["LOSSES", "Loss", "LossKeywords", "LossOptions", "Pairs", "sigmoid"]
