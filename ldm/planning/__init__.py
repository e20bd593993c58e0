"""Forecast of memory. Importing this package imports no torch."""

AS_GIVEN = "as given"  # the configs without a tier
# Overlays that lower memory, the fastest first.
TIERS = ("fast.yaml", "lean.yaml", "minimal.yaml", "smallest.yaml")
