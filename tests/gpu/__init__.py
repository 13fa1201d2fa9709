"""What has to hold on GPUs: operators, every layout over NCCL, the whole app. ``python -m tests.gpu`` runs it all."""
