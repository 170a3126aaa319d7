"""Run every benchmark and print its table."""

from __future__ import annotations

from benchmarks import clients_memory

if __name__ == "__main__":
    clients_memory.main()
