"""Studies: which cells a grid has, what each leaves, how learning rates are chosen, and what the numbers can tell."""
