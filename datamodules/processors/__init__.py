"""Items to model inputs, one file for each kind of backbone."""
