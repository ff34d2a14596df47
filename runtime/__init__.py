"""Deployment: preprocessing, engines, the inference pipeline and its results; never PyTorch."""
