"""How long few tokens wait. The command line reads it where river, which the policy needs, is not installed."""

from __future__ import annotations

from typing import Final

MAX_AGES: Final = 4
"""Times the age that cuts a micro-batch, after which it is cut however few tokens it has."""
