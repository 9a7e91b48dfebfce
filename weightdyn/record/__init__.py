"""While a model trains: the hook on the optimizer, the pass over its moments, the run directory."""
