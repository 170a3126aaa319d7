"""Run every benchmark and print its table."""

from __future__ import annotations

from benchmarks import (
    aggregation,
    clients_memory,
    clock,
    expert_merging,
    flower_wire,
    pool,
    profiling,
    routed_lora,
    sparse_adapter,
)

if __name__ == "__main__":
    routed_lora.main()
    sparse_adapter.main()
    clients_memory.main()
    aggregation.main()
    clock.main()
    profiling.main()
    expert_merging.main()
    pool.main()
    flower_wire.main()
