"""Lower to an ExecuTorch program."""
