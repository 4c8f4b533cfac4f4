"""What all threads of the process share: settings, turns, and torch itself."""
