"""The plan against published measurements: which rows it covers, and how well."""

from lorasweep.bench.published import not_covered, rows


def covered(figure):
    name = {"memory": "memory_gib", "speed": "tokens_s"}[figure]
    return [r for r in rows() if getattr(r, name) and not_covered(r, figure) is None]


def test_enough_rows_and_sources_are_covered_by_their_settings():
    memory, speed = covered("memory"), covered("speed")
    assert len(memory) >= 20 and len(speed) >= 20
    assert len({r.source for r in memory + speed}) >= 6
    assert not any(r.precision != "bf16" or r.sharding == "other" for r in memory + speed)
