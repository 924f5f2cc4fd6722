"""With which weights a unit is born.

A birth is a function of :class:`Newborns` that returns one tensor for each of ``newborns.axes``: its outgoing weights
are then zero. One that says those too returns :class:`Born`, and is for :class:`recycle.Grow` only.
"""

from recycle.births.firefly import firefly as firefly
from recycle.births.given import Given as Given
from recycle.births.gradmax import gradmax as gradmax
from recycle.births.newborns import Birth as Birth
from recycle.births.newborns import Born as Born
from recycle.births.newborns import Elements as Elements
from recycle.births.newborns import Newborns as Newborns
from recycle.births.plain import like_init as like_init
from recycle.births.plain import mirror as mirror
from recycle.births.plain import near_zero as near_zero
from recycle.births.plain import paired as paired
from recycle.births.plain import zero_out as zero_out
from recycle.births.revive import revive as revive
from recycle.births.tiny import tiny as tiny
