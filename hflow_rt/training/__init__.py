"""Training: settings, the loop, checkpoints that resume to the bit."""
