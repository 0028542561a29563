"""Colours of all pictures: those of Okabe and Ito, which people with any colour vision can tell apart.

Source: https://jfly.uni-koeln.de/color/.
"""

import os

PathLike = str | os.PathLike[str]

INK, GREY, FAINT = "#222222", "#767676", "#d9d9d9"
BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
