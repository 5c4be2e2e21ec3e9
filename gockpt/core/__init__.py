"""Values and rules without input or output: boxes, layouts, when to save, what may be deleted."""
