"""From PyTorch to ONNX: graphs, the custom operator, precision, parity, bundles."""
