"""Tiny models of families that the generic adapter serves, with inputs as their processors make them."""

from evengaze.testing.generic.further import FURTHER
from evengaze.testing.generic.hybrid import HYBRID
from evengaze.testing.generic.more import MORE
from evengaze.testing.generic.plain import PLAIN
from evengaze.testing.generic.shared import SHARED
from evengaze.testing.recipes import Family

GENERIC: dict[str, Family] = {**PLAIN, **MORE, **HYBRID, **SHARED, **FURTHER}
