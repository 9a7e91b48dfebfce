"""weightdyn: why the weights of a network grow, overshoot and relax, in numbers.

It logs AdamW's moments while a model trains, splits every change of a tensor's squared norm into three forces,
alignment, injection and decay, fits a Weibull law to the weight magnitudes of every layer, recovers the forces of
published models from their checkpoints, and measures what an output-preserving rescaling shifts.
"""

from weightdyn import plot as plot
from weightdyn import wisca as wisca
from weightdyn.checkpoints.published import read_published_forces as read_published_forces
from weightdyn.checkpoints.published import read_published_recovery as read_published_recovery
from weightdyn.checkpoints.published import read_published_trajectory as read_published_trajectory
from weightdyn.checkpoints.recipe import Recipe as Recipe
from weightdyn.checkpoints.recovery import compare_recovery as compare_recovery
from weightdyn.checkpoints.recovery import recover_forces as recover_forces
from weightdyn.checkpoints.series import Checkpoints as Checkpoints
from weightdyn.core.forces import angle as angle
from weightdyn.core.forces import before_step as before_step
from weightdyn.core.forces import forces_from_products as forces_from_products
from weightdyn.core.forces import relative_update as relative_update
from weightdyn.core.forces import timescale as timescale
from weightdyn.core.tables import FORCES as FORCES
from weightdyn.core.tables import aggregate as aggregate
from weightdyn.core.tables import budget as budget
from weightdyn.explain.trajectory import closure as closure
from weightdyn.explain.trajectory import equilibrium as equilibrium
from weightdyn.explain.trajectory import integrate as integrate
from weightdyn.explain.trajectory import phases as phases
from weightdyn.explain.trajectory import pool_weibull as pool_weibull
from weightdyn.files.weightfiles import CheckpointError as CheckpointError
from weightdyn.record.logger import ForceLogger as ForceLogger
from weightdyn.record.runlog import RunLog as RunLog
from weightdyn.record.runlog import RunLogError as RunLogError
from weightdyn.weibull.diagnosis import classify as classify
from weightdyn.weibull.diagnosis import diagnose as diagnose
from weightdyn.weibull.fit import WeibullFit as WeibullFit
from weightdyn.weibull.fit import fit_weibull as fit_weibull
from weightdyn.weibull.laws import rank_laws as rank_laws
from weightdyn.weibull.laws import tails as tails
from weightdyn.weibull.magnitudes import MagnitudeHistogram as MagnitudeHistogram
from weightdyn.weibull.weights import fit_weights as fit_weights
from weightdyn.weibull.weights import shape_drift as shape_drift

__version__ = "0.1.0"
