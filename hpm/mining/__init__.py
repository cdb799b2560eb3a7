"""Mining: which patches are hard, which are hidden, and the losses that teach it.

What `__all__` lists, here and in `masking` and `losses`, is public: see docs/library.md.
"""

from hpm.mining import losses, masking
from hpm.mining.draw import Draw
from hpm.mining.memory import HardnessMemory
from hpm.mining.teacher import Teacher

__all__ = ["Draw", "HardnessMemory", "Teacher", "losses", "masking"]
