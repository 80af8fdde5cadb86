"""Tables of runs: what they are made of, the runs, what they say together, and how it is shown."""
