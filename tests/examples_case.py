"""How hypothesis makes examples: the same each time, however slow the machine is."""

from hypothesis import HealthCheck

FIXED = {
    "derandomize": True,
    "deadline": None,
    "suppress_health_check": [HealthCheck.too_slow],
}
"""Settings of a test."""
