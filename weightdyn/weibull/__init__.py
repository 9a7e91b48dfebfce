"""The Weibull law of weight magnitudes: histograms, fits, rival laws, whole models, a diagnosis."""
