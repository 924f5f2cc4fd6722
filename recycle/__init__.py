"""Find the dead units of a network while it trains, and put them back to work."""

from recycle.graph import Graph as Graph
from recycle.graph import NotRecyclable as NotRecyclable
from recycle.graph import UnitGroup as UnitGroup
from recycle.methods import METHODS as METHODS
from recycle.methods import find as find
from recycle.recycler import Recycler as Recycler
from recycle.recycler import Report as Report
from recycle.surgery import Edit as Edit
from recycle.surgery import Fold as Fold
from recycle.surgery import Reset as Reset
from recycle.surgery import Split as Split
from recycle.surgery import apply as apply
from recycle.tracing import trace as trace
