"""What is asked: the arguments of a call, checked, and the form of its result."""
