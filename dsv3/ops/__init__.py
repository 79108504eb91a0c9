"""Numerics. Each op is a plain reference beside its fast paths, and one function that chooses between them.

The reference is the definition: short, obviously the equation, any dtype, any device. The fast path is what
the model calls; a test holds the two together on fresh random inputs, values and gradients.
"""
