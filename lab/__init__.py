"""What the report's cells and commands call: store of runs, pool, replay, tables, figures, interventions, benchmark, PDF."""
