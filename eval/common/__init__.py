"""What every command needs: figures, tables, results on disk, resuming, processes of their own. Measures nothing."""
