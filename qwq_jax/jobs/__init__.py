"""One file a verb of the command line: it wires the other packages together and reports."""
