"""Whatever touches parameters: what is trained, what trains it, what is made of it."""
