"""One method per file; the file name is the registry (`emberfed.load_method("a3smoe")` imports `methods/a3smoe.py`)."""
