"""Checks on GPUs: operators, every layout over NCCL, the whole app. ``python -m tests.gpu`` runs them all."""
