"""The user's model as a function: evaluated in isolation, its graph, what it must be."""
