"""A reference evaluator that runs a saved Core ML model package on any machine."""
