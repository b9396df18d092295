"""What a compiler of engines asks of a graph before it takes it: rules as data, one module per compiler."""
