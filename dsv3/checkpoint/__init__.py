"""Checkpoints in the official DeepSeek-V3 format (Hugging Face names, sharded safetensors), in and out."""
