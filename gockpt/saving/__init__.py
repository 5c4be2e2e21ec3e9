"""Saving: from a call of the training loop and the optimizer's updates to a captured save."""
