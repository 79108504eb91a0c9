"""What a model of any size costs, fits and gains: arithmetic and simulation from a `ModelConfig` alone."""
