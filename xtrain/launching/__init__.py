"""How the processes of a run are started on one host or several, watched, and ended."""
