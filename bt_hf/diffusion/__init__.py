"""Preference LoRAs: adapt a text-to-image diffusion pipeline to a taste."""
