"""Loading: from a checkpoint to live modules, optimizers, random states and extras."""
