"""Find the dead units of a network while it trains, and put them back to work."""

from recycle.bounds import certify as certify
from recycle.deepening import deepen as deepen
from recycle.edits import Edit as Edit
from recycle.edits import Fold as Fold
from recycle.edits import Grow as Grow
from recycle.edits import Merge as Merge
from recycle.edits import Prune as Prune
from recycle.edits import Reset as Reset
from recycle.edits import Split as Split
from recycle.graph import Graph as Graph
from recycle.graph import NotRecyclable as NotRecyclable
from recycle.graph import UnitGroup as UnitGroup
from recycle.interventions import Deepen as Deepen
from recycle.methods import METHODS as METHODS
from recycle.methods import find as find
from recycle.recycler import Recycler as Recycler
from recycle.report import Report as Report
from recycle.surgery import apply as apply
from recycle.tracing import trace as trace
