"""Long tries under load, run by hand: each prints a table. ``make soak`` runs all."""
