"""Every figure: functions that take a run or a table, draw on Axes and return them.

pyplot is imported when a figure is drawn: a program that only logs never pays for it.
"""

from weightdyn.plot.clock import decay_clock as decay_clock
from weightdyn.plot.recovered import METHOD_COLORS as METHOD_COLORS
from weightdyn.plot.recovered import recovery as recovery
from weightdyn.plot.runs import force_budget as force_budget
from weightdyn.plot.runs import loss as loss
from weightdyn.plot.runs import overview as overview
from weightdyn.plot.runs import weibull_trajectory as weibull_trajectory
from weightdyn.plot.shifts import wisca_shift as wisca_shift
from weightdyn.plot.style import FORCE_COLORS as FORCE_COLORS
from weightdyn.plot.style import ROLE_COLORS as ROLE_COLORS
from weightdyn.plot.style import SMOOTHING as SMOOTHING
from weightdyn.plot.weights import LAW_COLORS as LAW_COLORS
from weightdyn.plot.weights import weibull as weibull
from weightdyn.plot.weights import weights_map as weights_map
