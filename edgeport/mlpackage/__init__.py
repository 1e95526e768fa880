"""Reads a saved Core ML model package (.mlpackage): the program, its constants, its compressed weights.

Needs coremltools on disk for its generated protobuf messages, never imports it. The exporters read back what
they wrote with this, and `edgeport.runtime.coreml` evaluates it.
"""
