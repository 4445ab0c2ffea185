"""DFlare block-diffusion speculative decoding for SGLang (arXiv 2606.02091)."""

__version__ = "0.1.0"
