"""Guardrails: what looks at prompts and pictures, behind one protocol; NVIDIA's package is one of them."""
