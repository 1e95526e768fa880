"""Lower to an ONNX file."""
