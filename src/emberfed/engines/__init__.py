"""One engine per file; the file name is the registry (`engine: {name: local}` imports `engines/local.py`)."""
