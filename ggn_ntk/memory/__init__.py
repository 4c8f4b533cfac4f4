"""What is held at once."""
