from .swap import Patch as Patch
from .swap import Replacement as Replacement
from .swap import patch as patch
from .swap import unpatch as unpatch
