"""weightdyn: why the weights of a network grow, overshoot and relax, in numbers.

It logs AdamW's moments while a model trains, splits every change of a tensor's squared norm into three forces,
alignment, injection and decay, fits a Weibull law to the weight magnitudes of every layer, recovers the forces of
published models from their checkpoints, and measures what an output-preserving rescaling shifts.
"""

from weightdyn import plot as plot
from weightdyn import wisca as wisca
from weightdyn.checkpoints import CheckpointError as CheckpointError
from weightdyn.checkpoints import Checkpoints as Checkpoints
from weightdyn.diagnose import diagnose as diagnose
from weightdyn.fits import drift as drift
from weightdyn.fits import fit_weights as fit_weights
from weightdyn.forces import FORCES as FORCES
from weightdyn.forces import aggregate as aggregate
from weightdyn.forces import angle as angle
from weightdyn.forces import before_step as before_step
from weightdyn.forces import budget as budget
from weightdyn.forces import forces_from_products as forces_from_products
from weightdyn.forces import relative_update as relative_update
from weightdyn.forces import timescale as timescale
from weightdyn.logger import ForceLogger as ForceLogger
from weightdyn.magnitudes import MagnitudeHistogram as MagnitudeHistogram
from weightdyn.published import read_published_forces as read_published_forces
from weightdyn.published import read_published_recovery as read_published_recovery
from weightdyn.published import read_published_trajectory as read_published_trajectory
from weightdyn.recipe import Recipe as Recipe
from weightdyn.recovery import compare_recovery as compare_recovery
from weightdyn.recovery import recover_forces as recover_forces
from weightdyn.runlog import RunLog as RunLog
from weightdyn.runlog import RunLogError as RunLogError
from weightdyn.trajectory import closure as closure
from weightdyn.trajectory import equilibrium as equilibrium
from weightdyn.trajectory import integrate as integrate
from weightdyn.trajectory import phases as phases
from weightdyn.trajectory import pool_weibull as pool_weibull
from weightdyn.weibull import WeibullFit as WeibullFit
from weightdyn.weibull import classify as classify
from weightdyn.weibull import fit_weibull as fit_weibull
from weightdyn.weibull import rank_laws as rank_laws
from weightdyn.weibull import tails as tails

__version__ = "0.1.0"
