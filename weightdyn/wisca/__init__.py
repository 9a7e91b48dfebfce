"""WISCA: rescale the paired weights of a model, prove that nothing changed, and measure what it shifts.

`find_pairs` knows which tensors stand in a product of which the network sees only the product; `rescale_` balances
their norms in place, `check_equivalence` proves that outputs stay, `predict_shift` says what becomes of the forces,
and `compare` trains with and without it and measures.
"""

from weightdyn.core.tables import RESCALE_TABLE as RESCALE_TABLE
from weightdyn.core.tables import SHIFT_TABLE as SHIFT_TABLE
from weightdyn.wisca.apply import apply_ as apply_
from weightdyn.wisca.apply import rescale_ as rescale_
from weightdyn.wisca.apply import undo_ as undo_
from weightdyn.wisca.arms import ARMS as ARMS
from weightdyn.wisca.comparison import Comparison as Comparison
from weightdyn.wisca.comparison import compare as compare
from weightdyn.wisca.folder import rescale_folder as rescale_folder
from weightdyn.wisca.pairs import FAMILIES as FAMILIES
from weightdyn.wisca.pairs import KINDS as KINDS
from weightdyn.wisca.pairs import Part as Part
from weightdyn.wisca.pairs import ScalingPair as ScalingPair
from weightdyn.wisca.pairs import find_pairs as find_pairs
from weightdyn.wisca.plan import plan_rescale as plan_rescale
from weightdyn.wisca.plan import scale_factors as scale_factors
from weightdyn.wisca.predict import predict_shift as predict_shift
from weightdyn.wisca.proof import check_equivalence as check_equivalence
from weightdyn.wisca.runs import Run as Run
from weightdyn.wisca.schedule import RescaleSchedule as RescaleSchedule
