"""What every stage may use: numbers, files, progress, the machine. Knows no graph and no plan."""
