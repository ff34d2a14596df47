"""Deployment: preprocessing, engines, the inference pipeline and its results; never PyTorch."""

DEFAULT_ITERATIONS = 4
"""Of the refinement, at its finest level: docs/refinement.md has why; here, where the command line finds it fast."""
