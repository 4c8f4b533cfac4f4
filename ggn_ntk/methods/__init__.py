"""Routes to one kernel, which check each other."""
