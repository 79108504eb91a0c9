"""Inference: the same model code as training, over the latent cache."""
