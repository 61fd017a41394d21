"""The lecture as small programs: see lessons/README.md."""
