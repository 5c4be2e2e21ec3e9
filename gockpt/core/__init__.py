"""Values and rules without I/O: boxes, layouts, the schedule of saves, retention."""
