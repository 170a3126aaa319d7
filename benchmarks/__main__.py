"""Run every benchmark and print its table."""

from __future__ import annotations

from benchmarks import aggregation, clients_memory, routed_lora

if __name__ == "__main__":
    routed_lora.main()
    clients_memory.main()
    aggregation.main()
