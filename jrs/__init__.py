"""jrs: concurrent brain MRI registration and tumour segmentation, deployed without PyTorch."""

__version__ = "0.1.0"
