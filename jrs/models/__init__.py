"""The network, its spatial transformer and losses, and the readers of its weights (PyTorch)."""

from jrs.architecture import Architecture
from jrs.models.network import JointNet, JointOutput
from jrs.models.reference import load_reference_weights

__all__ = ["Architecture", "JointNet", "JointOutput", "load_reference_weights"]
