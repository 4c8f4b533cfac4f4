"""Ask for a kernel."""
