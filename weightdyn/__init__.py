"""weightdyn: why the weights of a network grow, overshoot and relax, in numbers."""
