"""weightdyn: why the weights of a network grow, overshoot and relax, in numbers.

It logs AdamW's moments while a model trains, splits every change of a tensor's squared norm into three forces,
alignment, injection and decay, tells what alignment is made of, the pull of the mean gradient and momentum's memory
of its noise, fits a Weibull law to the weight magnitudes of every layer, recovers the forces of
published models from their checkpoints, and measures what an output-preserving rescaling shifts.
"""

from weightdyn import plot as plot
from weightdyn import wisca as wisca
from weightdyn.checkpoints import recipe as recipe
from weightdyn.checkpoints.audit import Audit as Audit
from weightdyn.checkpoints.audit import audit_recipe as audit_recipe
from weightdyn.checkpoints.clock import decay_clock as decay_clock
from weightdyn.checkpoints.published import read_published_forces as read_published_forces
from weightdyn.checkpoints.published import read_published_recovery as read_published_recovery
from weightdyn.checkpoints.published import read_published_trajectory as read_published_trajectory
from weightdyn.checkpoints.recipe import Recipe as Recipe
from weightdyn.checkpoints.recovery import compare_recovery as compare_recovery
from weightdyn.checkpoints.recovery import interval_means as interval_means
from weightdyn.checkpoints.recovery import recover_forces as recover_forces
from weightdyn.checkpoints.series import Checkpoints as Checkpoints
from weightdyn.checkpoints.states import forces_from_states as forces_from_states
from weightdyn.core.forces import angle as angle
from weightdyn.core.forces import before_step as before_step
from weightdyn.core.forces import drift_from_products as drift_from_products
from weightdyn.core.forces import forces_from_products as forces_from_products
from weightdyn.core.forces import memory_null as memory_null
from weightdyn.core.forces import relative_update as relative_update
from weightdyn.core.forces import timescale as timescale
from weightdyn.core.naming import COMPONENTS as COMPONENTS
from weightdyn.core.naming import ROLES as ROLES
from weightdyn.core.naming import TensorName as TensorName
from weightdyn.core.naming import View as View
from weightdyn.core.naming import describe as describe
from weightdyn.core.tables import ACCURACY_TABLE as ACCURACY_TABLE
from weightdyn.core.tables import AUDIT_TABLE as AUDIT_TABLE
from weightdyn.core.tables import BUDGET_TABLE as BUDGET_TABLE
from weightdyn.core.tables import CHECKPOINT_TABLE as CHECKPOINT_TABLE
from weightdyn.core.tables import CLOCK_TABLE as CLOCK_TABLE
from weightdyn.core.tables import CLOSURE_TABLE as CLOSURE_TABLE
from weightdyn.core.tables import FIT_TABLE as FIT_TABLE
from weightdyn.core.tables import FORCE_TABLE as FORCE_TABLE
from weightdyn.core.tables import FORCES as FORCES
from weightdyn.core.tables import INTEGRAL_TABLE as INTEGRAL_TABLE
from weightdyn.core.tables import LOG_TABLE as LOG_TABLE
from weightdyn.core.tables import PHASE_TABLE as PHASE_TABLE
from weightdyn.core.tables import RECOVERY_TABLE as RECOVERY_TABLE
from weightdyn.core.tables import RESCALE_TABLE as RESCALE_TABLE
from weightdyn.core.tables import SHAPE_TABLE as SHAPE_TABLE
from weightdyn.core.tables import SHIFT_TABLE as SHIFT_TABLE
from weightdyn.core.tables import SMOOTH_TABLE as SMOOTH_TABLE
from weightdyn.core.tables import STATE_TABLE as STATE_TABLE
from weightdyn.core.tables import SUMMARY_TABLE as SUMMARY_TABLE
from weightdyn.core.tables import WEIBULL_TABLE as WEIBULL_TABLE
from weightdyn.core.tables import aggregate as aggregate
from weightdyn.core.tables import budget as budget
from weightdyn.core.tables import pool_weibull as pool_weibull
from weightdyn.explain.summary import summarize as summarize
from weightdyn.explain.trajectory import closure as closure
from weightdyn.explain.trajectory import equilibrium as equilibrium
from weightdyn.explain.trajectory import integrate as integrate
from weightdyn.explain.trajectory import phases as phases
from weightdyn.explain.windows import smooth as smooth
from weightdyn.files.weightfiles import CheckpointError as CheckpointError
from weightdyn.record.given import Shard as Shard
from weightdyn.record.given import ShardLogger as ShardLogger
from weightdyn.record.logger import ForceLogger as ForceLogger
from weightdyn.record.runlog import RunLog as RunLog
from weightdyn.record.runlog import RunLogError as RunLogError
from weightdyn.weibull.diagnosis import Diagnosis as Diagnosis
from weightdyn.weibull.diagnosis import classify as classify
from weightdyn.weibull.diagnosis import diagnose as diagnose
from weightdyn.weibull.fit import WeibullFit as WeibullFit
from weightdyn.weibull.fit import fit_weibull as fit_weibull
from weightdyn.weibull.laws import Tails as Tails
from weightdyn.weibull.laws import rank_laws as rank_laws
from weightdyn.weibull.laws import tails as tails
from weightdyn.weibull.magnitudes import MagnitudeHistogram as MagnitudeHistogram
from weightdyn.weibull.weights import fit_weights as fit_weights
from weightdyn.weibull.weights import shape_drift as shape_drift

__version__ = "0.1.0"
