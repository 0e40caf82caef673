"""The simulation of a fleet, in a short form: what the experiments claim of the orders holds."""

from __future__ import annotations

from tests.benchmarks.sim_fleet import DEVICES, simulate

SECONDS = 300.0


def test_a_flood_leaves_the_others_as_they_are_with_the_fair_queue_alone() -> None:
    device = DEVICES["h200-1.2b"]
    calm = simulate(500, device, flood=False, duration_s=SECONDS)
    flooded = simulate(500, device, flood=True, duration_s=SECONDS)
    assert flooded["fair"]["age_p95_s"] <= calm["fair"]["age_p95_s"] + 5
    assert flooded["fair"]["behind_flood_max"] <= 1
    assert flooded["in order"]["behind_flood_max"] > 10
    assert flooded["in order"]["age_p95_s"] > 2 * flooded["fair"]["age_p95_s"]
    assert flooded["fair, 256 in memory"]["age_p95_s"] > flooded["fair"]["age_p95_s"] + 10
    for found in (calm, flooded):
        assert len({figures["examples"] for figures in found.values()}) == 1, "every order learns every example"
        assert found["one by one"]["device_s_per_adapter_day"] > 5 * found["fair"]["device_s_per_adapter_day"]
